"""Which neurons are steered.

Does not know what is done to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import largest

DEFAULT_FRACTION = 0.1


@dataclass(frozen=True)
class Choice:
    """One way to choose neurons of a site (see `memgen_lens.Steering.from_scores`).

    Attributes:
        top_fraction: Share of the neurons with the largest abs(score); where no way is given, a tenth.
        top_k: Number of these neurons.
        max_q: Largest q of a neuron.
        neurons: The neurons themselves, as (layer, neuron) or as a mask.
        per_layer: Whether a fraction or number is taken of each layer in place of all together.
        layers: Only neurons in these layers, ranked as without them; None = all.
    """

    top_fraction: float | None = None
    top_k: int | None = None
    max_q: float | None = None
    neurons: Int[np.ndarray, "neuron 2"] | Bool[np.ndarray, "layer neuron"] | None = None
    per_layer: bool = False
    layers: int | Sequence[int] | None = None

    def mask(self, scores: NeuronScores, *, call: str) -> Bool[np.ndarray, "layer neuron"]:
        """The chosen neurons.

        Raises:
            SettingsError: There is more than one way to choose, or it does not fit the scores.
        """
        ways = self._ways(call)
        in_layers = _in_layers(self.layers, len(scores.rho), call=call)
        if "neurons" in ways:
            return _given(self.neurons, scores.rho.shape, call=call) & in_layers
        ranked = _ranked(scores)
        useful = ranked > 0 if scores.method in CAUSAL else np.ones(ranked.shape, dtype=bool)
        if self.max_q is not None:
            useful &= scores.q <= self.max_q
            if not useful.any():
                raise SettingsError(
                    f"{call}(max_q=...)",
                    expected="a level that some neuron's q is not above",
                    received=f"{self.max_q:g}, where the smallest q is {scores.q.min():.3g}",
                    fix="Raise max_q, or choose by top_fraction or top_k.",
                )
            return useful & in_layers
        rows = ranked if self.per_layer else ranked.reshape(1, -1)
        if self.top_k is None:
            count = max(1, round((self.top_fraction or DEFAULT_FRACTION) * rows.shape[1]))
        elif (count := self.top_k) > rows.shape[1]:
            raise SettingsError(
                f"{call}(top_k=...)",
                expected=f"at most {rows.shape[1]}, the neurons of {'a layer' if self.per_layer else 'the site'}",
                received=str(count),
                fix="Lower top_k.",
            )
        return largest(rows, count).reshape(ranked.shape) & useful & in_layers

    @property
    def words(self) -> str | None:
        """How neurons are chosen, in words; None where it is by the top fraction over all layers."""
        if self.neurons is not None:
            count = int(self.neurons.sum()) if self.neurons.dtype == bool else len(self.neurons)
            return f"{count} given neuron{'' if count == 1 else 's'}"
        if self.max_q is not None:
            return f"neurons with q of at most {self.max_q:g}"
        of = " of each layer" if self.per_layer else ""
        if self.top_k is not None:
            return f"top {self.top_k}{of}"
        return f"top {100 * (self.top_fraction or DEFAULT_FRACTION):g} %{of}" if of else None

    def _ways(self, call: str) -> list[str]:
        ways = [name for name in ("top_fraction", "top_k", "max_q", "neurons") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise SettingsError(
                call,
                expected="one way to choose neurons: top_fraction, top_k, max_q or neurons",
                received=" and ".join(ways),
                fix="Give one of them.",
            )
        if self.per_layer and ways and ways[0] in ("max_q", "neurons"):
            raise SettingsError(
                call,
                expected="per_layer=True with top_fraction or top_k alone",
                received=f"per_layer=True and {ways[0]}",
                fix="Leave out per_layer: such neurons are in the layers that they are in.",
            )
        return ways


def strongest(
    scores: NeuronScores, top_fraction: float, layers: int | Sequence[int] | None, *, call: str
) -> Bool[np.ndarray, "layer neuron"]:
    """The neurons with the largest abs(score) over all layers, as far as they are in some layers (see `Choice`)."""
    return Choice(top_fraction=top_fraction, layers=layers).mask(scores, call=call)


def _ranked(scores: NeuronScores) -> Float[np.ndarray, "layer neuron"]:
    """What neurons are ranked by: of a causal method's scores those above 0 (see `Steering.from_scores`)."""
    return np.maximum(scores.score, 0) if scores.method in CAUSAL else scores.score


def _in_layers(layers: int | Sequence[int] | None, n_layers: int, *, call: str) -> Bool[np.ndarray, "layer 1"]:
    chosen = np.arange(n_layers) if layers is None else np.atleast_1d(np.asarray(layers))
    if (chosen >= n_layers).any():
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"layers of the scores, 0 to {n_layers - 1}",
            received=repr(layers),
            fix="Change layers.",
        )
    return np.isin(np.arange(n_layers), chosen)[:, None]


def _given(neurons: Any, shape: tuple[int, ...], *, call: str) -> Bool[np.ndarray, "layer neuron"]:
    """A list of neurons, or a mask, as a mask of the scores' shape."""
    mask, there = np.zeros(shape, dtype=bool), "x".join(map(str, shape))
    if neurons.dtype == bool:
        wrong = None if neurons.shape == shape else f"a mask of {'x'.join(map(str, neurons.shape))}"
    else:
        outside = neurons[((neurons < 0) | (neurons >= shape)).any(1)]
        wrong = f"({outside[0, 0]}, {outside[0, 1]})" if len(outside) else None
    if wrong is not None:
        raise SettingsError(
            f"{call}(neurons=...)",
            expected=f"neurons of the scores, {there} of them (layers x neurons)",
            received=wrong,
            fix="Count layers and neurons from 0.",
        )
    if neurons.dtype == bool:
        return neurons.copy()
    mask[tuple(neurons.T)] = True
    return mask

"""Which neurons make the difference to the answer? Causal methods, pair by pair.

Does not test nor rank: `attribute` makes scores of what each pair says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens.analysis.attribution.answers import Answers
from memgen_lens.analysis.attribution.contrast import Asked, Contrast
from memgen_lens.analysis.attribution.interventions import changes, gradients, path_gradients
from memgen_lens.analysis.recording.finite import SIDES
from memgen_lens.core.pairs import PromptPairs

Baseline = Literal["zero", "mean", "resample"]
Effects = Float[np.ndarray, "pair layer neuron"]
FROM_ZERO = 3
"""Power by which points of a path that begins at zero stand close together there."""


@dataclass(frozen=True)
class Sides:
    """Some pairs and their activations at the answer position.

    Attributes:
        pairs: The pairs.
        answers: Tokens of both answers of each.
        memorized: Activations on the recalling side, ``[pair, layer, neuron]``.
        generalized: On the computing side.
    """

    pairs: PromptPairs
    answers: Answers
    memorized: Float[Tensor, "pair layer neuron"]
    generalized: Float[Tensor, "pair layer neuron"]

    @property
    def difference(self) -> Float[Tensor, "pair layer neuron"]:
        """Recalling minus computing."""
        return self.memorized - self.generalized


@dataclass(frozen=True)
class Explainer:
    """How effects are found.

    Attributes:
        contrast: What is explained.
        hooks: Hook points of the site, one a layer.
        batch_size: Prompts in one forward pass at most.
        n_steps: Points of a path.
        groups: Neurons that are changed together, by number; None = each on its own.
        done: Told how many prompts have been run by a method that runs many.
    """

    contrast: Contrast
    hooks: Sequence[str]
    batch_size: int
    n_steps: int
    groups: np.ndarray | None = None
    done: Callable[[int], Any] = lambda n: None

    def attribution_patching_ig(self, sides: Sides) -> Effects:
        """Attribution patching with gradients averaged on the way from one prompt's activation to the other's."""

        def slope(asked: Asked, rows: Tensor) -> Tensor:
            ends = sides.generalized[rows], sides.memorized[rows]
            return path_gradients(self.contrast, asked, self.hooks, *ends, self.n_steps)

        slopes = [self._asked(sides, side, slope) for side in SIDES]
        return _array((slopes[0] + slopes[1]) / 2 * sides.difference)

    def integrated_gradients(self, sides: Sides) -> Effects:
        """The activation on the recalling side times its mean gradient on the way there from zero."""

        def slope(asked: Asked, rows: Tensor) -> Tensor:
            end = sides.memorized[rows]
            start = torch.zeros_like(end)
            # A layer norm hides how large the stream is until little is left of it: there nearly all of the change is.
            return path_gradients(self.contrast, asked, self.hooks, start, end, self.n_steps, power=FROM_ZERO)

        return _array(self._asked(sides, "memorized", slope) * sides.memorized)

    def patching(self, sides: Sides) -> Effects:
        """What the other prompt's value does, on either side; the mean of both, towards memorization."""
        on_memorized = self._changes(sides, "memorized", sides.generalized)
        on_generalized = self._changes(sides, "generalized", sides.memorized)
        return _array((on_generalized - on_memorized) / 2)

    def ablation(self, sides: Sides, values: Float[Tensor, "pair layer neuron"]) -> Effects:
        """What is lost on the recalling side where a neuron has another value."""
        return _array(-self._changes(sides, "memorized", values))

    def _asked(self, sides: Sides, side: str, found: Callable[[Asked, Tensor], Tensor]) -> Tensor:
        """What is found at the prompts of one side, in the order of the pairs."""
        out = torch.zeros_like(sides.memorized)
        for asked in self.contrast.asked(sides.pairs, side, sides.answers, batch_size=self.batch_size):
            rows = torch.tensor(asked.index, device=out.device)
            out[rows] = found(asked, rows).to(out.dtype)
        return out

    def _changes(self, sides: Sides, side: str, values: Tensor) -> Tensor:
        """How much the contrast changes where a group of neurons has other values, told to each of its neurons."""
        shape = values.shape[1:]
        numbers = np.arange(shape.numel()).reshape(shape) if self.groups is None else self.groups
        kept, places = np.unique(numbers, return_inverse=True)
        groups = [numbers == number for number in kept if number >= 0]

        def found(asked: Asked, rows: Tensor) -> Tensor:
            change = changes(self.contrast, asked, self.hooks, values[rows], groups, self.done)
            # Numbers below 0 are sorted before all others: neurons that are left alone.
            change = torch.cat([torch.zeros_like(change[:, :1]).expand(-1, len(kept) - len(groups)), change], dim=1)
            return change[:, torch.from_numpy(places.reshape(shape)).to(change.device)]

        return self._asked(sides, side, found)


def attribution_patching(explainers: Mapping[str, Explainer], sides: Mapping[str, Sides]) -> dict[str, Effects]:
    """Mean of both prompts' gradients, times the difference: all layers of all sites in one backward pass a batch."""
    slopes = {site: torch.zeros_like(each.memorized) for site, each in sides.items()}
    places = [(site, layer, name) for site in sides for layer, name in enumerate(explainers[site].hooks)]
    first, some = next((explainers[site], each) for site, each in sides.items())
    for side in SIDES:
        for asked in first.contrast.asked(some.pairs, side, some.answers, batch_size=first.batch_size):
            found = gradients(first.contrast, asked, [name for *_, name in places])
            rows = torch.tensor(asked.index, device=some.memorized.device)
            for (site, layer, _), slope in zip(places, found, strict=True):
                slopes[site][rows, layer] += (slope / 2).to(slopes[site])
    return {site: _array(slopes[site] * each.difference) for site, each in sides.items()}


def _array(values: Tensor) -> Effects:
    return values.detach().cpu().numpy()

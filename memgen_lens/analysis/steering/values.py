"""What neurons are multiplied by or set to: computed of recorded activations, for each direction of steering.

Only the ``select`` pairs are read, as for whatever is fitted. Does not choose neurons nor change anything.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations
from memgen_lens.core.types import Ablation, ScoredMode

NEEDS_SOURCE: dict[tuple[ScoredMode, Ablation | None], str] = {
    ("patch", None): "patch",
    ("clamp", None): "clamp",
    ("ablate", "mean"): "ablate', how='mean",
    ("ablate", "resample"): "ablate', how='resample",
}
"""Modes that take values from recorded activations, as a call names them."""


@dataclass(frozen=True)
class Values:
    """What neurons are multiplied by or set to; see `memgen_lens.analysis.steering.intervention.Intervention`.

    Attributes:
        values: By direction, of all neurons; None where they are added to, or take their values from rows.
        source: Rows that values are taken from.
        draw: Which row each pair takes, where it is not its own.
    """

    values: Float[np.ndarray, "toward layer neuron"] | None = None
    source: SiteActivations | None = None
    draw: Int[np.ndarray, " pair"] | None = None


def values_for(
    scores: NeuronScores,
    alpha: float,
    mode: ScoredMode,
    source: Activations | None,
    how: Ablation | None,
    seed: int,
    *,
    call: str,
) -> Values:
    """What a mode needs of the activations.

    Raises:
        SettingsError: A mode that needs them gets none.
        SiteError: They lack the scores' site, or have another shape there.
        PairsError: ``select`` holds fewer than 8 pairs, or all pairs are of one item.
        ModelError: An activation is not finite.
    """
    needs = NEEDS_SOURCE.get((mode, how))
    if needs is not None and source is None:
        raise SettingsError(
            call,
            expected=f"source=record(...) with mode='{needs}'",
            received="source=None",
            fix="Its values are taken from recorded activations.",
        )
    if source is not None and (needs is not None or mode == "scale"):
        shape = source.site(scores.site).memorized.shape[1:]
        if shape != scores.rho.shape:
            raise wrong_shape(scores.site, "x".join(map(str, scores.rho.shape)), "x".join(map(str, shape)))
    if mode == "scale":
        return Values(factors(_speaks_for(scores, source, call), alpha))
    if mode == "ablate" and how == "zero":
        return Values(np.zeros((2, *scores.rho.shape)))
    if needs is None or source is None:
        return Values()
    if mode == "patch":
        return Values(source=source.site(scores.site))
    if how == "resample":
        return Values(source=source.site(scores.site), draw=_drawn(source, seed, call))
    memorized, generalized = select_means(source, scores.site, call=call)
    if mode == "clamp":
        return Values(np.stack([generalized, memorized]))  # in the order of `rules.DIRECTIONS`
    return Values(np.stack([(memorized + generalized) / 2] * 2))


def select_means(acts: Activations, site: str, *, call: str) -> Float[np.ndarray, "2 layer neuron"]:
    """The mean activation over the ``select`` pairs, of the recalling side and of the computing one.

    Raises:
        SiteError: The site was not recorded.
        PairsError: ``select`` holds fewer than 8 pairs.
        ModelError: An activation is not finite.
    """
    recorded, index = acts.site(site), acts.pairs.of("select")
    chosen = recorded.take(index)
    require_finite(call, site, [chosen.memorized, chosen.generalized], acts.pairs.take(index))
    return np.stack([side.mean(0, dtype=np.float64) for side in (chosen.memorized, chosen.generalized)])


def _speaks_for(scores: NeuronScores, source: Activations | None, call: str) -> Float[np.ndarray, "layer neuron"]:
    """+1 of neurons whose amplification speaks for memorization, -1 for generalization, 0 for neither."""
    if source is None:
        return np.sign(scores.rho).astype(np.float64)
    memorized, generalized = select_means(source, scores.site, call=call)
    return np.sign(np.abs(memorized) - np.abs(generalized))


def factors(speaks_for: Float[np.ndarray, "layer neuron"], alpha: float) -> Float[np.ndarray, "2 layer neuron"]:
    """Factors towards generalization and towards memorization: 1 + alpha, or 1 - alpha and at least 0."""
    return np.stack([np.maximum(1 - alpha * speaks_for, 0), np.maximum(1 + alpha * speaks_for, 0)])


def _drawn(acts: Activations, seed: int, call: str) -> Int[np.ndarray, " pair"]:
    """For each pair a prompt of a ``select`` pair of another item: its place, behind those of one side of the other."""
    rng, item, select = np.random.default_rng(seed), acts.pairs.item, acts.pairs.of("select")
    places = np.concatenate([select, select + len(item)])
    owner = np.concatenate([item[select]] * 2)
    drawn = rng.integers(len(places), size=len(item))
    if len(np.unique(owner)) < 2:
        raise PairsError(
            call,
            expected="select pairs of at least 2 items, to take values from another one",
            received="1",
            fix="Give pairs of more items.",
        )
    while len(own := np.flatnonzero(owner[drawn] == item)):
        drawn[own] = rng.integers(len(places), size=len(own))
    return places[drawn]


def wrong_shape(site: str, expected: str, received: str) -> SiteError:
    """The error for a site of another shape than the scores."""
    return SiteError(
        f"steering site {site!r}",
        expected=f"a model with {expected} there, as in the scores",
        received=received,
        fix="Score this very model: attribute(record(model, ...), site).",
    )

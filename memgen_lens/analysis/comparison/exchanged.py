"""Scores of one model's pairs whose labels say nothing: what is alike without a behaviour.

Does not compare models.
"""

from typing import cast, get_args

import numpy as np
from jaxtyping import Float

from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.analysis.attribution.resampled import Weighting, reweighted
from memgen_lens.analysis.attribution.scored import by_item, places_of
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.pairs import PairSplit
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations
from memgen_lens.core.types import Observational

N_EXCHANGED = 100
"""Draws of which items' labels are exchanged."""


def scores_of_exchanged_labels(
    score: NeuronScores, acts: Activations, rng: np.random.Generator, *, call: str
) -> Float[np.ndarray, "draw layer neuron"]:
    """The same score of the same pairs where the two labels of a random half of the items are exchanged.

    Args:
        score: Scores of an observational method.
        acts: The activations that they were made of, of one split or all of it.
        rng: Draws the items; all pairs of one are exchanged together.
        call: The call that needs them.

    Raises:
        SettingsError: The method is a causal one, or the activations are not those of the scores.
        SiteError: The site was not recorded.
    """
    if score.method in CAUSAL:
        raise SettingsError(
            f"{call}(acts=...)",
            expected="scores of a method that takes recorded activations",
            received=f"scores by {score.method}, which runs the model",
            fix="Leave acts out, or score with 'pearson' or 'nmd'.",
        )
    sides, places = _scored(score, acts, call)
    n_items = int(places[-1]) + 1
    # Exactly half of the items where that is possible: the label of the rest is then as good as its opposite.
    signs = rng.permuted(np.tile(np.where(np.arange(n_items) < n_items // 2, -1.0, 1.0), (N_EXCHANGED, 1)), axis=1)
    weighting = Weighting.of(np.ones_like(signs), signs)
    parts = reweighted(cast(Observational, score.method), sides.memorized, sides.generalized, places, weighting)
    return np.concatenate([part for _, part in parts], axis=1).reshape(N_EXCHANGED, *score.score.shape)


def _scored(score: NeuronScores, acts: Activations, call: str) -> tuple[SiteActivations, np.ndarray]:
    """Activations of the pairs that were scored, item by item, and the place of each pair's item."""
    recorded, pairs = acts.site(score.site), acts.pairs
    for split in (*get_args(PairSplit), None):
        index = by_item(pairs, np.flatnonzero(pairs.split == split) if split is not None else np.arange(len(pairs)))
        if len(index) != score.n_pairs or recorded.memorized.shape[1:] != score.nmd.shape:
            continue
        sides = recorded.take(index)
        found = sides.memorized.mean(0, dtype=np.float64) - sides.generalized.mean(0, dtype=np.float64)
        if np.allclose(found, score.nmd, rtol=1e-3, atol=1e-4 * np.abs(score.nmd).max()):
            return sides, places_of(pairs, index)
    raise SettingsError(
        f"{call}(acts=...)",
        expected=f"the activations that the scores of {score.site!r} were made of ({score.n_pairs} pairs)",
        received=f"others: {len(pairs)} pairs, {(pairs.split == 'select').sum()} of them in select",
        fix="Give each model's own: scores = {name: mg.attribute(acts[name], site) for name in acts}.",
    )

"""Which neurons are steered.

Does not know what is done to them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import largest


def strongest(
    scores: NeuronScores, top_fraction: float, layers: int | Sequence[int] | None, *, call: str
) -> Bool[np.ndarray, "layer neuron"]:
    """The neurons with the largest abs(score) over all layers, as far as they are in some layers.

    Of a causal method's scores the largest above 0 (see `Steering.from_scores`).

    Args:
        scores: Scores of one site.
        top_fraction: Share of the site's neurons, over all its layers, in (0, 1]; one neuron at least.
        layers: These layers alone; None = all.
        call: The call that refuses.

    Raises:
        SettingsError: A layer that the scores do not have.
    """
    n_layers = scores.rho.shape[0]
    chosen = np.arange(n_layers) if layers is None else np.atleast_1d(np.asarray(layers))
    if (chosen >= n_layers).any():
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"layers of the scores, 0 to {n_layers - 1}",
            received=repr(layers),
            fix="Change layers.",
        )
    count = max(1, round(top_fraction * scores.rho.size))
    ranked = np.maximum(scores.score, 0) if scores.method in CAUSAL else scores.score
    selected = largest(ranked.reshape(1, -1), count).reshape(ranked.shape)
    if scores.method in CAUSAL:
        selected &= ranked > 0
    return selected & np.isin(np.arange(n_layers), chosen)[:, None]

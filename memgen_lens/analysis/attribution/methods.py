"""Every way to score neurons behind one call, and what each of them says of recorded activations.

Causal methods are in `causal`. Does not know how activations are recorded.
"""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import rankdata

from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.records import SiteActivations
from memgen_lens.core.types import Causal, Observational

CAUSAL: tuple[Causal, ...] = get_args(Causal)
ON_A_PATH: tuple[Causal, ...] = ("attribution_patching_ig", "integrated_gradients")
"""Those that average gradients over a path."""
EXACT: tuple[Causal, ...] = ("ablation", "patching")
"""Those that run the model once for each neuron."""

Scores = Float[np.ndarray, "layer neuron"]


def observed(
    method: Observational,
    recorded: SiteActivations,
    index: Shaped[np.ndarray, " pair"],
    moments: PairMoments,
) -> Scores:
    """What an observational method says of some pairs' activations.

    Args:
        method: Its name.
        recorded: Activations of one site.
        index: The pairs.
        moments: Moments of these very pairs.
    """
    shape = recorded.memorized.shape[1:]
    if method in FROM_MOMENTS:
        return FROM_MOMENTS[method](moments).reshape(shape)
    by_layer = {"auroc": _auroc, "probe_weights": _probe_weights}[method]
    layers = [by_layer(*(side[index, layer] for side in _sides(recorded))) for layer in range(shape[0])]
    return np.where(moments.constant.reshape(shape), 0.0, np.stack(layers))


def _sides(recorded: SiteActivations) -> tuple[np.ndarray, np.ndarray]:
    return recorded.memorized, recorded.generalized


def _spread(moments: PairMoments) -> Float[np.ndarray, " neuron"]:
    """Square root of the mean of both sides' variances (n - 1), from their common deviation.

    Around the common mean, both sides' squares sum up to those around their own means and ``n * nmd^2 / 2``.
    """
    within = np.square(moments.std) * 2 * moments.n - moments.n * np.square(moments.nmd) / 2
    return np.sqrt(np.maximum(within, 0) / (2 * (moments.n - 1)))


def _cohens_d(moments: PairMoments) -> Float[np.ndarray, " neuron"]:
    return _ratio(moments.nmd, _spread(moments))


def _welch_t(moments: PairMoments) -> Float[np.ndarray, " neuron"]:
    """With as many prompts on each side, ``(s1^2 + s2^2) / n`` is twice the mean variance by n."""
    return _ratio(moments.nmd, _spread(moments) * np.sqrt(2 / moments.n))


def _ratio(of: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Their ratio; where nothing varies inside either side, the difference is infinitely many times as large."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(of == 0, 0.0, of / by)


def _auroc(
    mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]
) -> Float[np.ndarray, " neuron"]:
    n = len(mem)
    ranks = rankdata(np.concatenate([mem, gen]), axis=0)[:n].sum(0)
    return 2 * (ranks - n * (n + 1) / 2) / n**2 - 1


def _probe_weights(
    mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]
) -> Float[np.ndarray, " neuron"]:
    labels = np.repeat([True, False], len(mem))
    probe: Any = fit_probe(np.concatenate([mem, gen]), labels)
    return probe[-1].coef_[0]


FROM_MOMENTS: dict[str, Callable[[PairMoments], Float[np.ndarray, " neuron"]]] = {
    "nmd": lambda moments: moments.nmd,
    "pearson": lambda moments: moments.rho,
    "welch_t": _welch_t,
    "cohens_d": _cohens_d,
}
"""Methods that need no more than running moments, so that no activation is kept."""

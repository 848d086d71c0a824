"""Do separately trained models keep the two behaviours apart in the same layers?

Does not train.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memgen_lens.analysis.comparison.named import named_scores
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import SeedConsistency
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import row_correlation


@arguments(
    "consistency.across_seeds",
    scores=dict[Any, kinds.one(NeuronScores)] | kinds.several(kinds.one(NeuronScores)),
    top_fraction=kinds.OpenShare,
)
def across_seeds(
    scores: Mapping[Any, NeuronScores] | Sequence[NeuronScores], *, top_fraction: float = 0.1
) -> SeedConsistency:
    """Whether separately trained models keep the two behaviours apart in the same layers (intra-task consistency).

    Neurons of separately trained models have no common index: any permutation of a hidden layer is the same model.
    So nothing is compared neuron by neuron, only profiles over layers: the share of the top set in each layer, and
    the largest abs(rho) of each layer; with Pearson correlations of these profiles between all pairs of models. With
    few layers such a correlation says little, and with two it could only be 1 or -1: it is then left out.

    Args:
        scores: Scores of one site, one a model; a mapping from the models' seeds, or a list (numbered from 0).
        top_fraction: Share of the site's neurons in a top set, in (0, 1).

    Raises:
        SettingsError: Fewer than two models, unlike sites or depths, or a fraction out of range.
    """
    named = named_scores(
        scores,
        lambda score: f"{score.site} with {score.rho.shape[0]} layers",
        call="consistency.across_seeds",
        expected="scores of one site and one depth",
        more="Train with another seed: run_experiment(config.but(seed=1), out=...).",
        alike="Compare models of one shape, a site at a time.",
    )
    first = next(iter(named.values()))
    top = np.array([Steering.from_scores(score, top_fraction).selected.sum(1) for score in named.values()], dtype=float)
    share = top / top.sum(1, keepdims=True)
    peak = np.array([np.abs(score.rho).max(1) for score in named.values()], dtype=float)
    why = None if first.rho.shape[0] > 2 else "profiles over fewer than three layers have no correlation worth reading"
    return SeedConsistency(
        site=first.site,
        seeds=tuple(str(seed) for seed in named),
        top_fraction=top_fraction,
        top_share=share,
        max_abs_rho=peak,
        top_share_correlation=_profile_correlation(share, defined=why is None),
        max_abs_rho_correlation=_profile_correlation(peak, defined=why is None),
        why=why,
    )


def _profile_correlation(profiles: np.ndarray, *, defined: bool) -> np.ndarray:
    n = len(profiles)
    a, b = np.repeat(profiles, n, axis=0), np.tile(profiles, (n, 1))
    return row_correlation(a, b).reshape(n, n) if defined else np.full((n, n), np.nan)

"""Do models tuned from one pretrained model keep the two behaviours apart with the same neurons?

Public through `memgen_lens.consistency`. Does not tune.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from memgen_lens.analysis.comparison.exchanged import scores_of_exchanged_labels
from memgen_lens.analysis.comparison.named import named_scores
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import AdapterConsistency
from memgen_lens.core.errors import SettingsError, shortened
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.stats import largest, overlap, row_correlation

Scores = Float[np.ndarray, "layer neuron"]


@arguments(
    "consistency.across_adapters",
    scores=dict[Any, kinds.one(NeuronScores)] | kinds.several(kinds.one(NeuronScores)),
    acts=dict[Any, kinds.one(Activations)] | kinds.several(kinds.one(Activations)) | None,
    top_fraction=kinds.OpenShare,
    n_permutations=kinds.Count,
    seed=kinds.Seed,
)
def across_adapters(
    scores: Mapping[Any, NeuronScores] | Sequence[NeuronScores],
    *,
    acts: Mapping[Any, Activations] | Sequence[Activations] | None = None,
    top_fraction: float = 0.1,
    n_permutations: int = 1000,
    seed: int = 0,
) -> AdapterConsistency:
    """Whether models tuned from one pretrained model find the same neurons (intra- and inter-task consistency).

    Low-rank adapters leave a neuron what it was, and in its place: neurons of all models tuned from one base share an
    index, and sets of them can be compared neuron by neuron. (Models from scratch share none: see `across_seeds`.)
    Between adapters of one task with different seeds that is the paper's intra-task consistency, between adapters of
    two tasks its inter-task consistency (arXiv 2412.18497 v2). Chance levels are ours:

    - Overlap of the two top sets beside what random sets have in common, drawn from all neurons, or as many in each
      layer (`memgen_lens.core.stats.Overlap`); rank correlation of the scores (Spearman), 0 by chance.
    - For both, p = the share of permutations of one model's neuron index that come out as high or higher (one-sided,
      at least ``1 / (n_permutations + 1)``). The index is permuted alike in all layers, as a place of the residual
      stream behaves alike in many: permuted layer by layer, p would be far too small.
    - With ``acts``: the overlap of one model's top set with the other's where the labels of a random half of its items
      are exchanged, the mean of both directions, and as p the share of these with as much overlap or more (at least
      1 in 201). A permuted index says that the *same* neurons come first, not why: those that vary most in the base
      come first in every model, whatever it recalls. Exchanged labels keep that, and take the behaviour away.

    Neurons whose score is 0 in either model are not compared. A preset's seed draws the task's items as well as the
    adapter: models of two seeds differ in both.

    Args:
        scores: Scores of one site, one a model, all tuned from one pretrained model; a mapping from the models' names,
            or a list (numbered from 0). That the base is one cannot be seen from scores:
            runs that `memgen_lens.finetune` wrote say it (``run.base["sha256"]``).
        acts: The activations that these scores were made of, model by model, under the same names or in the same order
            (scores of an observational method).
        top_fraction: Share of the site's neurons in a top set, in (0, 1).
        n_permutations: Permutations behind each p of the index.
        seed: Seed of the permutations.

    Returns:
        Matrices ``[model, model]``; what could not be computed is nan.

    Raises:
        SettingsError: Fewer than two models, unlike sites, methods or shapes, a value out of range, or activations that
            are not those of the scores.
        SiteError: The site is not among the activations.
    """
    named = named_scores(
        scores,
        lambda score: f"{score.site} {score.score.shape} by {score.method}",
        call="consistency.across_adapters",
        expected="scores of one site and method of models tuned from one pretrained model",
        more="Tune the same pretrained model with another seed, or on another task.",
        alike="Compare models of one base, a site at a time.",
    )
    values = [score.score.astype(float) for score in named.values()]
    exchanged = _exchanged(named, acts, seed)
    figures = np.full((10, len(values), len(values)), np.nan)
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            rng = np.random.default_rng((seed, min(i, j), max(i, j)))
            figures[:8, i, j] = _compared(a, b, top_fraction, n_permutations, rng)
            if exchanged and i <= j:
                figures[8:, i, j] = figures[8:, j, i] = _against_exchanged(
                    (a, b), (exchanged[i], exchanged[j]), top_fraction
                )
    return AdapterConsistency(
        next(iter(named.values())).site, tuple(map(str, named)), top_fraction, n_permutations, *figures
    )


def _exchanged(
    named: Mapping[Any, NeuronScores], acts: Mapping[Any, Activations] | Sequence[Activations] | None, seed: int
) -> list[Float[np.ndarray, "draw layer neuron"]]:
    """Scores of exchanged labels, a model each; none where no activations are given."""
    if acts is None:
        return []
    given = dict(acts) if isinstance(acts, Mapping) else dict(enumerate(acts))
    if given.keys() != named.keys():
        raise SettingsError(
            "consistency.across_adapters(acts=...)",
            expected=f"activations of the models that have scores: {shortened([*named])}",
            received=shortened([*given]),
            fix="Give one each, under the same names, or both as lists.",
        )
    return [
        scores_of_exchanged_labels(
            score, given[name], np.random.default_rng((seed, place)), call="consistency.across_adapters"
        )
        for place, (name, score) in enumerate(named.items())
    ]


def _against_exchanged(
    found: tuple[Scores, Scores],
    exchanged: tuple[Float[np.ndarray, "draw layer neuron"], Float[np.ndarray, "draw layer neuron"]],
    top_fraction: float,
) -> tuple[float, float]:
    """Mean overlap of either model's top set with those of the other's exchanged labels; share with as much or more."""
    (a, b), alive = found, (found[0] != 0) & (found[1] != 0)
    if alive.sum() < 2:
        return float("nan"), float("nan")
    count = max(1, round(top_fraction * a.size))

    def shared(one: Scores, other: Scores) -> float:
        first, second = (_top(np.where(alive, values, 0), count) for values in (one, other))
        return float((first & second).sum() / max(1, min(first.sum(), second.sum())))

    drawn = np.array([shared(one, draw) for one, draws in ((a, exchanged[1]), (b, exchanged[0])) for draw in draws])
    return float(drawn.mean()), _p(drawn, shared(a, b))


def _compared(
    a: Scores,
    b: Scores,
    top_fraction: float,
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[float, ...]:
    """Neurons compared; overlap, its two expectations and p; rank correlation, its mean by permutation and p."""
    alive = (a != 0) & (b != 0)
    if alive.sum() < 2:
        return (float(alive.sum()), *[float("nan")] * 7)
    count = max(1, round(top_fraction * a.size))
    first, second = (_top(np.where(alive, values, 0), count) for values in (a, b))
    found = overlap(first, second, among=alive)
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    correlation = _correlation(ranks_a, ranks_b, alive)
    shares, correlations = np.empty(n_permutations), np.empty(n_permutations)
    smaller = min((first & alive).sum(), (second & alive).sum())
    for draw in range(n_permutations):
        order = rng.permutation(a.shape[1])
        shares[draw] = (first & second[:, order]).sum() / smaller
        correlations[draw] = _correlation(ranks_a, ranks_b[:, order], alive & alive[:, order])
    return (
        float(alive.sum()),
        found.share,
        found.expected,
        found.expected_within_layers,
        _p(shares, found.share),
        correlation,
        _mean_of_finite(correlations),
        _p(correlations, correlation),
    )


def _top(score: Scores, count: int) -> Bool[np.ndarray, "layer neuron"]:
    return largest(score.reshape(1, -1), count).reshape(score.shape) & (score != 0)


def _ranks(score: Scores) -> Scores:
    return rankdata(score).reshape(score.shape)


def _correlation(a: Scores, b: Scores, among: Bool[np.ndarray, "layer neuron"]) -> float:
    return float(row_correlation(a[among][None], b[among][None])[0]) if among.sum() > 1 else float("nan")


def _mean_of_finite(values: Float[np.ndarray, " draw"]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _p(drawn: Float[np.ndarray, " draw"], value: float) -> float:
    """One-sided, the value itself among the draws; equal ones within rounding and undefined ones count as reached."""
    if not np.isfinite(value):
        return float("nan")
    return float((1 + (~(drawn < value - 1e-12)).sum()) / (1 + len(drawn)))

"""Intervals, resampling and false discovery rate: thin over scipy and scikit-learn.

Does not know what is counted; `Rate` and `Overlap` are the only records here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, false_discovery_control, hypergeom, norm, t
from sklearn.metrics import roc_auc_score

_BLOCK_ENTRIES = 2**20
"""Weights (resamples x rows) that the bootstrap holds at once: 8 MB an array."""


@dataclass(frozen=True)
class Rate:
    """A share of n cases with its 95 % interval, which counts items as what is independent.

    Attributes:
        k: Cases that count.
        n: Cases in all, at least 1.
        rate: ``k / n`` in [0, 1].
        ci95: Wilson score interval, see `wilson`; both ends in [0, 1].
        n_items: Items that the cases belong to.
    """

    k: int
    n: int
    rate: float
    ci95: tuple[float, float]
    n_items: int

    def __str__(self) -> str:
        items = "" if self.n_items == self.n else f" of {self.n_items} items"
        return f"{self.rate:.3f} [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}] (n={self.n}{items})"


def wilson(hits: Any, items: Any = None) -> Rate:
    """The rate of true values, with a 95 % Wilson score interval over items.

    Where each item has one row this is Wilson's interval (1927; scipy's). Else n is divided by the design effect of
    rows that share an item (Kish 1965): the variance of the rate over whole items, over that of as many independent
    rows. It is estimated with one item of hits and one of misses added, each of the mean size and with rows all alike:
    where all rows agree, or nearly so, the data alone cannot tell how alike the rows of an item are, and what is
    assumed then is that they are. With items of one size whose rows are alike, the interval is Wilson's over items;
    with items of several sizes, it counts no more cases than there are items.

    Args:
        hits: Truth values, one a row, at least one.
        items: The item of each row; default: each row is an item of its own.
    """
    hits = np.asarray(hits, dtype=bool)
    assert hits.size > 0, "a rate needs at least one case"
    k, n = int(hits.sum()), int(hits.size)
    sizes, hits_of = np.ones(n), hits.astype(float)
    if items is not None:
        _, inverse = np.unique(np.asarray(items), return_inverse=True)
        sizes, hits_of = np.bincount(inverse).astype(float), np.bincount(inverse, weights=hits)
    n_items = len(sizes)
    if n_items == n:
        interval = binomtest(k, n).proportion_ci(method="wilson")
        return Rate(k, n, k / n, (float(interval.low), float(interval.high)), n)
    mean_size = n / n_items
    sizes, hits_of = np.append(sizes, [mean_size] * 2), np.append(hits_of, [mean_size, 0.0])
    share = hits_of.sum() / sizes.sum()
    effect = np.square(hits_of - share * sizes).sum() / (sizes.sum() * share * (1 - share))
    counted = n / max(float(effect), 1.0)
    if np.isin(hits_of / sizes, (0, 1)).all():  # items of unlike sizes whose rows are alike: one case each at most
        counted = min(counted, float(n_items))
    return Rate(k, n, k / n, _wilson_ends(k / n, counted), n_items)


def _wilson_ends(rate: float, n: float) -> tuple[float, float]:
    """Wilson's interval for a number of cases that need not be whole."""
    z = float(norm.ppf(0.975))
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # Rounding must not leave the rate itself outside: at 0 and 1 an end is the rate.
    return max(0.0, min(float(middle - half), rate)), min(1.0, max(float(middle + half), rate))


def paired_loss(before: Any, after: Any, items: Any = None) -> dict[str, Any]:
    """How much smaller a rate is after something was done to the same cases, with a 95 % interval.

    Newcombe's interval for paired differences (1998, method 10): Wilson's intervals of both rates, joined by the
    correlation of the cases. Unlike a bootstrap, it has a width where no case changes. Departure: the two intervals
    count items (`wilson`).

    Args:
        before: Truth values, one a row, at least one.
        after: Truth values of the same rows.
        items: The item of each row; default: each row is an item of its own.

    Returns:
        ``{"loss", "ci95", "n", "n_items"}``; the loss is the rate before minus the rate after, in [-1, 1].
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    first, second = wilson(before, items), wilson(after, items)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    dropped, gained = int((before & ~after).sum()), int((~before & after).sum())
    margins = (both + dropped) * (gained + neither) * (both + gained) * (dropped + neither)
    product = both * neither - dropped * gained
    product = max(product - first.n / 2, 0.0) if product > 0 else float(product)
    phi = product / np.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0.0)))

    loss = first.rate - second.rate
    low = loss - reach(first.rate - first.ci95[0], second.ci95[1] - second.rate)
    high = loss + reach(first.ci95[1] - first.rate, second.rate - second.ci95[0])
    ends = [max(low, -1.0), min(high, 1.0)]
    return {"loss": loss, "ci95": ends, "n": first.n, "n_items": first.n_items}


def mean_of_draws(values: Any) -> dict[str, Any]:
    """Mean of a control's draws and the 2.5 and 97.5 percentiles between which its draws lie."""
    values = np.asarray(values, dtype=float)
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "ci95": [float(low), float(high)], "n_draws": int(values.size)}


def mean_over_seeds(
    values: Float[np.ndarray, " seed"], bounds: tuple[float, float]
) -> tuple[float, tuple[float, float] | None]:
    """Mean of one number a seed, with Student's 95 % interval.

    There is none (None) for a single seed, nor where all are the same: then their spread tells nothing of others.

    Args:
        values: One number a seed, at least one.
        bounds: What the number can be; the interval is cut to it.
    """
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return mean, None
    half = float(t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean, (max(bounds[0], mean - half), min(bounds[1], mean + half))


def fdr(p: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Benjamini-Hochberg adjusted p-values over all entries of ``p`` (scipy's), in [0, 1]."""
    return np.asarray(false_discovery_control(p.ravel())).reshape(p.shape)


def auroc(labels: Bool[np.ndarray, " n"], decision: Float[np.ndarray, " n"]) -> float:
    """Area under the ROC curve in [0, 1]; 0.5 is chance. Both classes must occur."""
    return float(roc_auc_score(labels, decision))


def bootstrap_auroc_and_accuracy(
    labels: Bool[np.ndarray, " n"],
    decision: Float[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    *,
    n_resamples: int = 1000,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of AUROC and accuracy, whole groups resampled.

    Time grows with the rows and their sorting, memory with neither rows nor resamples beyond the rows themselves.

    Args:
        labels: True for memorization.
        decision: Classifier margins; above 0 predicts memorization.
        groups: Item of each row; rows of one item stay together.
        n_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        ``{"auroc": (low, high), "accuracy": (low, high)}``, each in [0, 1].
    """
    rng = np.random.default_rng(seed)
    _, inverse = np.unique(groups, return_inverse=True)
    n_groups = int(inverse.max()) + 1
    order = np.argsort(decision)
    labels, decision, inverse = labels[order], decision[order], inverse[order]
    first_of_value = np.flatnonzero(np.diff(decision, prepend=-np.inf))  # ties are one step of the curve
    areas, shares = [], []
    at_once = max(1, _BLOCK_ENTRIES // len(labels))
    for first in range(0, n_resamples, at_once):
        # Resampling groups = giving each row its group's multiplicity as a weight; AUROC from sorted weights.
        n_drawn = min(at_once, n_resamples - first)
        counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_drawn)
        weights = counts[:, inverse].astype(float)  # [resample, row]
        shares.append(weights @ ((decision > 0) == labels) / np.maximum(weights.sum(1), 1))
        positive = np.add.reduceat(weights * labels, first_of_value, axis=1)  # [resample, value]
        negative = np.add.reduceat(weights * ~labels, first_of_value, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        couples = positive.sum(1) * negative.sum(1)
        areas.append((positive * (below + negative / 2)).sum(1)[couples > 0] / couples[couples > 0])
    return {"auroc": _interval(np.concatenate(areas)), "accuracy": _interval(np.concatenate(shares))}


def bootstrap_mean(
    values: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"], *, n_resamples: int = 1000, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over rows, whole groups resampled.

    Args:
        values: One number a row, at least one.
        groups: Item of each row; rows of one item stay together.
        n_resamples: Bootstrap resamples.
        seed: Seed of the resamples.
    """
    rng = np.random.default_rng(seed)
    _, inverse = np.unique(groups, return_inverse=True)
    sizes, sums = np.bincount(inverse), np.bincount(inverse, weights=values)
    n_groups = len(sizes)
    means = []
    at_once = max(1, _BLOCK_ENTRIES // n_groups)
    for first in range(0, n_resamples, at_once):
        n_drawn = min(at_once, n_resamples - first)
        counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_drawn)  # [resample, group]
        means.append(counts @ sums / (counts @ sizes))
    return _interval(np.concatenate(means))


def _interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_ratio(
    numerator: Float[np.ndarray, "row cell column"],
    denominator: Float[np.ndarray, "row column"],
    groups: Int[np.ndarray, " row"],
    *,
    n_resamples: int = 1000,
    seed: int,
) -> tuple[Float[np.ndarray, "cell column"], Float[np.ndarray, "cell column"], Float[np.ndarray, "cell column"]]:
    """Ratios of sums over rows, with 95 % percentile bootstrap intervals, whole groups resampled.

    Args:
        numerator: What is summed up for each cell; 0 in rows that a column does not count.
        denominator: What it is compared with; likewise.
        groups: Item of each row; rows of one item stay together.
        n_resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The ratio and both ends of its interval; NaN where the denominator is not above 0. Resamples in which it is 0
        (no row that the column counts) are passed over.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    n_groups, (_, n_cells, n_columns) = int(inverse.max()) + 1, numerator.shape
    above, below = np.zeros((n_groups, n_cells * n_columns)), np.zeros((n_groups, n_columns))
    np.add.at(above, inverse, numerator.reshape(len(numerator), -1))
    np.add.at(below, inverse, denominator)
    counts = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    counts = np.concatenate([np.ones((1, n_groups)), counts])  # the first is what was seen
    ratios = np.full((n_resamples + 1, n_cells, n_columns), np.nan)
    by = (counts @ below)[:, None]
    np.divide((counts @ above).reshape(ratios.shape), by, out=ratios, where=by != 0)
    ratios[:, :, by[0, 0] <= 0] = np.nan
    low, high = np.full((2, n_cells, n_columns), np.nan)
    known = by[0, 0] > 0
    low[:, known], high[:, known] = np.nanquantile(ratios[1:, :, known], [0.025, 0.975], axis=0)
    return ratios[0], low, high


@dataclass(frozen=True)
class Overlap:
    """How much two sets of neurons share, beside what two random sets of their sizes would.

    Attributes:
        n: Neurons to choose from.
        shared: Neurons in both sets.
        share: ``shared`` / the smaller set's size, in [0, 1].
        expected: Mean of ``share`` over sets of these sizes drawn from all neurons: ``size_a * size_b / n`` shared.
        p: Probability of sharing at least as many then (hypergeometric), in [0, 1].
        expected_within_layers: Mean of ``share`` over sets drawn anew inside each layer, as many of each as they have.
            Where both sets crowd into one layer, they share more than ``expected`` for that reason alone.
        p_within_layers: Probability of sharing at least as many then (a sum of independent hypergeometrics).
    """

    n: int
    shared: int
    share: float
    expected: float
    p: float
    expected_within_layers: float
    p_within_layers: float


def overlap(
    a: Bool[np.ndarray, "layer neuron"],
    b: Bool[np.ndarray, "layer neuron"],
    *,
    among: Bool[np.ndarray, "layer neuron"] | None = None,
) -> Overlap:
    """The overlap of two sets of neurons, each at least one neuron large.

    Args:
        a: One set.
        b: The other.
        among: Neurons that could be chosen at all; default: all of them.
    """
    among = np.ones_like(a) if among is None else among
    a, b = a & among, b & among
    n, smaller, shared = int(among.sum()), int(min(a.sum(), b.sum())), int((a & b).sum())
    assert smaller > 0, "an overlap needs two sets"
    layers = list(zip(among.sum(1).tolist(), a.sum(1).tolist(), b.sum(1).tolist(), strict=True))
    of_sum = np.ones(1)
    for size, in_a, in_b in layers:
        of_sum = np.convolve(of_sum, hypergeom.pmf(np.arange(min(in_a, in_b) + 1), size, in_a, in_b))
    return Overlap(
        n=n,
        shared=shared,
        share=shared / smaller,
        expected=float(a.sum()) * float(b.sum()) / n / smaller,
        p=float(hypergeom.sf(shared - 1, n, a.sum(), b.sum())),
        expected_within_layers=sum(in_a * in_b / max(size, 1) for size, in_a, in_b in layers) / smaller,
        p_within_layers=float(min(of_sum[shared:].sum(), 1.0)),
    )


def row_correlation(
    a: Float[np.ndarray, "row column"], b: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, " row"]:
    """Pearson correlation of each row of ``a`` with that of ``b``, in [-1, 1]; NaN where either is constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return np.where(scale > 0, (a * b).sum(1) / np.where(scale > 0, scale, 1), np.nan)


def largest(values: Float[np.ndarray, "row column"], count: int) -> Bool[np.ndarray, "row column"]:
    """The ``count`` entries of each row with the largest absolute value; of equal ones the first."""
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-np.abs(values), axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen

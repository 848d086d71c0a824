"""Intervals, resampling and false discovery rate: thin over scipy and scikit-learn.

Does not know what is counted; `Rate` is the only record here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, false_discovery_control
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Rate:
    """A share of n cases with its 95 % Wilson interval.

    Attributes:
        k: Cases that count.
        n: Cases in all, at least 1.
        rate: ``k / n`` in [0, 1].
        ci95: Wilson score interval (Wilson 1927), both ends in [0, 1].
    """

    k: int
    n: int
    rate: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}] (n={self.n})"


def wilson(hits: Any) -> Rate:
    """The rate of true values among ``hits`` (any sequence of truth values, at least one)."""
    hits = np.asarray(hits, dtype=bool)
    assert hits.size > 0, "a rate needs at least one case"
    k, n = int(hits.sum()), int(hits.size)
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return Rate(k, n, k / n, (float(interval.low), float(interval.high)))


def mean_of_draws(values: Any) -> dict[str, Any]:
    """Mean of a control's draws and the 2.5 and 97.5 percentiles between which its draws lie."""
    values = np.asarray(values, dtype=float)
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "ci95": [float(low), float(high)], "n_draws": int(values.size)}


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
    # Resampling groups = giving each row its group's multiplicity as a weight; AUROC from sorted weights.
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    weights = counts[:, inverse].astype(float)
    correct = weights @ ((decision > 0) == labels) / np.maximum(weights.sum(1), 1)
    values, position = np.unique(decision, return_inverse=True)
    onehot = np.zeros((len(decision), len(values)))
    onehot[np.arange(len(decision)), position] = 1
    positive, negative = (weights * labels) @ onehot, (weights * ~labels) @ onehot
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    area = (positive * (below + negative / 2)).sum(1)[pairs > 0] / pairs[pairs > 0]
    return {"auroc": _interval(area), "accuracy": _interval(correct)}


def _interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)

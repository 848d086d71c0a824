"""Observational scores of a layer's neurons by scipy and scikit-learn, one neuron after another."""

import numpy as np
from scipy.stats import pearsonr, ttest_ind
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

OBSERVATIONAL = ("nmd", "pearson", "welch_t", "cohens_d", "auroc", "probe_weights")


def score_by_library(method, mem, gen):
    """Scores of neurons ``[pair, neuron]``; 0 for a constant one."""
    if method == "probe_weights":
        scaled = StandardScaler().fit_transform(np.concatenate([mem, gen]))
        labels = np.repeat([1, 0], len(mem))
        return LogisticRegression(max_iter=2000).fit(scaled, labels).coef_[0]
    return np.array([_of_one(method, *sides) for sides in zip(mem.T, gen.T, strict=True)])


def _of_one(method, a, b):
    both, labels = np.concatenate([a, b]), np.repeat([1, 0], len(a))
    if np.ptp(both) == 0:
        return 0.0
    if method == "nmd":
        return a.mean() - b.mean()
    if method == "pearson":
        return pearsonr(both, labels).statistic
    if method == "welch_t":
        return ttest_ind(a, b, equal_var=False).statistic
    if method == "cohens_d":
        return (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return 2 * roc_auc_score(labels, both) - 1

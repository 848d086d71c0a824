"""Learn, from the activation that a row has, what to add to it: a shift for each cluster of rows, or a low-rank map.

Does not know what the rows are, nor which of them are learnt from (see `rules`).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

N_STARTS: Any = 4
"""Starts of k-means, of which the best is kept."""
RIDGES = 10.0 ** np.arange(-5, 3)
"""Ridge strengths that are tried, in multiples of the largest squared singular value of the standardized activations;
under the largest of them next to nothing is left but the mean change: one shift for all."""
ROUNDING = 1e-5
"""Neurons that vary by less than this share of the layer's largest activation are not looked at: it is rounding."""


@dataclass(frozen=True)
class RowRule:
    """What is added to a row of one layer towards one behaviour, given the activation ``h`` that it has.

    ``code = (h - center) @ read + bias``; where ``nearest``, the largest entry of the code becomes 1 and all others 0;
    ``code @ write + offset`` is what is added. Both kinds of rule have this form, so that many ride in one batch.

    Attributes:
        center: Mean activation of the rows it was fitted on.
        read: Of clusters, the standardized centroids; of a low-rank map, what it looks at.
        bias: Of clusters, minus half the squared length of each centroid, which makes the largest entry the nearest.
        write: Of clusters, the mean change of each; of a low-rank map, what each coordinate of the code adds.
        offset: What is added whatever the code.
        nearest: Whether the code picks one row of ``write``.
    """

    center: Float[np.ndarray, " neuron"]
    read: Float[np.ndarray, "neuron code"]
    bias: Float[np.ndarray, " code"]
    write: Float[np.ndarray, "code neuron"]
    offset: Float[np.ndarray, " neuron"]
    nearest: bool

    def __call__(self, h: Float[np.ndarray, "row neuron"]) -> Float[np.ndarray, "row neuron"]:
        """What is added to each row."""
        code = (h - self.center) @ self.read + self.bias
        return (self.write[code.argmax(1)] if self.nearest else code @ self.write) + self.offset


class Clusters:
    """k-means on standardized activations; a row is added the mean change of the cluster whose centroid is nearest.

    With one cluster this is the mean change of all rows: one shift. Rows that are all alike make fewer clusters. A row
    as near to two centroids as rounding can tell may go to either.

    Args:
        own: Activations of the side that is steered.
        n_clusters: Clusters.
        seed: Seed of k-means.
    """

    def __init__(self, own: Float[np.ndarray, "row neuron"], n_clusters: int, seed: int) -> None:
        self._center, self._weight = own.mean(0), weights(own, np.abs(own).max())
        standardized = (own - self._center) * self._weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
            means: Any = KMeans(min(n_clusters, len(own)), n_init=N_STARTS, random_state=seed).fit(standardized)
        found, self._label = np.unique(means.labels_, return_inverse=True)
        self._centroids = means.cluster_centers_[found]

    def rule(self, change: Float[np.ndarray, "row neuron"]) -> RowRule:
        """The rule, given the change of each row that it is to learn."""
        members = np.eye(len(self._centroids))[self._label]  # [row, cluster]
        return RowRule(
            center=self._center,
            read=self._weight[:, None] * self._centroids.T,
            bias=-np.square(self._centroids).sum(1) / 2,
            write=members.T @ change / members.sum(0)[:, None],
            offset=np.zeros_like(self._center),
            nearest=True,
        )


class LowRank:
    """Reduced-rank ridge regression of the change on the standardized activation (Mukherjee and Zhu 2011).

    ``delta - mean = (h - center) W B`` with ``B = argmin |D - X B|^2 + ridge |B|^2`` among the maps of at most that
    rank, where ``X`` are the activations in standard deviations and ``D`` the changes in theirs: every neuron counts
    alike. With ``X = U S V'``, the ridge fit is projected onto the leading right singular vectors of
    ``S (S^2 + ridge)^(-1/2) U' D``.

    Args:
        own: Activations of the side that is steered.
        rank: Largest rank of the map.
    """

    def __init__(self, own: Float[np.ndarray, "row neuron"], rank: int) -> None:
        self._rank, self._largest = rank, np.abs(own).max()
        self._center, self._weight = own.mean(0), weights(own, self._largest)
        left, values, right = np.linalg.svd((own - self._center) * self._weight, full_matrices=False)
        kept = values > 1e-8 * max(values[0], 1e-300)
        self._left, self._values, self._right = left[:, kept], values[kept], right[kept]

    def rule(self, change: Float[np.ndarray, "row neuron"], ridge: float) -> RowRule:
        """The rule, given the change of each row that it is to learn; ``ridge`` is one of `RIDGES`."""
        mean, weight = change.mean(0), weights(change, self._largest)
        target = self._left.T @ ((change - mean) * weight)  # [component, neuron]
        squares = np.square(self._values)
        smoothed = squares + ridge * (squares[0] if len(squares) else 1.0)
        shrunk = (self._values / np.sqrt(smoothed))[:, None] * target
        axes = _leading(shrunk, self._rank)  # [code, neuron]
        read = self._right.T @ ((self._values / smoothed)[:, None] * target @ axes.T)
        spread = np.divide(1.0, weight, out=np.zeros_like(weight), where=weight > 0)
        return RowRule(
            center=self._center,
            read=self._weight[:, None] * read,
            bias=np.zeros(len(axes)),
            write=axes * spread,
            offset=mean,
            nearest=False,
        )


def weights(values: Float[np.ndarray, "row neuron"], largest: Any) -> Float[np.ndarray, " neuron"]:
    """One over each neuron's standard deviation; 0 where that is no more than rounding beside the largest value."""
    spread = values.std(0)
    return np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > ROUNDING * largest)


def _leading(matrix: Float[np.ndarray, "row column"], n: int) -> Float[np.ndarray, "axis column"]:
    """The first ``n`` right singular vectors, from the smaller of the two matrices of products."""
    wide = matrix.shape[0] < matrix.shape[1]
    squares, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    kept = np.flatnonzero(squares > 1e-14 * max(squares[-1:].sum(), 1e-300))[::-1][:n]
    return (vectors[:, kept] / np.sqrt(squares[kept])).T @ matrix if wide else vectors[:, kept].T

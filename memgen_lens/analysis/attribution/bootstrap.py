"""Intervals of scores: the items drawn anew, with replacement, all pairs of one together.

Does not know how a score is made of the pairs that were drawn: see `resampled`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memgen_lens.analysis.attribution.merged import merge_sums
from memgen_lens.analysis.attribution.resampled import WeightedSums, Weighting, reweighted
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import SiteActivations
from memgen_lens.core.types import Observational

MINIMUM = 100
"""Fewer resamples leave the ends of an interval to two of them or less."""
ITEMS_A_CHUNK = 1024
"""Items that are drawn together: how often one is drawn depends on its place and the seed, on no block size."""
_TOTALS, _ITEMS = 1, 2
"""What part random streams of one seed (and those of the sign flips)."""


class ItemCounts:
    """How often each resample draws each item: as many draws as there are items (multinomial), chunk by chunk.

    Args:
        n_items: Items, at least one.
        n_resamples: Resamples.
        seed: Seed of the draws.
    """

    def __init__(self, n_items: int, n_resamples: int, *, seed: int) -> None:
        self.seed = seed
        self.ends = np.append(np.arange(0, n_items, ITEMS_A_CHUNK), n_items)
        sizes = np.diff(self.ends)
        # First how many draws go into each chunk, then which of its items they are.
        self._totals = np.random.default_rng([seed, 0, _TOTALS]).multinomial(n_items, sizes / n_items, size=n_resamples)
        self._number, self._last = -1, np.empty((n_resamples, 0))

    def __call__(self, first: int, stop: int) -> Float[np.ndarray, "resample item"]:
        """Counts of the items from one place to another."""
        numbers = range(first // ITEMS_A_CHUNK, -(-stop // ITEMS_A_CHUNK))
        parts = [self._chunk(n)[:, max(0, first - self.ends[n]) : stop - self.ends[n]] for n in numbers]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _chunk(self, number: int) -> Float[np.ndarray, "resample item"]:
        if number != self._number:
            size = int(self.ends[number + 1] - self.ends[number])
            rng = np.random.default_rng([self.seed, number, _ITEMS])
            drawn = rng.multinomial(self._totals[:, number], np.full(size, 1 / size))
            self._number, self._last = number, drawn.astype(np.float64)
        return self._last


class Bootstrap:
    """Intervals of what is summed up in one pass over the pairs; see `resampled.WeightedSums`.

    Args:
        n_resamples: Resamples; 0 = none, and no interval.
        n_items: Items behind all the pairs.
        seed: Seed of the draws.
        method: ``"nmd"`` (or the mean of any effects), ``"pearson"``, ``"cohens_d"`` or ``"welch_t"``.
    """

    def __init__(self, n_resamples: int, n_items: int, *, seed: int, method: str) -> None:
        self.method = method
        self._sums: Any = None
        if n_resamples:
            weighting = Weighting(n_resamples, ItemCounts(n_items, n_resamples, seed=seed))
            self._sums = WeightedSums(weighting, means_alone=method == "nmd")

    def add(self, mem: np.ndarray, gen: np.ndarray | None, items: Int[np.ndarray, " pair"]) -> None:
        """Sum up the next pairs, whose items are told by their places among all."""
        if self._sums is not None:
            self._sums.add(mem, gen, items)

    def merge(self, call: str, width: int) -> None:
        """Sum up what the processes of the run have, in all of them; see `merged`."""
        if self._sums is not None:
            merge_sums(call, self._sums, width)

    def ci95(
        self, constant: Bool[np.ndarray, " entry"], shape: tuple[int, ...]
    ) -> Float[np.ndarray, "2 layer neuron"] | None:
        """Both ends of each neuron's interval, 0 where it is constant; None without resamples."""
        if self._sums is None:
            return None
        return np.where(constant, 0.0, percentiles(self._sums.scores(self.method))).reshape(2, *shape)


def observed_ci95(
    method: Observational,
    recorded: SiteActivations,
    index: Int[np.ndarray, " pair"],
    items: Int[np.ndarray, " pair"],
    constant: Bool[np.ndarray, " entry"],
    n_resamples: int,
    *,
    seed: int,
    fitted: Callable[[int], Any],
) -> Float[np.ndarray, "2 layer neuron"]:
    """Intervals of what an observational method says of some pairs' activations.

    Args:
        method: Its name.
        recorded: Activations of one site.
        index: The pairs, those of one item one after another.
        items: Place of each one's item among all.
        constant: Neurons with one value throughout, which score 0.
        n_resamples: Resamples.
        seed: Seed of the draws.
        fitted: Told of each fit of a probe.
    """
    mem, gen = recorded.memorized[index], recorded.generalized[index]
    weighting = Weighting(n_resamples, ItemCounts(int(items[-1]) + 1, n_resamples, seed=seed))
    ends = np.empty((2, mem[0].size))
    for at, scores in reweighted(method, mem, gen, items, weighting, fitted=fitted):
        ends[:, at] = percentiles(scores)
    return np.where(constant, 0.0, ends).reshape(2, *mem.shape[1:])


def percentiles(values: Float[np.ndarray, "resample neuron"]) -> Float[np.ndarray, "2 neuron"]:
    """The k-th smallest and the k-th largest value, ``k = floor(0.025 * (resamples + 1))``.

    Efron and Tibshirani 1993, sec. 12.5 and 13.3; without interpolation, as an effect size may be infinite.
    """
    k = int(0.025 * (len(values) + 1))
    parted = np.partition(values, [k - 1, len(values) - k], axis=0)
    return parted[[k - 1, len(values) - k]]


def require_resamples(call: str, n_resamples: int) -> None:
    """Refuse so few resamples that an interval hangs on one of them."""
    if n_resamples and n_resamples < MINIMUM:
        raise SettingsError(
            call,
            expected=f"n_resamples of at least {MINIMUM}, or 0 for no intervals",
            received=str(n_resamples),
            fix="Take 1000: fewer leave the ends of an interval to chance.",
        )

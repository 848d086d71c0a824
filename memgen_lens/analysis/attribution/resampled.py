"""Scores of every neuron over many weightings of the same pairs: halves, resamples, swapped labels.

Does not know which of these it is, nor what becomes of the scores. Weights belong to items: all pairs of one count
alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.types import Observational

Weights = Callable[[int, int], Float[np.ndarray, "draw item"]]
"""What gives the weights of the items from one place to another."""
NEURONS_AT_ONCE = PAIRS_AT_ONCE = 1024
SUMS_AT_ONCE = 2**20
"""Neurons times weightings whose sums are kept together: 8 MB an array, which stays in the cache."""
RANKS_AT_ONCE = 2**20
"""Neurons times pairs times weightings whose ranks are summed up together, which stay near the processor's cache."""


@dataclass(frozen=True)
class Weighting:
    """How much each item counts, and for which label, in each of many draws.

    Attributes:
        n_draws: How many.
        weights: How often each item counts: whole numbers of at least 0, not all 0.
        signs: -1 swaps the two labels of an item; None = none is swapped.
    """

    n_draws: int
    weights: Weights
    signs: Weights | None = None

    @classmethod
    def of(cls, weights: Float[np.ndarray, "draw item"], signs: Float[np.ndarray, "draw item"] | None = None) -> Any:
        """Weights that are all there."""
        signed = None if signs is None else (lambda first, stop: signs[:, first:stop])
        return cls(len(weights), lambda first, stop: weights[:, first:stop], signed)

    def signed(self, first: int, stop: int) -> Float[np.ndarray, "draw item"]:
        """Weights, negative where labels are swapped."""
        weights = self.weights(first, stop)
        return weights if self.signs is None else weights * self.signs(first, stop)


class WeightedSums:
    """Running sums over pairs under each weighting, of which means, correlations and effect sizes are made.

    Memory does not grow with the pairs: 8 bytes a neuron and draw for means, 24 for the others. Activations are
    centred on the first pairs' mean, so that their squares lose no digits.

    Args:
        weighting: The draws.
        means_alone: Whether means of differences are all that is asked for.
    """

    def __init__(self, weighting: Weighting, *, means_alone: bool) -> None:
        self.weighting, self.means_alone = weighting, means_alone
        self._center: Any = None

    def add(
        self,
        mem: Float[np.ndarray, "pair *neuron"],
        gen: Float[np.ndarray, "pair *neuron"] | None,
        items: Int[np.ndarray, " pair"],
    ) -> None:
        """Sum up the next pairs.

        Args:
            mem: Activations on the recalling side, or differences.
            gen: On the computing side; None = nothing is taken off.
            items: Place of each pair's item among all, never falling.
        """
        mem = mem.reshape(len(mem), -1)
        gen = None if gen is None else gen.reshape(len(gen), -1)
        if self._center is None:
            center = np.zeros(mem.shape[1])
            if not self.means_alone:
                assert gen is not None
                center = (mem.mean(0, dtype=np.float64) + gen.mean(0, dtype=np.float64)) / 2
            self.begin(center)
        assert self._center is not None
        starts = np.flatnonzero(np.diff(items, prepend=-1))
        first, stop = int(items[0]), int(items[-1]) + 1
        weights = self.weighting.weights(first, stop)[:, items[starts] - first]
        signed = self.weighting.signed(first, stop)[:, items[starts] - first]
        self._n += (weights @ np.diff(starts, append=len(items)))[:, None]
        for some in range(0, mem.shape[1], NEURONS_AT_ONCE):
            at = slice(some, some + NEURONS_AT_ONCE)
            m = mem[:, at] - self._center[at]
            g = 0.0 if gen is None else gen[:, at] - self._center[at]
            self._difference[:, at] += signed @ np.add.reduceat(m - g, starts, axis=0)
            if not self.means_alone:
                self._total[:, at] += weights @ np.add.reduceat(m + g, starts, axis=0)
                self._square[:, at] += weights @ np.add.reduceat(np.square(m) + np.square(g), starts, axis=0)

    def begin(self, center: Float[np.ndarray, " neuron"]) -> None:
        """Make room for as many neurons, centred there; `add` does it by itself."""
        shape = (self.weighting.n_draws, len(center))
        self._center, self._n, self._difference = center, np.zeros((shape[0], 1)), np.zeros(shape)
        if not self.means_alone:
            self._total, self._square = np.zeros(shape), np.zeros(shape)

    @property
    def center(self) -> Float[np.ndarray, " neuron"] | None:
        """Where activations are centred; None as long as there are none."""
        return self._center

    @property
    def sums(self) -> list[np.ndarray]:
        """All that is summed up."""
        return [self._n, self._difference, *([] if self.means_alone else [self._total, self._square])]

    def center_at(self, center: Float[np.ndarray, " neuron"]) -> None:
        """Centre activations elsewhere: what was summed up is moved there."""
        if not self.means_alone:
            moved = self._center - center
            self._square += 2 * moved * self._total + 2 * self._n * np.square(moved)
            self._total += 2 * self._n * moved
        self._center = center

    def scores(self, method: str) -> Float[np.ndarray, "draw neuron"]:
        """What `methods.observed` says of the pairs that count; ``"nmd"`` is the mean of differences.

        0 for a neuron that is constant over these pairs.
        """
        nmd = self._difference / self._n
        if method == "nmd":
            return nmd
        both = 2 * self._n
        variance = self._square / both - np.square(self._total / both)
        constant = variance <= 1e-12 * self._square / both
        if method == "pearson":
            return np.where(constant, 0, nmd / 2 / np.sqrt(np.where(constant, 1, variance)))
        # Both sides' squares around the common mean are those around their own means and n * nmd^2 / 2.
        within = both * variance - self._n * np.square(nmd) / 2
        spread = np.sqrt(np.where(within <= 1e-12 * self._square, 0, within) / (both - 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = np.where(constant | (nmd == 0), 0, nmd / spread)
            return effect if method == "cohens_d" else effect * np.sqrt(self._n / 2)


def weighted_rho(
    mem: Float[np.ndarray, "pair neuron"],
    gen: Float[np.ndarray, "pair neuron"],
    items: Int[np.ndarray, " pair"],
    weights: Float[np.ndarray, "draw item"],
    signs: Float[np.ndarray, "draw item"] | None = None,
) -> Float[np.ndarray, "draw neuron"]:
    """Correlation with the label for each row of weights, as `attribution.streaming.correlation` has it.

    Args:
        mem: Activations on the recalling side.
        gen: On the computing side.
        items: Place of each pair's item among all, in any order.
        weights: How often each item counts, at least 0, not all 0.
        signs: -1 swaps the two labels of an item; default: none is swapped.

    Returns:
        rho in [-1, 1]; 0 for a neuron that is constant over the pairs that count.
    """
    order = np.argsort(items, kind="stable")
    sums = WeightedSums(Weighting.of(weights, signs), means_alone=False)
    sums.add(mem[order], gen[order], items[order])
    return sums.scores("pearson")


def reweighted(
    method: Observational,
    mem: Float[np.ndarray, "pair layer neuron"],
    gen: Float[np.ndarray, "pair layer neuron"],
    items: Int[np.ndarray, " pair"],
    weighting: Weighting,
    *,
    fitted: Callable[[int], Any] = lambda n: None,
) -> Iterator[tuple[slice, Float[np.ndarray, "draw neuron"]]]:
    """An observational method's scores under each weighting, some neurons of the flattened site after others.

    Args:
        method: Its name.
        mem: Activations on the recalling side.
        gen: On the computing side.
        items: Place of each pair's item among all, never falling.
        weighting: The draws.
        fitted: Told of each fit of a probe.
    """
    width = mem.shape[2]
    if method == "probe_weights":
        for layer in range(mem.shape[1]):
            sides = mem[:, layer], gen[:, layer]
            yield slice(layer * width, (layer + 1) * width), _probes(*sides, items, weighting, fitted)
        return
    mem, gen = mem.reshape(len(mem), -1), gen.reshape(len(gen), -1)
    step = max(1, SUMS_AT_ONCE // weighting.n_draws)
    for first in range(0, mem.shape[1], step):
        at = slice(first, min(first + step, mem.shape[1]))
        if method == "auroc":
            yield at, _auroc(mem[:, at], gen[:, at], items, weighting)
            continue
        sums = WeightedSums(weighting, means_alone=method == "nmd")
        for row in range(0, len(mem), PAIRS_AT_ONCE):
            rows = slice(row, row + PAIRS_AT_ONCE)
            sums.add(mem[rows, at], gen[rows, at], items[rows])
        yield at, sums.scores(method)


def _by_row(weighting: Weighting, items: Int[np.ndarray, " pair"]) -> tuple[np.ndarray, np.ndarray]:
    """How much both prompts of each pair count for memorization, and for generalization: ``[draw, 2 * pair]``."""
    weights = weighting.weights(0, int(items[-1]) + 1)[:, items]
    kept = np.ones_like(weights)
    if weighting.signs is not None:
        kept = (weighting.signs(0, int(items[-1]) + 1)[:, items] > 0).astype(np.float64)
    memorized = np.concatenate([weights * kept, weights * (1 - kept)], axis=1)
    return memorized, np.concatenate([weights * (1 - kept), weights * kept], axis=1)


def _auroc(
    mem: Float[np.ndarray, "pair neuron"],
    gen: Float[np.ndarray, "pair neuron"],
    items: Int[np.ndarray, " pair"],
    weighting: Weighting,
) -> Float[np.ndarray, "draw neuron"]:
    """Somers' D: each row that counts for memorization is told how much weight of the others lies below it."""
    if weighting.signs is None:
        ups, downs = mem, gen
        for_mem = for_gen = weighting.weights(0, int(items[-1]) + 1)[:, items]
    else:
        ups = downs = np.concatenate([mem, gen])
        for_mem, for_gen = _by_row(weighting, items)
    total = for_mem.sum(1) * for_gen.sum(1)
    dtype = np.float32 if 2 * total.max() < 2**24 else np.float64  # sums of halves are exact in either
    w_up, w_down = (np.ascontiguousarray(weights.T, dtype=dtype) for weights in (for_mem, for_gen))  # [row, draw]
    up, down = (torch.from_numpy(np.ascontiguousarray(values.T)) for values in (ups, downs))  # [neuron, row]
    down, order = down.sort(dim=1)
    left, right = (torch.searchsorted(down, up, right=side).numpy() for side in (False, True))
    n_draws, n_up, n_down = weighting.n_draws, len(w_up), len(w_down)
    step = min(len(up), max(1, RANKS_AT_ONCE // (n_draws * max(n_up, n_down))))
    found = np.empty((n_draws, len(up)))
    # Room that is used again: to ask for it anew takes longer than all that is done in it.
    below, told, ties = (np.zeros((n, step, n_draws), dtype=dtype) for n in (n_down + 1, n_up, n_up))
    for first in range(0, len(up), step):
        at = slice(first, first + step)
        n = len(order[at])
        if n < step:
            below, told, ties = (np.zeros((len(whole), n, n_draws), dtype=dtype) for whole in (below, told, ties))
        np.take(w_down, order[at].numpy().T, axis=0, out=below[1:], mode="clip")
        for place in range(n_down):  # over the sorted rows, all neurons and draws at once
            np.add(below[place], below[place + 1], out=below[place + 1])
        flat = below.reshape(-1, n_draws)
        np.take(flat, left[at].T * n + np.arange(n), axis=0, out=told, mode="clip")
        if not np.array_equal(left[at], right[at]):  # ties count half
            np.take(flat, right[at].T * n + np.arange(n), axis=0, out=ties, mode="clip")
            np.divide(np.add(told, ties, out=told), 2, out=told)
        found[:, at] = np.einsum("unr,ur->rn", told, w_up)
    return 2 * found / total[:, None] - 1


def _probes(
    mem: Float[np.ndarray, "pair neuron"],
    gen: Float[np.ndarray, "pair neuron"],
    items: Int[np.ndarray, " pair"],
    weighting: Weighting,
    fitted: Callable[[int], Any],
) -> Float[np.ndarray, "draw neuron"]:
    """Weights of a probe that is fitted anew to each draw."""
    features = np.concatenate([mem, gen])
    found = np.empty((weighting.n_draws, mem.shape[1]))
    with threadpool_limits(1):  # for matrices this small, threads that share the cores wait ten times as long
        for draw, (for_mem, for_gen) in enumerate(zip(*_by_row(weighting, items), strict=True)):
            rows = for_mem + for_gen > 0
            probe: Any = fit_probe(features[rows], for_mem[rows] > 0, (for_mem + for_gen)[rows])
            found[draw] = probe[-1].coef_[0]
            fitted(1)
    return found

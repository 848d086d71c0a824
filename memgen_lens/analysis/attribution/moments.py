"""Moments of prompt pairs, merged block by block: all that the neuron scores need, in one pass over the pairs.

Memory does not grow with the pairs: a few float64 values a neuron, and one a neuron and permutation. Does not know
models; `attribution` turns moments into scores.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

PAIRS_AT_ONCE = 128
"""Pairs that are merged together: their float64 copies stay in the processor's cache."""
ITEMS_A_CHUNK = 1024
"""Items whose sign flips are drawn together: an item's flips depend on its place and the seed, on no block size."""
PAIRS_A_SUM = 1024
"""Pairs whose differences are summed up by item together."""
PERMUTATIONS_A_BLOCK = 250


class PairMoments:
    """Running moments of both sides of the pairs, and of their differences under sign flips, item by item.

    Means and squared deviations are merged by Chan, Golub and LeVeque (1983), in float64. The pairs of one item say
    much the same, so that they are exchanged together: the test sees the sum of each item's differences, of which only
    that of the item at hand is kept.

    Args:
        n_permutations: Sign flips of the paired permutation test; 0 for none.
        seed: Their seed.
        is_part: Whether these are some of all pairs, and others keep moments of those before and behind them. Items are
            then told by their places among all, and the first, which may have begun before, is not flipped
            (see `merged.merged_moments`).

    Attributes:
        first_item: Of a part, the first item's place and the sum of its differences here; None while it has not ended.
    """

    def __init__(self, *, n_permutations: int, seed: int, is_part: bool = False) -> None:
        self.n_permutations, self.seed = n_permutations, seed
        self.n = self.n_items = self._place = 0
        self.is_part = is_part
        self.first_item: tuple[int, np.ndarray] | None = None
        self._chunk, self._signs = -1, np.empty((0, 0))
        self._item: Any = None
        self._item_sum = np.empty(0)

    def add(
        self,
        mem: Float[np.ndarray, "pair *neuron"],
        gen: Float[np.ndarray, "pair *neuron"],
        items: Shaped[np.ndarray, " pair"] | None = None,
    ) -> None:
        """Merge the next pairs, in their order.

        Args:
            mem: Activations on the recalling side; all axes but the first are flattened into neurons.
            gen: On the computing side.
            items: The item of each pair; all pairs of one item come one after another, over blocks too. Default: each
                pair is an item of its own. Without permutations it does not matter.
        """
        if self.n == 0:
            self.begin(mem[0].size)
            if self.is_part and items is not None:
                self._place = int(items[0])
        if self.n_permutations:
            for first in range(0, len(mem), PAIRS_A_SUM):
                some = slice(first, first + PAIRS_A_SUM)
                self._sum_up(mem[some], gen[some], None if items is None else items[some])
        for first in range(0, len(mem), PAIRS_AT_ONCE):
            some = slice(first, first + PAIRS_AT_ONCE)
            sides = [side[some].reshape(len(side[some]), -1) for side in (mem, gen)]
            self._merge([torch.from_numpy(np.require(side, requirements="W")) for side in sides])

    def begin(self, width: int) -> None:
        """Make room for so many neurons; `add` does it by itself."""
        self._means, self._deviation, self._largest = (
            torch.zeros(2, width, dtype=torch.float64),
            *torch.zeros(2, width, dtype=torch.float64),
        )
        self._square_sum = np.zeros(width)
        self._flipped = np.zeros((1 + self.n_permutations, width))

    def merge(
        self,
        rows: int,
        means: Float[Tensor, "2 neuron"],
        within: Float[Tensor, " neuron"],
        largest: Float[Tensor, " neuron"],
    ) -> None:
        """Merge the moments of the next pairs.

        Args:
            rows: How many pairs.
            means: Of both sides.
            within: Squared deviations of both sides from their common mean.
            largest: Largest absolute values.
        """
        n = self.n + rows
        torch.maximum(self._largest, largest, out=self._largest)
        # Both sides as one sample: their own deviation, and what parts their mean from the mean so far.
        middle, before = means.mean(0), self._means.mean(0)
        self._deviation += within + (middle - before).square() * (2 * self.n * rows / n)
        self._means += (means - self._means) * (rows / n)
        self.n = n

    def _merge(self, sides: list[Tensor]) -> None:
        largest = torch.stack([torch.maximum(side.amax(0), -side.amin(0)) for side in sides]).amax(0)
        mem, gen = (side.double() for side in sides)
        means = torch.stack([mem.mean(0), gen.mean(0)])
        middle = means.mean(0)
        within = sum(side.sub(middle).square_().sum(0) for side in (mem, gen))
        assert isinstance(within, Tensor)
        self.merge(len(mem), means, within, largest.double())

    @property
    def std(self) -> Float[np.ndarray, " neuron"]:
        """Standard deviation over both sides."""
        return (self._deviation / (2 * self.n)).sqrt().numpy()

    @property
    def constant(self) -> Bool[np.ndarray, " neuron"]:
        """Neurons with one value throughout, to rounding of float32."""
        return self.std <= 1e-7 * np.maximum(self._largest.numpy(), 1e-30)

    @property
    def nmd(self) -> Float[np.ndarray, " neuron"]:
        """Mean difference; 0 for a constant neuron, of which rounding leaves something else."""
        return np.where(self.constant, 0.0, (self._means[0] - self._means[1]).numpy())

    @property
    def rho(self) -> Float[np.ndarray, " neuron"]:
        """Pearson correlation with the label (1 = memorization) over both sides; 0 for a constant neuron.

        With as many rows on each side, the label has mean 1/2 and deviation 1/2, so that
        ``rho = (mean_mem - mean_gen) / (2 * std)`` with the standard deviation over both sides.
        """
        return self.nmd / 2 / np.where(self.constant, 1.0, self.std)

    def p_values(self) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]]:
        """Two-sided paired sign-flip p-values of each neuron, and the same against the largest over all (max-T).

        The statistic is the t of the items' sums. Both count the observed labelling: ``(1 + hits) / (1 +
        n_permutations)``; nan without permutations. All pairs must have been added: this ends the last item.
        """
        if not self.n_permutations:
            return np.full(len(self.nmd), np.nan), np.full(len(self.nmd), np.nan)
        self.end_item()
        square_sum = np.where(self.constant, 0.0, self._square_sum)  # unchanged by any flip
        sums = np.where(self.constant, 0.0, self._flipped)
        observed = _abs_t(sums[0], square_sum, self.n_items)
        reached = observed * (1 - 1e-9)  # rounding must not decide ties, of which few pairs have many
        hits, family_hits = np.zeros(len(observed)), np.zeros(len(observed))
        for first in range(1, len(sums), PERMUTATIONS_A_BLOCK):
            permuted = _abs_t(sums[first : first + PERMUTATIONS_A_BLOCK], square_sum, self.n_items)
            hits += (permuted >= reached).sum(0)
            family_hits += (permuted.max(1, keepdims=True) >= reached).sum(0)
        return (1 + hits) / (1 + self.n_permutations), (1 + family_hits) / (1 + self.n_permutations)

    @property
    def moments(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """What `merge` takes."""
        return self.n, self._means, self._deviation, self._largest

    @property
    def flipped_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the items that have been flipped: of squares, and of each permutation."""
        return self._square_sum, self._flipped

    @property
    def cut_items(self) -> list[tuple[int, np.ndarray]]:
        """Of a part, the place and the sum of its first and of its last item, of which others may have pairs."""
        pieces = [] if self.first_item is None else [self.first_item]
        return [*pieces, (int(self._item), self._item_sum)] if len(self._item_sum) else pieces

    def flip_item(self, place: int, total: Float[np.ndarray, " neuron"]) -> None:
        """Flip an item whose differences have been summed up elsewhere."""
        self._place = place
        self._flip(total[None])

    def _sum_up(
        self,
        mem: Float[np.ndarray, "pair *neuron"],
        gen: Float[np.ndarray, "pair *neuron"],
        items: Shaped[np.ndarray, " pair"] | None,
    ) -> None:
        """Sum the differences of each item, and flip the sums of those that have ended."""
        difference = np.subtract(mem, gen, dtype=np.float64).reshape(len(mem), -1)
        if items is None:
            self.end_item()
            self._flip(difference)
            return
        starts = np.flatnonzero(np.concatenate([[True], items[1:] != items[:-1]]))
        sums = np.add.reduceat(difference, starts, axis=0)
        if len(self._item_sum) and items[0] == self._item:
            sums[0] += self._item_sum
        else:
            self.end_item()
        self._flip(sums[:-1])
        self._item, self._item_sum = items[-1], sums[-1]

    def end_item(self) -> None:
        """Flip the item at hand: no more pairs of it come."""
        if len(self._item_sum):
            self._flip(self._item_sum[None])
            self._item, self._item_sum = None, np.empty(0)

    def _flip(self, sums: Float[np.ndarray, "item neuron"]) -> None:
        """Add items' sums to the total of each permutation, with that permutation's signs."""
        if self.is_part and self.first_item is None and len(sums):
            self.first_item = self._place, sums[0]
            self._place, sums = self._place + 1, sums[1:]
        self._square_sum += np.einsum("in,in->n", sums, sums)
        done = 0
        while done < len(sums):
            chunk, start = divmod(self._place, ITEMS_A_CHUNK)
            if chunk != self._chunk:
                self._chunk, self._signs = chunk, _signs(self.n_permutations, [self.seed, chunk])
            part = sums[done : done + ITEMS_A_CHUNK - start]
            self._flipped += self._signs[:, start : start + len(part)] @ part
            done += len(part)
            self._place += len(part)
        self.n_items += len(sums)


def _signs(n_permutations: int, seed: list[int]) -> Float[np.ndarray, "permutation item"]:
    """Signs of the items of one chunk, drawn once for all neurons, so that max-T holds under dependence.

    The first row flips nothing: what was observed is summed as its permutations are, so that rounding parts no tie.
    """
    drawn = np.random.default_rng(seed).bytes(n_permutations * ITEMS_A_CHUNK // 8)
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8)).astype(np.float64)
    return np.vstack([np.ones(ITEMS_A_CHUNK), (2 * bits - 1).reshape(n_permutations, ITEMS_A_CHUNK)])


def _abs_t(sums: np.ndarray, square_sum: np.ndarray, n: int) -> np.ndarray:
    """Absolute one-sample t statistic of n items from their sum and sum of squares; 0 where all of them are 0."""
    mean = sums / n
    variance = np.maximum(square_sum / n - np.square(mean), 0) / max(n - 1, 1)
    floor = 1e-12 * np.maximum(square_sum / n, 1e-300)
    return np.abs(mean) / np.sqrt(np.maximum(variance, floor))

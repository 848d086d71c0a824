"""Moments of prompt pairs, merged block by block: all that the neuron scores need, in one pass over the pairs.

Memory does not grow with the pairs: a few float64 values a neuron, and one a neuron and permutation. Does not know
models; `attribution` turns moments into scores.
"""

import numpy as np
from jaxtyping import Float

PAIRS_A_CHUNK = 1024
"""Pairs whose sign flips are drawn together: the flips of a pair depend on its place and the seed, on no block size."""
PERMUTATIONS_A_BLOCK = 250


class PairMoments:
    """Running moments of both sides of the pairs, and of their sign-flipped differences.

    Means and squared deviations are merged by Chan, Golub and LeVeque (1983), in float64.

    Args:
        n_permutations: Sign flips of the paired permutation test; 0 for none.
        seed: Their seed.
    """

    def __init__(self, *, n_permutations: int, seed: int) -> None:
        self.n_permutations, self.seed = n_permutations, seed
        self.n = 0
        self._chunk, self._signs = -1, np.empty((0, 0))

    def add(self, mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]) -> None:
        """Merge the next pairs, in their order.

        Args:
            mem: Activations on the recalling side.
            gen: On the computing side.
        """
        if self.n == 0:
            width = mem.shape[1]
            self.mean_mem, self.mean_gen, self.deviation, self.largest, self.square_sum = np.zeros((5, width))
            self.flipped = np.zeros((self.n_permutations, width))
        mem, gen = mem.astype(np.float64), gen.astype(np.float64)
        rows, n = len(mem), self.n + len(mem)
        mean_mem, mean_gen = mem.mean(0), gen.mean(0)
        # Both sides as one sample: their own deviation, and what parts their mean from the mean so far.
        middle, before = (mean_mem + mean_gen) / 2, (self.mean_mem + self.mean_gen) / 2
        within = np.square(mem - middle).sum(0) + np.square(gen - middle).sum(0)
        self.deviation += within + np.square(middle - before) * (2 * self.n * rows / n)
        self.mean_mem += (mean_mem - self.mean_mem) * (rows / n)
        self.mean_gen += (mean_gen - self.mean_gen) * (rows / n)
        np.maximum(self.largest, np.maximum(np.abs(mem).max(0), np.abs(gen).max(0)), out=self.largest)
        if self.n_permutations:
            difference = mem - gen
            self.square_sum += np.square(difference).sum(0)
            self._flip(difference)
        self.n = n

    @property
    def constant(self) -> np.ndarray:
        """Neurons with one value throughout, to rounding of float32."""
        return np.sqrt(self.deviation / (2 * self.n)) <= 1e-7 * np.maximum(self.largest, 1e-30)

    @property
    def nmd(self) -> Float[np.ndarray, " neuron"]:
        """Mean difference; 0 for a constant neuron, of which rounding leaves something else."""
        return np.where(self.constant, 0.0, self.mean_mem - self.mean_gen)

    @property
    def rho(self) -> Float[np.ndarray, " neuron"]:
        """Pearson correlation with the label (1 = memorization) over both sides; 0 for a constant neuron.

        With as many rows on each side, the label has mean 1/2 and deviation 1/2, so that
        ``rho = (mean_mem - mean_gen) / (2 * std)`` with the standard deviation over both sides.
        """
        deviation = np.sqrt(self.deviation / (2 * self.n))
        return self.nmd / 2 / np.where(self.constant, 1.0, deviation)

    def p_values(self) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]]:
        """Two-sided paired sign-flip p-values of each neuron, and the same against the largest over all (max-T).

        Both count the observed labelling: ``(1 + hits) / (1 + n_permutations)``; nan without permutations.
        """
        if not self.n_permutations:
            return np.full(len(self.nmd), np.nan), np.full(len(self.nmd), np.nan)
        square_sum = np.where(self.constant, 0.0, self.square_sum)  # unchanged by any flip
        observed = _abs_t(self.nmd * self.n, square_sum, self.n)
        reached = observed * (1 - 1e-9)  # rounding must not decide ties, of which few pairs have many
        hits, family_hits = np.zeros(len(observed)), np.zeros(len(observed))
        for first in range(0, self.n_permutations, PERMUTATIONS_A_BLOCK):
            sums = np.where(self.constant, 0.0, self.flipped[first : first + PERMUTATIONS_A_BLOCK])
            permuted = _abs_t(sums, square_sum, self.n)
            hits += (permuted >= reached).sum(0)
            family_hits += (permuted.max(1, keepdims=True) >= reached).sum(0)
        return (1 + hits) / (1 + self.n_permutations), (1 + family_hits) / (1 + self.n_permutations)

    def _flip(self, difference: Float[np.ndarray, "pair neuron"]) -> None:
        """Add the differences to the sum of each permutation, with that permutation's signs."""
        done = 0
        while done < len(difference):
            chunk, start = divmod(self.n + done, PAIRS_A_CHUNK)
            if chunk != self._chunk:
                self._chunk, self._signs = chunk, _signs(self.n_permutations, [self.seed, chunk])
            part = difference[done : done + PAIRS_A_CHUNK - start]
            self.flipped += self._signs[:, start : start + len(part)] @ part
            done += len(part)


def _signs(n_permutations: int, seed: list[int]) -> Float[np.ndarray, "permutation pair"]:
    """Random signs of the pairs of one chunk, drawn once for all neurons, so that max-T holds under dependence."""
    drawn = np.random.default_rng(seed).bytes(n_permutations * PAIRS_A_CHUNK // 8)
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8)).astype(np.float64)
    return (2 * bits - 1).reshape(n_permutations, PAIRS_A_CHUNK)


def _abs_t(sums: np.ndarray, square_sum: np.ndarray, n: int) -> np.ndarray:
    """Absolute paired t statistic from sums of differences; 0 where all differences are 0."""
    mean = sums / n
    variance = np.maximum(square_sum / n - np.square(mean), 0) / max(n - 1, 1)
    floor = 1e-12 * np.maximum(square_sum / n, 1e-300)
    return np.abs(mean) / np.sqrt(np.maximum(variance, floor))

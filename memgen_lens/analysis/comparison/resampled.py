"""Every neuron's rho over many weightings of the same pairs: halves, resamples, swapped labels.

Does not know which of these it is.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PairSums:
    """What rho of any weighting can be summed up from; columns are centred, so that the squares lose no digits.

    Attributes:
        difference: ``h_mem - h_gen`` of each pair.
        total: ``h_mem + h_gen``, both centred.
        square: ``h_mem ** 2 + h_gen ** 2``, both centred.
    """

    difference: Float[np.ndarray, "pair neuron"]
    total: Float[np.ndarray, "pair neuron"]
    square: Float[np.ndarray, "pair neuron"]

    @classmethod
    def of(cls, mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]) -> "PairSums":
        """Sums of some pairs, in float64."""
        center = (mem.mean(0, dtype=np.float64) + gen.mean(0, dtype=np.float64)) / 2
        mem, gen = mem - center, gen - center
        return cls(mem - gen, mem + gen, np.square(mem) + np.square(gen))

    def rho(
        self, weights: Float[np.ndarray, "draw pair"], signs: Float[np.ndarray, "draw pair"] | None = None
    ) -> Float[np.ndarray, "draw neuron"]:
        """Correlation with the label for each row of weights, as `attribution.streaming.correlation` has it.

        Args:
            weights: How often each pair counts, at least 0, not all 0.
            signs: -1 swaps the two labels of a pair; default: none is swapped.

        Returns:
            rho in [-1, 1]; 0 for a neuron that is constant over the pairs that count.
        """
        n = weights.sum(1, keepdims=True)
        variance = weights @ self.square / (2 * n) - np.square(weights @ self.total / (2 * n))
        constant = variance <= 1e-12 * self.square.max(0)
        signed = weights if signs is None else weights * signs
        return np.where(constant, 0, signed @ self.difference / (2 * n) / np.sqrt(np.where(constant, 1, variance)))

"""Score neurons: mean difference, correlation, and whether chance explains them.

Does not know models or prompts, only recorded activations.
"""

import numpy as np
from jaxtyping import Float

from memgen_lens.core.errors import SettingsError
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.stats import fdr

PAIRS_A_BLOCK = 1024
PERMUTATIONS_A_BLOCK = 250


def attribute(
    acts: Activations,
    site: str,
    *,
    split: PairSplit | None = "select",
    n_permutations: int = 1000,
    seed: int = 0,
) -> NeuronScores:
    """Score every neuron of a site; positive = towards memorization.

    - ``nmd[l, i] = mean over pairs of (h_mem - h_gen)``: the neuron-wise mean difference (arXiv 2412.18497 v1, sec. 5).
    - ``rho[l, i]``: Pearson correlation of the activation with the label (1 = memorization) over both prompts of all
      pairs (v2, sec. 4).
    - ``p``: two-sided paired permutation test. Under the null the two prompts of a pair are exchangeable, so the sign
      of each difference is flipped at random; the statistic is the paired t. ``p_family`` refers each neuron to the
      largest abs(t) over all neurons (max-T; Westfall and Young 1993), ``q`` is Benjamini-Hochberg over the site.
      The papers test nothing.

    Args:
        acts: Activations recorded by `record`.
        site: One of their sites.
        split: Pairs to score on; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all pairs.
        n_permutations: Sign flips, at least 1,000; p-values are at least ``1 / (n_permutations + 1)``.
        seed: Seed of the sign flips.

    Returns:
        Scores ``[layer, neuron]``, in float64.

    Raises:
        SiteError: The site was not recorded.
        PairsError: The split holds fewer than 8 pairs.
        SettingsError: Fewer than 1,000 permutations.
    """
    if n_permutations < 1000:
        raise SettingsError(
            "attribute",
            expected="n_permutations of at least 1000",
            received=str(n_permutations),
            fix="Fewer leave p-values too coarse to correct for many neurons.",
        )
    recorded = acts.site(site)
    index = acts.pairs.of(split) if split is not None else np.arange(len(acts.pairs))
    acts.pairs.require(MINIMUM_PAIRS, len(index), call="attribute")
    shape = recorded.memorized.shape[1:]
    mem = recorded.memorized[index].reshape(len(index), -1)
    gen = recorded.generalized[index].reshape(len(index), -1)
    difference = mem.astype(np.float64) - gen
    difference[:, _constant(mem, gen)] = 0  # what rounding leaves of a constant neuron is no difference
    p, p_family = sign_flip_test(difference, n_permutations=n_permutations, seed=seed)
    return NeuronScores(
        site=site,
        nmd=difference.mean(0).reshape(shape),
        rho=correlation(mem, gen).reshape(shape),
        p=p.reshape(shape),
        p_family=p_family.reshape(shape),
        q=fdr(p).reshape(shape),
        n_pairs=len(index),
    )


def correlation(
    mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]
) -> Float[np.ndarray, " neuron"]:
    """Pearson correlation with the label (1 = memorization) over both sides; 0 for a constant neuron.

    With as many rows on each side, the label has mean 1/2 and deviation 1/2, so that
    ``rho = (mean_mem - mean_gen) / (2 * std)`` with the standard deviation over both sides.
    """
    both = np.concatenate([mem, gen]).astype(np.float64)
    deviation = both.std(0)
    constant = _constant(mem, gen)
    half_difference = (both[: len(mem)].mean(0) - both[len(mem) :].mean(0)) / 2
    return np.where(constant, 0.0, half_difference / np.where(constant, 1.0, deviation))


def _constant(mem: np.ndarray, gen: np.ndarray) -> np.ndarray:
    """Neurons with one value throughout, to rounding of float32."""
    both = np.concatenate([mem, gen]).astype(np.float64)
    return both.std(0) <= 1e-7 * np.maximum(np.abs(both).max(0), 1e-30)


def sign_flip_test(
    difference: Float[np.ndarray, "pair neuron"], *, n_permutations: int, seed: int
) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]]:
    """Two-sided paired sign-flip permutation p-values of each neuron's mean difference.

    Memory: the permuted sums of one block of permutations; nothing grows with pairs times permutations.

    Args:
        difference: ``h_mem - h_gen`` of each pair.
        n_permutations: Sign flips, drawn once and shared by all neurons, so that max-T holds under dependence.
        seed: Their seed.

    Returns:
        ``p`` and ``p_family`` (max-T), both counting the observed labelling: ``(1 + hits) / (1 + n_permutations)``.
    """
    n = len(difference)
    square_sum = np.square(difference).sum(0)  # unchanged by any flip
    observed = _abs_t(difference.sum(0), square_sum, n)
    rng = np.random.default_rng(seed)
    hits, family_hits = np.zeros(len(observed)), np.zeros(len(observed))
    done = 0
    while done < n_permutations:
        block = min(PERMUTATIONS_A_BLOCK, n_permutations - done)
        sums = np.zeros((block, difference.shape[1]))
        for first in range(0, n, PAIRS_A_BLOCK):
            part = difference[first : first + PAIRS_A_BLOCK]
            sums += rng.choice([-1.0, 1.0], size=(block, len(part))) @ part
        permuted = _abs_t(sums, square_sum, n)
        # Rounding must not decide ties, of which few pairs have many.
        reached = observed * (1 - 1e-9)
        hits += (permuted >= reached).sum(0)
        family_hits += (permuted.max(1, keepdims=True) >= reached).sum(0)
        done += block
    return (1 + hits) / (1 + n_permutations), (1 + family_hits) / (1 + n_permutations)


def _abs_t(sums: np.ndarray, square_sum: np.ndarray, n: int) -> np.ndarray:
    """Absolute paired t statistic from sums of differences; 0 where all differences are 0."""
    mean = sums / n
    variance = np.maximum(square_sum / n - np.square(mean), 0) / (n - 1)
    floor = 1e-12 * np.maximum(square_sum / n, 1e-300)
    return np.abs(mean) / np.sqrt(np.maximum(variance, floor))

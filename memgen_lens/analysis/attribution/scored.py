"""Which pairs are scored, in which order, and the scores that sums over them give.

Does not run models, nor know causal methods: see `streaming` and `effects`.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import fdr


def by_item(pairs: PromptPairs, index: Int[np.ndarray, " index"]) -> Int[np.ndarray, " index"]:
    """The same pairs, those of one item one after another."""
    return index[np.argsort(pairs.item[index], kind="stable")]


def places_of(pairs: PromptPairs, index: Int[np.ndarray, " index"]) -> Int[np.ndarray, " index"]:
    """The place of each pair's item among the items that some pairs belong to."""
    return np.unique(pairs.item[index], return_inverse=True)[1]


def scores_of(
    site: str,
    moments: PairMoments,
    shape: tuple[int, ...],
    n_items: int,
    method: str = "pearson",
    score: Float[np.ndarray, "layer neuron"] | None = None,
    tested: PairMoments | None = None,
) -> NeuronScores:
    """Scores from moments of the activations.

    Args:
        site: Site name.
        moments: Of the activations.
        shape: Layers and neurons.
        n_items: Items behind the pairs.
        method: What ``score`` is.
        score: What neurons are ranked by; None = rho.
        tested: What is tested, where it is not the activations.
    """
    tested = tested or moments
    p, p_family = tested.p_values()
    return NeuronScores(
        site=site,
        nmd=moments.nmd.reshape(shape),
        rho=moments.rho.reshape(shape),
        p=p.reshape(shape),
        p_family=p_family.reshape(shape),
        q=(fdr(p) if tested.n_permutations else p).reshape(shape),
        n_pairs=moments.n,
        n_items=n_items,
        method=method,
        score=moments.rho.reshape(shape) if score is None else score,
    )


def pairs_of(pairs: PromptPairs, split: PairSplit | None, *, call: str) -> np.ndarray:
    """The pairs of a split, or all; 8 at least."""
    index = pairs.of(split) if split is not None else np.arange(len(pairs))
    pairs.require(MINIMUM_PAIRS, len(index), call=call)
    return index


def require_permutations(call: str, n_permutations: int) -> None:
    """Refuse so few permutations that p-values cannot be corrected."""
    if n_permutations and n_permutations < 1000:
        raise SettingsError(
            call,
            expected="n_permutations of at least 1000, or 0 for no test",
            received=str(n_permutations),
            fix="Fewer leave p-values too coarse to correct for many neurons.",
        )


def correlation(
    mem: Float[np.ndarray, "pair neuron"], gen: Float[np.ndarray, "pair neuron"]
) -> Float[np.ndarray, " neuron"]:
    """Pearson correlation with the label (1 = memorization) over both sides; 0 for a constant neuron."""
    moments = PairMoments(n_permutations=0, seed=0)
    moments.add(mem, gen)
    return moments.rho


def sign_flip_test(
    difference: Float[np.ndarray, "pair neuron"],
    items: Shaped[np.ndarray, " pair"] | None = None,
    *,
    n_permutations: int,
    seed: int,
) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]]:
    """Two-sided paired sign-flip permutation p-values of each neuron's mean difference, and the max-T ones.

    Args:
        difference: ``h_mem - h_gen`` of each pair.
        items: The item of each pair, in any order; its pairs are flipped together. Default: each is its own.
        n_permutations: Sign flips, drawn once and shared by all neurons, so that max-T holds under dependence.
        seed: Their seed.
    """
    moments = PairMoments(n_permutations=n_permutations, seed=seed)
    if items is not None:
        order = np.argsort(items, kind="stable")
        difference, items = difference[order], items[order]
    moments.add(difference, np.zeros_like(difference), items)
    return moments.p_values()

"""Score neurons: mean difference, correlation, and whether chance explains them.

Scores recorded activations, or a model and its prompts in one streaming pass that keeps no activation.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int, Shaped

from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.recording.finite import EMBEDDING, require_finite
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.stats import fdr
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model

PAIRS_A_BLOCK = 1024


@arguments(
    acts=kinds.one(Activations),
    site=kinds.Text,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    seed=kinds.Seed,
)
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
    - ``p``: two-sided paired permutation test. Under the null the labels of an item are exchangeable, so the signs of
      its differences are flipped at random, those of all its pairs together; the statistic is the t of the items' sums
      of differences (of the pairs, where each is an item of its own). ``p_family`` refers each neuron to the largest
      abs(t) over all neurons (max-T; Westfall and Young 1993), ``q`` is Benjamini-Hochberg over the site. The papers
      test nothing.

    Args:
        acts: Activations recorded by `record`.
        site: One of their sites.
        split: Pairs to score on; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all pairs.
        n_permutations: Sign flips, at least 1,000; p-values are at least ``1 / (n_permutations + 1)``. 0 = no test.
        seed: Seed of the sign flips.

    Returns:
        Scores ``[layer, neuron]``, in float64; ``p``, ``p_family`` and ``q`` are nan where no test was asked for.

    Raises:
        SiteError: The site was not recorded.
        PairsError: The split holds fewer than 8 pairs.
        SettingsError: Fewer than 1,000 permutations.
    """
    _require_permutations("attribute", n_permutations)
    recorded, item = acts.site(site), acts.pairs.item
    index = _by_item(acts.pairs, _pairs_of(acts.pairs, split, call="attribute"))
    moments = PairMoments(n_permutations=n_permutations, seed=seed)
    for first in range(0, len(index), PAIRS_A_BLOCK):
        rows = index[first : first + PAIRS_A_BLOCK]
        mem, gen = recorded.memorized[rows], recorded.generalized[rows]
        require_finite("attribute", site, [mem, gen], acts.pairs.take(rows))
        moments.add(mem, gen, item[rows])
    return _scores(site, moments, recorded.memorized.shape[1:], _n_items(acts.pairs, index))


@arguments(
    model=lens_model("attribute_streaming"),
    pairs=kinds.one(PromptPairs),
    sites=kinds.Texts,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    seed=kinds.Seed,
    batch_size=kinds.Count | None,
    progress=kinds.Flag,
)
def attribute_streaming(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    *,
    split: PairSplit | None = "select",
    n_permutations: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, NeuronScores]:
    """`attribute`, straight from the model: one pass over the prompts, no activation kept.

    Memory does not grow with the pairs: each batch is merged into running moments and dropped. The permutation test
    takes ``8 * n_permutations`` bytes a neuron.

    Args:
        model: A HookedTransformer; left without hooks, also after an exception.
        pairs: Prompt pairs, ours or a user's own.
        sites: Sites to score; see `record`.
        split: See `attribute`.
        n_permutations: See `attribute`.
        seed: See `attribute`.
        batch_size: See `record`.
        progress: See `record`.

    Returns:
        By site, the scores that ``attribute(record(model, pairs, sites), site)`` gives, to rounding.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: The split holds fewer than 8 pairs.
        SettingsError: Fewer than 1,000 permutations.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    call = "attribute_streaming"
    _require_permutations(call, n_permutations)
    index = _by_item(pairs, _pairs_of(pairs, split, call=call))
    scored, n_items = pairs.take(index), _n_items(pairs, index)
    if not n_permutations:
        # Means and correlations do not depend on who is whose partner: prompts that begin alike come together, so that
        # their beginnings are run once.
        by_text = {side: tuple(sorted(getattr(scored, side), key=_text)) for side in ("memorized", "generalized")}
        scored = replace(scored, **by_text)
    moments: dict[str, PairMoments] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for block in recorded_blocks(model, scored, sites, batch_size=batch_size, progress=progress, call=call):
        items = scored.item[block.first : block.first + block.tokens.shape[1]]
        for site, (mem, gen) in block.sides.items():
            if site == EMBEDDING:
                continue
            shapes[site] = mem.shape[1:]
            running = moments.setdefault(site, PairMoments(n_permutations=n_permutations, seed=seed))
            running.add(mem, gen, items)
    return {site: _scores(site, running, shapes[site], n_items) for site, running in moments.items()}


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


def _text(item: Item) -> str:
    return item.prompt


def _by_item(pairs: PromptPairs, index: Int[np.ndarray, " index"]) -> Int[np.ndarray, " index"]:
    """The same pairs, those of one item one after another."""
    return index[np.argsort(pairs.item[index], kind="stable")]


def _n_items(pairs: PromptPairs, index: Int[np.ndarray, " index"]) -> int:
    return len(np.unique(pairs.item[index]))


def _scores(site: str, moments: PairMoments, shape: tuple[int, ...], n_items: int) -> NeuronScores:
    p, p_family = moments.p_values()
    return NeuronScores(
        site=site,
        nmd=moments.nmd.reshape(shape),
        rho=moments.rho.reshape(shape),
        p=p.reshape(shape),
        p_family=p_family.reshape(shape),
        q=(fdr(p) if moments.n_permutations else p).reshape(shape),
        n_pairs=moments.n,
        n_items=n_items,
    )


def _pairs_of(pairs: PromptPairs, split: PairSplit | None, *, call: str) -> np.ndarray:
    index = pairs.of(split) if split is not None else np.arange(len(pairs))
    pairs.require(MINIMUM_PAIRS, len(index), call=call)
    return index


def _require_permutations(call: str, n_permutations: int) -> None:
    if n_permutations and n_permutations < 1000:
        raise SettingsError(
            call,
            expected="n_permutations of at least 1000, or 0 for no test",
            received=str(n_permutations),
            fix="Fewer leave p-values too coarse to correct for many neurons.",
        )

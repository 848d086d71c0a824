"""Mean difference and correlation of every neuron in one pass over the prompts that keeps no activation.

Does not know methods that look at each pair: see `attribute`.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from math import prod

import numpy as np
from jaxtyping import Float, Int, Shaped

from memgen_lens import processes
from memgen_lens.analysis.attribution.bootstrap import Bootstrap, require_resamples
from memgen_lens.analysis.attribution.merged import merged_moments
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.recording.finite import EMBEDDING
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import fdr
from memgen_lens.core.types import LensModel
from memgen_lens.models.fingerprint import Fingerprint
from memgen_lens.models.guard import lens_model

PAIRS_A_BLOCK = 1024


@arguments(
    model=lens_model("attribute_streaming"),
    pairs=kinds.one(PromptPairs),
    sites=kinds.Texts,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    n_resamples=kinds.Number0,
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
    n_resamples: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, NeuronScores]:
    """`attribute` by correlation, straight from the model: one pass over the prompts, no activation kept.

    Memory does not grow with the pairs: each batch is merged into running moments and dropped. The permutation test
    takes ``8 * n_permutations`` bytes a neuron, the bootstrap ``24 * n_resamples``.

    Started as several processes by ``accelerate launch`` or torchrun, each runs a part of the pairs, in blocks of
    ``batch_size // 2``, and all get the same scores: those of one process to 1e-10 and better. Every process calls this
    with the same arguments.

    Args:
        model: A HookedTransformer; left without hooks, also after an exception.
        pairs: Prompt pairs, ours or a user's own.
        sites: Sites to score; see `record`.
        split: See `attribute`.
        n_permutations: See `attribute`.
        n_resamples: See `attribute`.
        seed: See `attribute`.
        batch_size: See `record`.
        progress: See `record`.

    Returns:
        By site, the scores that ``attribute(record(model, pairs, sites), site)`` gives, to rounding.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: The split holds fewer than 8 pairs.
        SettingsError: Fewer than 1,000 permutations, or fewer than 100 resamples; or, in several processes, other
            arguments than another's.
        ProcessError: Another process of the run has died.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    call = "attribute_streaming"
    require_permutations(call, n_permutations)
    require_resamples(call, n_resamples)
    index = by_item(pairs, pairs_of(pairs, split, call=call))
    scored, places = pairs.take(index), places_of(pairs, index)
    n_items = int(places[-1]) + 1
    if not (n_permutations or n_resamples):
        # Means and correlations do not depend on who is whose partner: prompts that begin alike come together, so that
        # their beginnings are run once.
        by_text = {side: tuple(sorted(getattr(scored, side), key=_text)) for side in ("memorized", "generalized")}
        scored = replace(scored, **by_text)
    world = processes.world(call, str(next(iter(model.parameters())).device))
    if not world.is_alone:
        how = (list(sites), split, n_permutations, n_resamples, seed, batch_size)
        processes.require_same(call, (Fingerprint.of(model), _digest(scored, places), *how))
    found: dict[str, tuple[PairMoments, Bootstrap]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def begun() -> tuple[PairMoments, Bootstrap]:
        moments = PairMoments(n_permutations=n_permutations, seed=seed, is_part=not world.is_alone)
        return moments, Bootstrap(n_resamples, n_items, seed=seed, method="pearson")

    def run() -> None:
        how = {"batch_size": batch_size, "progress": progress, "call": call, "world": world}
        for block in recorded_blocks(model, scored, sites, **how):
            items = places[block.first : block.first + block.tokens.shape[1]]
            for site, (mem, gen) in block.sides.items():
                if site == EMBEDDING:
                    continue
                shapes[site] = mem.shape[1:]
                if site not in found:
                    found[site] = begun()
                for running in found[site]:
                    running.add(mem, gen, items)

    processes.together(call, run)
    if not world.is_alone:
        shapes = next(known for known in processes.gathered(call, shapes) if known)
        found = {site: _merged(call, *(found.get(site) or begun()), prod(shape)) for site, shape in shapes.items()}
    return {
        site: replace(scores_of(site, moments, shapes[site], n_items), ci95=drawn.ci95(moments.constant, shapes[site]))
        for site, (moments, drawn) in found.items()
    }


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


def _digest(pairs: PromptPairs, places: Int[np.ndarray, " pair"]) -> str:
    """Which prompts, in which order, of which items."""
    digest = blake2b(places.astype(np.int64).tobytes(), digest_size=16)
    for item in (*pairs.memorized, *pairs.generalized):
        digest.update(f"{len(item.prompt)} {item.prompt}".encode())
    return f"{digest.hexdigest()} {pairs.prepend_bos}"


def _merged(call: str, moments: PairMoments, drawn: Bootstrap, width: int) -> tuple[PairMoments, Bootstrap]:
    """What all processes have found at one site, in each of them."""
    drawn.merge(call, width)
    return merged_moments(call, moments, width), drawn


def _text(item: Item) -> str:
    return item.prompt


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

"""Every neuron of several sites in one pass over the prompts that keeps no activation.

Does not know methods that look at all activations at once: see `attribute`.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from jaxtyping import Int

from memgen_lens import processes
from memgen_lens.analysis.attribution.bootstrap import Bootstrap, require_resamples
from memgen_lens.analysis.attribution.calls import BaselineName, how_to_run, require_used
from memgen_lens.analysis.attribution.causal import Baseline
from memgen_lens.analysis.attribution.contrast import Metric
from memgen_lens.analysis.attribution.effects import explained
from memgen_lens.analysis.attribution.merged import merged_moments
from memgen_lens.analysis.attribution.methods import CAUSAL, FROM_MOMENTS
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.scored import by_item, pairs_of, places_of, require_permutations, scores_of
from memgen_lens.analysis.recording.finite import EMBEDDING
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import LensModel, Method
from memgen_lens.models.fingerprint import Fingerprint
from memgen_lens.models.guard import lens_model

CALL = "attribute_streaming"


@arguments(
    model=lens_model(CALL),
    pairs=kinds.one(PromptPairs),
    sites=kinds.Texts,
    method=Method,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    n_resamples=kinds.Number0,
    seed=kinds.Seed,
    metric=kinds.Callback | None,
    baseline=BaselineName | None,
    n_steps=kinds.Count | None,
    batch_size=kinds.Count | None,
    progress=kinds.Flag,
)
def attribute_streaming(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    *,
    method: Method = "pearson",
    split: PairSplit | None = "select",
    n_permutations: int = 1000,
    n_resamples: int = 0,
    seed: int = 0,
    metric: Metric | None = None,
    baseline: Baseline | None = None,
    n_steps: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, NeuronScores]:
    """`attribute` of several sites, straight from the model: one pass over the prompts, no activation kept.

    Memory does not grow with the pairs: each batch is merged into running sums and dropped. The permutation test
    takes ``8 * n_permutations`` bytes a neuron, the bootstrap ``24 * n_resamples``. Attribution patching takes one
    backward pass a batch for all layers of all sites; the other causal methods read all sites in one pass, and then
    change one site after the other.

    Started as several processes by ``accelerate launch`` or torchrun, each runs a part of the pairs, in blocks of
    ``batch_size // 2``, and all get the same scores: those of one process to 1e-10 and better. Every process calls this
    with the same arguments. A causal method is run whole by each.

    Args:
        model: A lens model; left without hooks, also after an exception.
        pairs: Prompt pairs, ours or a user's own.
        sites: Sites to score; see `record`.
        method: See `attribute`; all but ``"auroc"`` and ``"probe_weights"``, which need every activation at once.
        split: See `attribute`.
        n_permutations: See `attribute`.
        n_resamples: See `attribute`.
        seed: See `attribute`.
        metric: See `attribute`.
        baseline: See `attribute`; ``"resample"`` keeps the memorized side's activations.
        n_steps: See `attribute`.
        batch_size: See `record`, and for a causal method `attribute`.
        progress: See `record`.

    Returns:
        By site, the scores that ``attribute(record(model, pairs, sites), site, method=method)`` gives, or for a causal
        method ``attribute(model, pairs, site, method=method)``, to rounding.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: The split holds fewer than 8 pairs, or a causal method's pairs lack an answer.
        SettingsError: A method that needs every activation at once, or an argument that the method does not use; fewer
            than 1,000 permutations, or fewer than 100 resamples; or, in several processes, other arguments than
            another's.
        ProcessError: Another process of the run has died.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    require_permutations(CALL, n_permutations)
    require_resamples(CALL, n_resamples)
    require_used(CALL, method, metric=metric, baseline=baseline, n_steps=n_steps)
    counts = {"split": split, "n_permutations": n_permutations, "n_resamples": n_resamples}
    if method in CAUSAL:
        sites = list(dict.fromkeys(sites))
        how = how_to_run(metric, baseline, n_steps, None, batch_size, seed, progress)
        with torch.inference_mode(False):  # where the caller keeps no gradients, ours are
            return explained(model, pairs, sites, method, how, **counts, call=CALL)
    if method not in FROM_MOMENTS:
        raise SettingsError(
            f"{CALL}(method=...)",
            expected=f"one of {', '.join(map(repr, (*FROM_MOMENTS, *CAUSAL)))}",
            received=f"{method!r}, which needs every activation at once",
            fix="Record them: attribute(record(model, pairs, sites), site, method=...).",
        )
    index = by_item(pairs, pairs_of(pairs, split, call=CALL))
    scored, places = pairs.take(index), places_of(pairs, index)
    n_items = int(places[-1]) + 1
    if not (n_permutations or n_resamples):
        # Means and correlations do not depend on who is whose partner: prompts that begin alike come together, so that
        # their beginnings are run once.
        by_text = {side: tuple(sorted(getattr(scored, side), key=_text)) for side in ("memorized", "generalized")}
        scored = replace(scored, **by_text)
    world = processes.world(CALL, str(next(iter(model.parameters())).device))
    if not world.is_alone:
        how = (list(sites), method, split, n_permutations, n_resamples, seed, batch_size)
        processes.require_same(CALL, (Fingerprint.of(model), _digest(scored, places), *how))
    found: dict[str, tuple[PairMoments, Bootstrap]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def begun() -> tuple[PairMoments, Bootstrap]:
        moments = PairMoments(n_permutations=n_permutations, seed=seed, is_part=not world.is_alone)
        return moments, Bootstrap(n_resamples, n_items, seed=seed, method=method)

    def run() -> None:
        how = {"batch_size": batch_size, "progress": progress, "call": CALL, "world": world}
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

    processes.together(CALL, run)
    if not world.is_alone:
        shapes = next(known for known in processes.gathered(CALL, shapes) if known)
        found = {site: _merged(CALL, *(found.get(site) or begun()), prod(shape)) for site, shape in shapes.items()}
    scores = {}
    for site, (moments, drawn) in found.items():
        shape = shapes[site]
        score = FROM_MOMENTS[method](moments).reshape(shape)
        scores[site] = replace(
            scores_of(site, moments, shape, n_items, method, score), ci95=drawn.ci95(moments.constant, shape)
        )
    return scores


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

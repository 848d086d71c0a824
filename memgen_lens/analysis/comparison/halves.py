"""Do two halves of the pairs find the same neurons, by a method of one's choice?

Does not train.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom, rankdata

from memgen_lens.analysis.attribution.calls import (
    BaselineName,
    Groups,
    how_to_run,
    pairs_and_site,
    require_used,
    site_of_activations,
    source_of,
)
from memgen_lens.analysis.attribution.causal import Baseline
from memgen_lens.analysis.attribution.contrast import Metric
from memgen_lens.analysis.attribution.effects import How, found_effects
from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.analysis.attribution.resampled import WeightedSums, Weighting, reweighted
from memgen_lens.analysis.attribution.scored import by_item, correlation, places_of
from memgen_lens.analysis.recording.activations import record
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import SplitHalf
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import Activations, SiteActivations
from memgen_lens.core.stats import largest, row_correlation
from memgen_lens.core.types import Causal, LensModel, Method, Observational

CALL = "consistency.split_half"
SPLITS_A_BLOCK = 10
MINIMUM_ITEMS = 2 * MINIMUM_PAIRS
"""Fewer items than this leave fewer than 8 to a half."""


@arguments(
    CALL,
    source=source_of(CALL),
    pairs=kinds.one(PromptPairs) | kinds.Text | None,
    site=kinds.Text | None,
    method=Method,
    split=kinds.PairSplitName | None,
    n_splits=kinds.Count,
    top_fraction=kinds.OpenShare,
    seed=kinds.Seed,
    metric=kinds.Callback | None,
    baseline=BaselineName | None,
    n_steps=kinds.Count | None,
    groups=Groups | None,
    batch_size=kinds.Count | None,
    progress=kinds.Flag,
)
def split_half(
    source: Activations | LensModel,
    pairs: PromptPairs | str | None = None,
    site: str | None = None,
    *,
    method: Method = "pearson",
    split: PairSplit | None = None,
    n_splits: int = 100,
    top_fraction: float = 0.1,
    seed: int = 0,
    metric: Metric | None = None,
    baseline: Baseline | None = None,
    n_steps: int | None = None,
    groups: Int[np.ndarray, "layer neuron"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> SplitHalf:
    """Whether two random halves of the pairs find the same neurons (intra-task consistency).

    ``split_half(acts, site)`` scores recorded activations, ``split_half(model, pairs, site, method=...)`` a model, as
    `memgen_lens.attribute` does. For each of ``n_splits`` random halvings, by item: the Spearman correlation over
    neurons of the signed score in one half with that in the other, and the share of one half's top set that is in the
    other's. A top set has the largest abs(score) or, of a causal method, the largest score: what steering takes. Beside
    them two references: the hypergeometric mean, as if every neuron were as likely to be chosen as any other; and the
    same figures where the two labels of each item are swapped at random (all its pairs alike; of a causal method, the
    sign of its effects), which keeps what the hypergeometric leaves out: neurons differ in how much their pairs vary,
    and depend on one another. Neurons that are constant over these pairs (without effect in all of them) are left out,
    as chance could not choose them either.

    The interval over splits says how much the halving matters; it is not a confidence interval for other prompts, as
    all splits share the same pairs.

    A causal method's effects are found once and summed up half by half: the model runs as for one `attribute`.
    ``"probe_weights"`` fits four probes a layer and halving.

    Args:
        source: Activations recorded by `record`, of one task, or a lens model.
        pairs: With a model, its prompt pairs.
        site: TransformerLens short name; with activations it may stand in second place.
        method: See `memgen_lens.attribute`.
        split: Pairs to halve; None = all of them (nothing is fitted or chosen here).
        n_splits: Random halvings, at least 20.
        top_fraction: Share of the site's neurons in a top set, in (0, 1).
        seed: Seed of the halvings and swaps, and of what stands for ablated neurons.
        metric: See `memgen_lens.attribute`, as all that follow.
        baseline: With ``"ablation"``.
        n_steps: With a method that goes along a path.
        groups: With an exact method.
        batch_size: Prompts that run together at most.
        progress: Show a bar over what takes longer than two seconds.

    Raises:
        SiteError: The site is unknown or was not recorded.
        PairsError: Fewer than 16 items, or a pair lacks an answer.
        ModelError: An activation or effect is not finite.
        SettingsError: A value is out of range, what makes no call, or fewer than two neurons vary.
    """
    if n_splits < 20:
        raise SettingsError(CALL, expected="n_splits of at least 20", received=str(n_splits), fix="Raise it.")
    require_used(CALL, method, metric=metric, baseline=baseline, n_steps=n_steps, groups=groups)
    if isinstance(source, Activations):
        site, asked = site_of_activations(CALL, method, pairs, site), source.pairs
        source.site(site)
    else:
        asked, site = pairs_and_site(CALL, method, pairs, site)
    index = by_item(asked, asked.of(split) if split is not None else np.arange(len(asked)))
    places = places_of(asked, index)
    _require_items(len(index), int(places[-1]) + 1 if len(index) else 0)
    halvings, scored = _Halvings.drawn(int(places[-1]) + 1, n_splits, seed), asked.take(index)
    if method in CAUSAL:
        how = how_to_run(metric, baseline, n_steps, groups, batch_size, seed, progress)
        with torch.inference_mode(False):  # where the caller keeps no gradients, ours are
            model = cast(LensModel, source)  # activations with such a method make no call
            blocks, varies = _causal(model, scored, site, cast(Causal, method), how, places, halvings)
    else:
        if isinstance(source, Activations):
            recorded = source.site(site).take(index)
        else:
            recorded = record(source, scored, [site], batch_size=batch_size, progress=progress).site(site)
        require_finite(CALL, site, [recorded.memorized, recorded.generalized], scored)
        varies = _varies(recorded)
        blocks = _observational(cast(Observational, method), recorded, places, halvings, progress)
    n_varying = int(varies.sum())
    if n_varying < 2:
        raise SettingsError(
            CALL,
            expected="a site at which at least two neurons vary between the prompts",
            received=f"{site!r}, at which {n_varying} does",
            fix="Choose a site behind the attention of the first layer.",
        )
    count = min(max(1, round(top_fraction * varies.size)), n_varying)
    found = _agreement(blocks, varies, count, by_size=method not in CAUSAL)
    typical = round(float(np.median(found["overlap"])) * count)
    return SplitHalf(
        site=site,
        n_pairs=len(index),
        n_items=int(places[-1]) + 1,
        n_neurons=n_varying,
        n_top=count,
        top_fraction=top_fraction,
        expected_overlap=count / n_varying,
        overlap_p=float(hypergeom.sf(typical - 1, n_varying, count, count)),
        method=method,
        **found,
    )


@dataclass(frozen=True)
class _Halvings:
    """Which items are in the first half of each split, and what swaps their labels for the null.

    Attributes:
        first: True in the first half.
        swaps: -1 where an item's labels are swapped.
    """

    first: Bool[np.ndarray, "split item"]
    swaps: Float[np.ndarray, "split item"]

    @classmethod
    def drawn(cls, n_items: int, n_splits: int, seed: int) -> "_Halvings":
        rng, firsts, swaps = np.random.default_rng(seed), [], []
        in_first = np.arange(n_items) < n_items // 2
        for done in range(0, n_splits, SPLITS_A_BLOCK):
            block = min(SPLITS_A_BLOCK, n_splits - done)
            firsts.append(rng.permuted(np.tile(in_first, (block, 1)), axis=1))
            swaps.append(rng.choice([-1.0, 1.0], size=(block, n_items)))
        return cls(np.concatenate(firsts), np.concatenate(swaps))

    def weighting(self, some: slice) -> Weighting:
        """Both halves of some splits, as they are and with labels swapped: four draws a split."""
        first, swaps = self.first[some], self.swaps[some]
        halves = np.concatenate([first, ~first, first, ~first]).astype(np.float64)
        return Weighting.of(halves, np.concatenate([np.ones_like(swaps)] * 2 + [swaps] * 2))


Blocks = Iterator[Float[np.ndarray, "draw neuron"]]
"""Scores of some splits after others, in the order of `_Halvings.weighting`."""


def _observational(
    method: Observational,
    recorded: SiteActivations,
    places: Int[np.ndarray, " pair"],
    halvings: _Halvings,
    progress: bool,
) -> Blocks:
    n_splits, n_layers = len(halvings.first), recorded.memorized.shape[1]
    n_fits = 4 * n_splits * n_layers if method == "probe_weights" else 0
    with progress_bar(n_fits, "fitting probes of halves", shown=progress and n_fits > 0, unit="probe") as bar:
        for done in range(0, n_splits, SPLITS_A_BLOCK):
            weighting = halvings.weighting(slice(done, done + SPLITS_A_BLOCK))
            sides = recorded.memorized, recorded.generalized
            parts = reweighted(method, *sides, places, weighting, fitted=bar.update)
            yield np.concatenate([scores for _, scores in parts], axis=1)


def _causal(
    model: LensModel,
    pairs: PromptPairs,
    site: str,
    method: Causal,
    how: How,
    places: Int[np.ndarray, " pair"],
    halvings: _Halvings,
) -> tuple[Blocks, Bool[np.ndarray, " neuron"]]:
    sums = WeightedSums(halvings.weighting(slice(None)), means_alone=True)
    acts: Any = False
    for found in found_effects(model, pairs, [site], method, how, call=CALL):
        effects = found.effects[site]
        sums.add(effects, None, places[found.rows])
        acts |= (effects != 0).any(0).ravel()
    scores = sums.scores("nmd").reshape(4, len(halvings.first), -1)
    some = [slice(done, done + SPLITS_A_BLOCK) for done in range(0, len(halvings.first), SPLITS_A_BLOCK)]
    return (scores[:, block].reshape(-1, scores.shape[2]) for block in some), acts


def _varies(recorded: SiteActivations) -> Bool[np.ndarray, " neuron"]:
    return correlation(*(side.reshape(len(side), -1) for side in (recorded.memorized, recorded.generalized))) != 0


def _agreement(
    blocks: Blocks, varies: Bool[np.ndarray, " neuron"], count: int, *, by_size: bool
) -> dict[str, Float[np.ndarray, " split"]]:
    """Both figures of every halving, and the same with labels swapped."""
    found: dict[str, list[np.ndarray]] = {"spearman": [], "overlap": [], "null_spearman": [], "null_overlap": []}
    for scores in blocks:
        halves = np.split(scores[:, varies], 4)
        for prefix, (a, b) in (("", halves[:2]), ("null_", halves[2:])):
            # A half in which no neuron varies ranks none, and agrees with nothing.
            ranks = [rankdata(half, axis=1) for half in (a, b)]
            found[f"{prefix}spearman"].append(np.nan_to_num(row_correlation(*ranks)))
            tops = [largest(half if by_size else rank, count) for half, rank in zip((a, b), ranks, strict=True)]
            found[f"{prefix}overlap"].append((tops[0] & tops[1]).sum(1) / count)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _require_items(n_pairs: int, n_items: int) -> None:
    if n_items < MINIMUM_ITEMS:
        raise PairsError(
            CALL,
            expected=f"pairs of at least {MINIMUM_ITEMS} items, so that each half has {MINIMUM_PAIRS}",
            received=f"{n_pairs} pairs of {n_items} items",
            fix="Give more pairs, or split=None for all of them.",
        )

"""Collect the prompts on which behaviour flips when they are rephrased.

Does not know activations.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.behavior import observe, observe_items
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.dealing import require_shares, same_prompts, split_items
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import Behavior, LensModel
from memgen_lens.models.guard import lens_model


@arguments(
    model=lens_model("collect_pairs"),
    task=kinds.one(PromptPairs) | kinds.TaskLike,
    seed=kinds.Seed,
    shares=kinds.Parts,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def collect_pairs(
    model: LensModel,
    task: Any,
    *,
    seed: int,
    shares: Sequence[float] = (0.4, 0.2),
    batch_size: int = 2048,
    progress: bool = True,
) -> PromptPairs:
    """Pairs of a memorized prompt that the model recalls and a rephrasing of it that the model computes.

    The paper's flips (arXiv 2412.18497, section 4): at most one pair per item and rephrasing. All memorized items are
    asked; the splits are dealt by item, and items that share a prompt are one, named by the first of their keys.

    Args:
        model: A HookedTransformer.
        task: A task (`memgen_lens.tasks`). Or a user's own pairs, asked as they are: those are kept on which the model
            shows both answers (or says two different things, where no answers are given), and dealt anew.
        seed: Seed of the split.
        shares: Shares of the flipping items in ``select`` and ``tune``; the rest is ``test``.
        batch_size: Prompts in one forward pass.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        The pairs, with the number of items asked and flipped. There may be few or none: whoever needs a split
        refuses it below 8 pairs.

    Raises:
        PairsError: The shares leave no pairs to test on.
    """
    require_shares(shares)
    if isinstance(task, PromptPairs):
        return _flipping(model, task, seed, shares, batch_size, progress)
    asked = observe(model, task, split="memorized", batch_size=batch_size, progress=progress)
    recalled = [outcome.item for outcome in asked if outcome.behavior is Behavior.MEMORIZATION]
    candidates = [(item, rephrased) for item in recalled for rephrased in task.rephrase(item)]
    asked_again = [rephrased for _, rephrased in candidates]
    answers = observe_items(model, task, asked_again, batch_size=batch_size, progress=progress)
    flips = [
        pair for pair, outcome in zip(candidates, answers, strict=True) if outcome.behavior is Behavior.GENERALIZATION
    ]
    # Items that share a prompt are one, whether both flip or not: asked alone, then as they stand in pairs.
    alone = [outcome.item for outcome in asked]
    sides = [*alone, *(item for item, _ in flips)], [*alone, *(rephrased for _, rephrased in flips)]
    keys = same_prompts([item.key for item in sides[0]], *([item.prompt for item in side] for side in sides))
    of_asked, of_flips = keys[: len(alone)], keys[len(alone) :]
    return PromptPairs(
        memorized=tuple(replace(item, key=key) for key, (item, _) in zip(of_flips, flips, strict=True)),
        generalized=tuple(replace(item, key=key) for key, (_, item) in zip(of_flips, flips, strict=True)),
        split=split_items(of_flips, shares=shares, seed=seed),
        n_items=len(set(of_asked)),
        n_flipped=len(set(of_flips)),
        n_items_by_task=Counter({key: item.task for key, item in zip(of_asked, alone, strict=True)}.values()),
    )


def _flipping(
    model: LensModel, pairs: PromptPairs, seed: int, shares: Sequence[float], batch_size: int, progress: bool
) -> PromptPairs:
    """Those of a user's pairs whose prompts show what they are labelled with, with their answers."""
    judge = Judge.of(model, None, pairs, batch_size=batch_size, progress=progress)
    right, _ = judge.shown(model, np.arange(len(pairs)), batch_size=batch_size)
    kept = judge.pairs.take(np.flatnonzero(right))
    keys = kept.item.tolist()
    split = split_items(keys, shares=shares, seed=seed)
    asked = {item.key: item.task for item in pairs.memorized}
    return replace(
        kept, split=split, n_items=len(asked), n_flipped=len(set(keys)), n_items_by_task=Counter(asked.values())
    )

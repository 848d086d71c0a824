"""Where in the prompt does steering work? The same steering at one position at a time.

Does not choose the steering; layer by layer, `sweep_steering` tries it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.recording.positions import aligned_tokens, held_positions, lengths_of, tokens_at
from memgen_lens.analysis.steering.intervention import drawn_pairs, steering_hooks
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.dynamics_records import RateSeries
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.position_records import PositionSteering
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.stats import wilson
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import At
from memgen_lens.models.step import greedy_tokens, keeps_past, rows_at_once
from memgen_lens.models.tokens import Batch, decode, in_batches

CALL = "steering_by_position"


@arguments(
    model=lens_model(CALL),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    steer=kinds.one(Steering),
    n_positions=kinds.Count | None,
    split=kinds.PairSplitName,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def steering_by_position(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    steer: Steering,
    *,
    n_positions: int | None = None,
    split: PairSplit = "test",
    batch_size: int = 2048,
    progress: bool = True,
) -> PositionSteering:
    """What a steering does, both ways, that acts at one position of the prompt and nowhere else.

    Positions are counted from the end of each prompt: the last is the answer position, where the steering's numbers
    come from and where ``positions="prompt"`` steers. Elsewhere the same is added, or set, that would be there. Nothing
    is steered in what is generated. A position that only some prompts have is judged on these.

    Args:
        model: A lens model, left without hooks also after an exception.
        task: The task that judges outputs; None for a user's own pairs.
        pairs: Prompt pairs.
        steer: The steering, in one layer or several (``Steering.from_scores(layers=...)``); its own ``positions`` are
            not used.
        n_positions: Positions from the end; default and at most: as many as 8 prompts of either side have.
        split: Pairs to report on.
        batch_size: Rows (positions x prompts) in one forward pass at most.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        Rates of each position, with n and 95 % intervals that count items.

    Raises:
        PairsError: The split holds fewer than 8 pairs that flip unsteered.
        SettingsError: The steering patches: activations to patch from are recorded at the answer position alone.
        SiteError: The model lacks the site.
    """
    if steer.setting.mode == "patch":
        raise SettingsError(
            CALL,
            expected="a steering of any mode but this",
            received="mode='patch'",
            fix="Patch by position with patching_map.",
        )
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    sides: dict[Direction, list[Item]] = {
        "generalization": judge.side("generalization", index),
        "memorization": judge.side("memorization", index),
    }
    tokens = {toward: aligned_tokens(model, items, prepend_bos=pairs.prepend_bos) for toward, items in sides.items()}
    lengths = {toward: lengths_of(rows) for toward, rows in tokens.items()}
    n = held_positions(np.minimum(*lengths.values()))
    n = n if n_positions is None else min(n, n_positions)
    asked = _Asked(model, steer, judge.max_new_tokens, batch_size, pairs.prepend_bos, progress)
    rates: dict[str, RateSeries] = {}
    for toward, items in sides.items():
        outputs = asked.outputs([item.prompt for item in items], n, toward)
        said = [[(item, output) for output in row] for item, row in zip(items, outputs, strict=True)]
        there = lengths[toward][:, None] >= np.arange(n, 0, -1)  # [prompt, pos]
        hits = np.array([[judge.behavior(*one) is Behavior(toward) for one in row] for row in said])
        rates[toward] = _series(hits, there, items)
        if toward == "memorization":
            forms = np.array([[judge.has_memorized_form(*one) for one in row] for row in said])
            rates["memorized_form"] = _series(forms, there, items)
    return PositionSteering(
        setting=steer.setting,
        to_generalization=rates["generalization"],
        exact_recall=rates["memorization"],
        memorized_form=rates["memorized_form"],
        tokens=tokens_at(model, tokens["generalization"], tokens["memorization"], n),
    )


@dataclass(frozen=True)
class _Asked:
    """How prompts are completed."""

    model: LensModel
    steer: Steering
    max_new_tokens: int
    batch_size: int
    prepend_bos: bool | None
    progress: bool

    def outputs(self, prompts: Sequence[str], n: int, toward: Direction) -> list[list[str]]:
        """What is said to each prompt, steered at each of its last ``n`` positions; "" where it has fewer."""
        distinct = list(dict.fromkeys(prompts))
        said = {prompt: [""] * n for prompt in distinct}
        how = {"batch_size": self.batch_size, "room": self.max_new_tokens, "prepend_bos": self.prepend_bos}
        with progress_bar(n * len(distinct), "steering", shown=self.progress) as bar:
            for whole in in_batches(self.model, distinct, **how):
                width = whole.tokens.shape[1]
                room = rows_at_once(self.model, width + self.max_new_tokens, cached=keeps_past(self.model))
                at_once = min(self.batch_size, room)
                for batch in whole.parts(at_once):
                    columns = torch.arange(max(0, width - n), width)
                    for some in columns.split(max(1, at_once // len(batch.index))):
                        texts = iter(self._steered(batch, some, toward))
                        for column in some.tolist():
                            for place in batch.index:
                                said[distinct[place]][column - width + n] = next(texts)
                    bar.update(n * len(batch.index))
        return [said[prompt] for prompt in prompts]

    def _steered(self, batch: Batch, columns: Int[Tensor, " copy"], toward: Direction) -> list[str]:
        """What is said to the prompts of a batch, in as many copies, each steered in one column."""
        copies, width = len(columns), batch.tokens.shape[1]
        chosen = torch.zeros(copies, len(batch.index), width, dtype=torch.bool)
        chosen[torch.arange(copies), :, columns] = True
        here: list[At | None] = [None]

        def before(step: int, span: slice) -> None:
            # With a cache the prompt is run once; without, it is run anew at each step, with what was generated.
            here[0] = At(span.stop, pad(chosen.flatten(0, 1), (0, span.stop - width))) if span.start == 0 else None

        drawn = drawn_pairs(self.steer, batch.index)
        pairs = None if drawn is None else np.tile(drawn, copies)
        hooks = steering_hooks(self.model, [self.steer], toward=toward, pairs=pairs, at=lambda: here[0])
        with self.model.hooks(fwd_hooks=hooks):
            new = greedy_tokens(
                self.model,
                batch.tokens.repeat(copies, 1),
                mask=batch.mask.repeat(copies, 1),
                max_new_tokens=self.max_new_tokens,
                before=before,
            )
        return decode(self.model, new)


def _series(
    hits: Bool[np.ndarray, "prompt pos"], there: Bool[np.ndarray, "prompt pos"], items: list[Item]
) -> RateSeries:
    """The rate at each position of the prompts that have it."""
    item = np.array(same_items(items))
    rates = [wilson(hits[has, column], item[has]) for column, has in enumerate(there.T)]
    low, high = np.array([rate.ci95 for rate in rates]).T
    return RateSeries(
        rate=np.array([rate.rate for rate in rates]),
        low=low,
        high=high,
        n=np.array([rate.n for rate in rates]),
        n_items=np.array([rate.n_items for rate in rates]),
    )

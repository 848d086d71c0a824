"""What separates answering in the form of a memory (mode) from giving this item's memory (content)?

Brings prompts that compute to recall by every means at hand, and counts both. Does not choose what is steered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.recording.positions import aligned_tokens, held_positions, lengths_of, tokens_at
from memgen_lens.analysis.recording.reading import at_answer_position
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.guard import Guard, picks
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.analysis.steering.streams import Patch, patched_outputs, stream_hooks
from memgen_lens.behavior import complete
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import PairsError
from memgen_lens.core.guard_records import plain_rate
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.mode_records import ModeContent, ModeRow, Source
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.stats import wilson
from memgen_lens.core.types import Behavior, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.sites import hook_of

CALL = "mode_and_content"


@arguments(
    model=lens_model(CALL),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    steerings=dict[str, kinds.one(Steering)] | None,
    guard=kinds.one(Guard) | None,
    split=kinds.PairSplitName,
    n_positions=kinds.Number0 | None,
    seed=kinds.Seed,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def mode_and_content(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    *,
    steerings: Mapping[str, Steering] | None = None,
    guard: Guard | None = None,
    split: PairSplit = "test",
    n_positions: int | None = None,
    seed: int = 0,
    batch_size: int = 2048,
    progress: bool = True,
) -> ModeContent:
    """How far computing prompts are brought to recall, by mode and content, under patches and steerings.

    The prompts are the pairs' rephrasings, which compute. *Mode*: the output has the form of a memorized answer, the
    item's own or not. *Content*: it is the item's own. Each prompt's residual stream is made that of its own recalling
    partner (activation patching; Meng et al. 2022, arXiv 2202.05262), after 0, 1, ... blocks, at the answer position,
    at all positions before it, at all, and at one position at a time; the prompt alone, never what is generated. All of
    it before the first block is the partner itself: the most that can be reached.

    The control is the same patch from *another* item's recalling prompt. What it reaches of the mode is no matter of
    the item; and ``of_source`` says how often it brings that other item's memory along, which is content as well, of
    the wrong item. The other item is drawn so that its memorized answer is neither answer of the patched one.

    Steerings towards memorization stand beside: on computing prompts, and on the recalling ones, whose content they may
    destroy. With a guard each steering is also shown as it acts where the guard picks (prompts that it expects to
    compute); the others stay as they are.

    Args:
        model: A lens model, left without hooks also after an exception.
        task: The task that judges outputs; None for a user's own pairs.
        pairs: Prompt pairs.
        steerings: By name, steerings to show beside: one shared shift, rules (`Steering.from_activations`).
        guard: A guard; its probe and threshold are used with each steering.
        split: Pairs to report on.
        n_positions: Positions that are patched one at a time, counted from the end; default and at most: as many as 8
            prompts have. 0 for none.
        seed: Seed of the choice of other items.
        batch_size: Rows (patches x prompts) in one forward pass at most.
        progress: Show a bar, should it take longer than two seconds.

    Returns:
        Shares with n and 95 % intervals that count items.

    Raises:
        PairsError: The split holds fewer than 8 pairs that flip unsteered, or fewer than 8 whose prompts are of equal
            length and can be patched from another item.
        SiteError: The model lacks a site.
    """
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    computing, recalling = judge.side("memorization", index), judge.side("generalization", index)
    asked = _Asked(model, judge, batch_size, progress)
    rows = [asked.plain("nothing", "computing", computing), asked.plain("nothing", "recalling", recalling)]
    for name, steering in (steerings or {}).items():
        for kind, items in (("computing", computing), ("recalling", recalling)):
            outputs = asked.steered(items, steering, index)
            rows.append(asked.row(name, kind, items, outputs))
            if guard is not None:
                picked = asked.picked(items, guard)
                guarded = [new if p else old for new, old, p in zip(outputs, asked.said(items), picked, strict=True)]
                rows.append(asked.row(f"guard + {name}", kind, items, guarded))
    tokens = [aligned_tokens(model, side, prepend_bos=pairs.prepend_bos) for side in (recalling, computing)]
    lengths = [lengths_of(side) for side in tokens]
    others = _others(computing, recalling, *lengths, rng=np.random.default_rng(seed))
    kept = np.flatnonzero(others >= 0)
    if len(kept) < MINIMUM_PAIRS:
        raise PairsError(
            CALL,
            expected=f"at least {MINIMUM_PAIRS} pairs whose two prompts have equally many tokens, each beside another "
            "item whose prompt is as long and whose memorized answer is none of the pair's",
            received=f"{len(kept)} of {len(index)}",
            fix="Rephrase so that lengths stay equal, and give items with memorized answers of their own.",
        )
    n = held_positions(lengths[1][kept])
    n = n if n_positions is None else min(n, n_positions)
    some = [computing[i] for i in kept]
    sources: dict[Source, list[Item]] = {
        "own": [recalling[i] for i in kept],
        "other": [recalling[others[i]] for i in kept],
    }
    widest = int(lengths[1][kept].max())
    rows += asked.patched(some, sources, n, widest)
    return ModeContent(
        rows=tuple(rows),
        tokens=tokens_at(model, tokens[0][kept], tokens[1][kept], max(n, 1)),
        n_depths=len(stream_hooks(model)),
        n=len(index),
        n_items=len(set(same_items(computing))),
        n_patched=len(kept),
        one_form=not any(
            judge.has_memorized_form(item, str(other.memorized_answer))
            for item, other in zip(some, sources["other"], strict=True)
        ),
    )


@dataclass(frozen=True)
class _Asked:
    """How prompts are completed and judged."""

    model: LensModel
    judge: Judge
    batch_size: int
    progress: bool

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.judge.max_new_tokens,
            "prepend_bos": self.judge.pairs.prepend_bos,
            "batch_size": self.batch_size,
        }

    def said(self, items: Sequence[Item]) -> list[str]:
        """What the model says by itself."""
        prompts = [item.prompt for item in items]
        return complete(self.model, prompts, progress=self.progress, stop=self.judge.pairs.stop, **self._how)

    def plain(self, name: str, prompts: Any, items: Sequence[Item]) -> ModeRow:
        """The row of doing nothing."""
        return self.row(name, prompts, items, self.said(items))

    def steered(self, items: Sequence[Item], steering: Steering, index: Int[np.ndarray, " pair"]) -> list[str]:
        """What it says steered towards memorization."""
        prompts = [item.prompt for item in items]
        how = {"toward": "memorization", "pairs": index, "progress": self.progress, **self._how}
        return steered_outputs(self.model, prompts, [steering], **how)[0]

    def picked(self, items: Sequence[Item], guard: Guard) -> list[bool]:
        """Which prompts a guard towards memorization steers."""
        name = hook_of(guard.probe.site, guard.probe.layer)
        how = {"batch_size": self.batch_size, "prepend_bos": self.judge.pairs.prepend_bos}
        rows = at_answer_position(self.model, [item.prompt for item in items], [name], **how)[name][:, 0]
        return picks(guard, guard.probe.log_odds(rows), "memorization").tolist()

    def patched(
        self, items: Sequence[Item], sources: Mapping[Source, Sequence[Item]], n_positions: int, widest: int
    ) -> list[ModeRow]:
        """A row for each source, depth and set of positions, then for each single position."""
        place = torch.arange(-widest, 0)
        columns: dict[str | int, torch.Tensor] = {
            "answer": place == -1,
            "before": place < -1,
            "all": place < 0,
            **{position: place == position for position in range(-n_positions, 0)},
        }
        depths = range(len(stream_hooks(self.model)))
        cells = [(depth, positions) for positions in columns for depth in depths]
        patches = [Patch(depth, columns[positions]) for depth, positions in cells]
        rows: list[ModeRow] = []
        with progress_bar(len(sources) * len(patches) * len(items), "patching", shown=self.progress) as bar:
            for source, others in sources.items():
                outputs = patched_outputs(
                    self.model,
                    [item.prompt for item in items],
                    [item.prompt for item in others],
                    patches,
                    done=bar.update,
                    **self._how,
                )
                for (depth, positions), said in zip(cells, outputs, strict=True):
                    name = f"patched from {'its own' if source == 'own' else 'another'} item"
                    beside = others if source == "other" else None
                    where = {"source": source, "depth": depth, "positions": positions}
                    rows.append(self.row(name, "computing", items, said, others=beside, **where))
        return rows

    def row(
        self,
        name: str,
        prompts: Any,
        items: Sequence[Item],
        outputs: Sequence[str],
        *,
        others: Sequence[Item] | None = None,
        **where: Any,
    ) -> ModeRow:
        """What some outputs show."""
        judge, item_of = self.judge, same_items(items)
        behaviors = [judge.behavior(i, o) for i, o in zip(items, outputs, strict=True)]
        shown = {
            "form": [judge.has_memorized_form(i, o) for i, o in zip(items, outputs, strict=True)],
            "recall": [b is Behavior.MEMORIZATION for b in behaviors],
            "rule": [b is Behavior.GENERALIZATION for b in behaviors],
        }
        if others is not None:
            both = zip(others, outputs, strict=True)
            shown["of_source"] = [judge.behavior(other, o) is Behavior.MEMORIZATION for other, o in both]
        rates = {what: plain_rate(wilson(hits, item_of)) for what, hits in shown.items()}
        return ModeRow(name, prompts, **rates, **where)


def _others(
    computing: Sequence[Item],
    recalling: Sequence[Item],
    own: Int[np.ndarray, " pair"],
    lengths: Int[np.ndarray, " pair"],
    *,
    rng: np.random.Generator,
) -> Int[np.ndarray, " pair"]:
    """For each pair another whose recalling prompt is as long and recalls neither of its answers; -1 for none.

    Args:
        computing: Prompts that are patched.
        recalling: Prompts that are patched from.
        own: Tokens of the recalling prompts.
        lengths: Tokens of the computing prompts.
        rng: What draws.
    """
    chosen = np.full(len(computing), -1)
    for place, item in enumerate(computing):
        if own[place] != lengths[place]:
            continue
        same = np.flatnonzero(own == lengths[place]).tolist()
        known = {item.rule_answer, item.memorized_answer}
        able = [
            i
            for i in same
            if (recalling[i].task, recalling[i].key) != (item.task, item.key)
            and recalling[i].memorized_answer not in known
        ]
        if able:
            chosen[place] = rng.choice(able)
    return chosen

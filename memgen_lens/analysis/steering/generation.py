"""What a model says to the same prompts under each of many steerings.

Does not judge the outputs (see `evaluation`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from memgen_lens.analysis.steering.intervention import drawn_pairs, steering_changes, steering_hooks
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.types import Direction, LensModel, Positions
from memgen_lens.fast.decoding import Intervention, can_change, greedy_copies
from memgen_lens.fast.support import is_plain
from memgen_lens.models.cache import Past
from memgen_lens.models.guard import require_lens_model
from memgen_lens.models.passes import At
from memgen_lens.models.sites import site_hooks
from memgen_lens.models.step import greedy_tokens, rows_at_once, run_before
from memgen_lens.models.tokens import Batch, by_length, decode, in_batches


def steered_outputs(
    model: LensModel,
    prompts: Sequence[str],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    max_new_tokens: int,
    pairs: Int[np.ndarray, " prompt"] | None = None,
    batch_size: int = 2048,
    use_cache: bool = True,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> list[list[str]]:
    """Greedy completions of the same prompts under each of several steerings.

    Steerings of one site, mode and positions share a forward pass: they ride in the batch dimension. Where they change
    nothing before the answer position, all of the prompt before it is run once, and its keys and values are reused. On
    a plain HookedTransformer the layers below the first that is changed run once for steerings that say the same.

    Args:
        model: A lens model.
        prompts: Prompts, the same for all steerings.
        steerings: Any number, of any sites.
        toward: The behaviour to push towards.
        max_new_tokens: Tokens generated at most.
        pairs: The source pair of each prompt, where values are taken from pairs (patched or resampled ones); prompts
            that are resampled without them take the draws in their order.
        batch_size: Rows (steerings x prompts) in one forward pass at most.
        use_cache: Keep keys and values while generating; without, the outputs are the same and slower.
        prepend_bos: See `memgen_lens.complete`.
        progress: Show a progress bar, should it take longer than two seconds.

    Returns:
        For each steering, one output a prompt.

    Raises:
        ModelError: The model is compiled or no lens model.
    """
    require_lens_model(model, call="steering")
    # A prompt with several rephrasings stands in several pairs, and says the same in all of them, unless it is patched.
    patched = pairs is not None and any(steering.source is not None for steering in steerings)
    keys = list(zip(prompts, np.asarray(pairs).tolist(), strict=True)) if patched else list(prompts)
    distinct = {key: place for place, key in reversed(list(enumerate(keys)))}
    kept = sorted(distinct.values())
    some = [prompts[place] for place in kept]
    sources = None if pairs is None else np.asarray(pairs)[kept]
    outputs = [[""] * len(prompts) for _ in steerings]
    asked = _Asked(model, some, steerings, toward, sources, max_new_tokens, batch_size, prepend_bos, use_cache)
    with progress_bar(len(some) * len(steerings), "steering", shown=progress) as bar:
        for index, members, new in asked.completed():
            texts = iter(decode(model, new))
            for i in members:
                for prompt in index:
                    outputs[i][kept[prompt]] = next(texts)
            bar.update(len(index) * len(members))
    return [[said[distinct[key]] for key in keys] for said in outputs]


Completed = tuple[Sequence[int], Sequence[int], Int[Tensor, "row new"]]
"""Prompts, steerings, and the new tokens of each prompt under each steering, steering after steering."""


@dataclass(frozen=True)
class _Asked:
    """What `steered_outputs` was asked for."""

    model: LensModel
    prompts: Sequence[str]
    steerings: Sequence[Steering]
    toward: Direction
    pairs: Int[np.ndarray, " prompt"] | None
    max_new_tokens: int
    batch_size: int
    prepend_bos: bool | None
    use_cache: bool

    def completed(self) -> Iterator[Completed]:
        """Everything, in any order; steerings of one kind together."""
        plain = self.use_cache and is_plain(self.model)
        fast, own = [], []
        for members in alike(self.steerings):
            setting = self.steerings[members[0]].setting
            goes = plain and setting.positions != "all" and can_change(site_hooks(self.model, setting.site))
            (fast if goes else own).append(members)
        yield from self._fast(fast) if fast else ()
        yield from self._own(own) if own else ()

    def _fast(self, kinds: Sequence[Sequence[int]]) -> Iterator[Completed]:
        """By the fast forward, prompts of one length at a time."""
        how = {"batch_size": self.batch_size, "prepend_bos": self.prepend_bos}
        for index, tokens in by_length(self.model, self.prompts, **how):
            for members in kinds:
                for block in in_blocks(members, self.batch_size // len(index)):
                    steerings, pairs = self._of(block, index)
                    changes = steering_changes(self.model, steerings, toward=self.toward, pairs=pairs)
                    positions = steerings[0].setting.positions
                    new = greedy_copies(
                        self.model,
                        tokens,
                        copies=len(block),
                        max_new_tokens=self.max_new_tokens,
                        eos=self.model.tokenizer.eos_token_id,
                        intervention=Intervention(
                            changes, first_only=positions == "prompt", later_only=positions == "generated"
                        ),
                    )
                    yield index, block, new.flatten(0, 1)

    def _own(self, kinds: Sequence[Sequence[int]]) -> Iterator[Completed]:
        """By the model's own forward, prompts of about one length at a time."""
        how = {"batch_size": self.batch_size, "room": self.max_new_tokens, "prepend_bos": self.prepend_bos}
        for whole in in_batches(self.model, self.prompts, **how):
            length = whole.tokens.shape[1] + self.max_new_tokens
            at_once = min(self.batch_size, rows_at_once(self.model, length, cached=self.use_cache))
            for batch in whole.parts(at_once):
                for members in kinds:
                    positions = self.steerings[members[0]].setting.positions
                    reuses = self.use_cache and positions != "all"
                    past = run_before(self.model, batch.tokens, batch.mask) if reuses else None
                    for block in in_blocks(members, at_once // len(batch.index)):
                        yield batch.index, block, self._complete(batch, block, past)

    def _complete(self, batch: Batch, block: Sequence[int], past: Past | None) -> Int[Tensor, "row new"]:
        steerings, pairs = self._of(block, batch.index)
        return completed_copies(
            self.model,
            batch,
            lambda at: steering_hooks(self.model, steerings, toward=self.toward, pairs=pairs, at=at),
            copies=len(block),
            positions=steerings[0].setting.positions,
            max_new_tokens=self.max_new_tokens,
            use_cache=self.use_cache,
            past=past,
        )

    def _of(self, block: Sequence[int], index: Sequence[int]) -> tuple[list[Steering], np.ndarray | None]:
        """Some steerings, and the source pairs of some prompts."""
        steerings = [self.steerings[i] for i in block]
        if self.pairs is None:
            return steerings, drawn_pairs(steerings[0], index)
        return steerings, np.asarray(self.pairs)[list(index)]


def completed_copies(
    model: LensModel,
    batch: Batch,
    hooks: Callable[[Callable[[], At | None]], list[tuple[Any, Callable[..., Any]]]],
    *,
    copies: int,
    positions: Positions,
    max_new_tokens: int,
    use_cache: bool = True,
    past: Past | None = None,
) -> Int[Tensor, "row new"]:
    """Greedy continuations of copies of a batch's prompts under hooks, by the model's own forward, copy after copy.

    Args:
        model: A lens model.
        batch: Prompts.
        hooks: Makes the hooks, given what they ask for the positions of the running pass that are changed.
        copies: Copies of each prompt, which the hooks tell apart.
        positions: Where they change something.
        max_new_tokens: Tokens generated at most.
        use_cache: See `memgen_lens.models.step.greedy_tokens`.
        past: What has been run of all but the prompts' last token, of one copy; it is left as it is.
    """
    answer = batch.tokens.shape[1] - 1
    here: list[At | None] = [None]

    def before(step: int, span: slice) -> None:
        begin = answer + 1 if positions == "generated" else answer
        first = span.start if positions == "all" else max(begin, span.start)
        stop = min(answer + 1, span.stop) if positions == "prompt" else span.stop
        chosen = slice(first - span.start, stop - span.start)
        here[0] = At(span.stop - span.start, chosen) if first < stop else None

    with model.hooks(fwd_hooks=hooks(lambda: here[0])):
        return greedy_tokens(
            model,
            batch.tokens.repeat(copies, 1),
            mask=batch.mask.repeat(copies, 1),
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            past=None if past is None else past.repeated(copies, room=max_new_tokens),
            before=before,
        )


def alike(steerings: Sequence[Steering]) -> list[list[int]]:
    """Places of the steerings of each kind, which can ride in one batch."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, steering in enumerate(steerings):
        setting, taken = steering.setting, (id(steering.source), id(steering.draw))
        kind = (setting.site, setting.positions, setting.mode, steering.selected.shape, taken)
        kinds.setdefault(kind, []).append(i)
    return list(kinds.values())


def in_blocks(members: Sequence[int], at_once: int) -> Iterator[Sequence[int]]:
    """Members in blocks of at most so many, at least one."""
    step = max(1, at_once)
    for first in range(0, len(members), step):
        yield members[first : first + step]

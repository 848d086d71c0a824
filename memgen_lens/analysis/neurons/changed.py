"""What a model says to prompts under changes of single neurons, which ride in the batch dimension.

Does not judge what is said, nor choose the changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.analysis.steering.generation import completed_copies, in_blocks
from memgen_lens.analysis.steering.hooks import change_hooks
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.types import LensModel
from memgen_lens.fast.decoding import Change, Intervention, can_change, greedy_copies
from memgen_lens.fast.support import is_plain
from memgen_lens.models.step import rows_at_once, run_before
from memgen_lens.models.tokens import by_length, decode, in_batches


@dataclass(frozen=True)
class Scaled:
    """One neuron made another: ``h_i <- factor * h_i + offset``.

    Attributes:
        hook: Full hook-point name.
        neuron: Coordinate of its last axis, heads flattened into it.
        factor: 0 forgets what it was.
        offset: What is added, in units of the activation.
    """

    hook: str
    neuron: int
    factor: float
    offset: float = 0.0


def changed_outputs(
    model: LensModel,
    prompts: Sequence[str],
    changes: Sequence[Scaled | None],
    widths: Mapping[str, int],
    *,
    max_new_tokens: int,
    batch_size: int,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> list[list[str]]:
    """Greedy completions of the same prompts under each change, from the answer position on.

    All of a prompt before its answer position is run once for all changes.

    Args:
        model: A lens model.
        prompts: Prompts, the same for all changes.
        changes: Any number; None changes nothing.
        widths: Neurons of each hook point.
        max_new_tokens: Tokens generated at most.
        batch_size: Rows (changes x prompts) in one forward pass at most.
        prepend_bos: See `memgen_lens.complete`.
        progress: Show a progress bar, should it take longer than two seconds.

    Returns:
        For each change, one output a prompt.
    """
    distinct = list(dict.fromkeys(prompts))  # a prompt with several rephrasings stands in several pairs
    said: list[dict[str, str]] = [{} for _ in changes]
    how = (model, distinct, changes, widths, max_new_tokens, batch_size, prepend_bos)
    with progress_bar(len(distinct) * len(changes), "changing neurons", shown=progress) as bar:
        for index, block, new in _completed(*how):
            texts = iter(decode(model, new))
            for number in block:
                said[number] |= {distinct[place]: next(texts) for place in index}
            bar.update(len(index) * len(block))
    return [[texts[prompt] for prompt in prompts] for texts in said]


def _completed(
    model: LensModel,
    prompts: Sequence[str],
    changes: Sequence[Scaled | None],
    widths: Mapping[str, int],
    max_new_tokens: int,
    batch_size: int,
    prepend_bos: bool | None,
) -> Iterator[tuple[Sequence[int], Sequence[int], Int[Tensor, "row new"]]]:
    """Prompts, changes, and the new tokens of each prompt under each change, change after change."""
    numbers, batching = range(len(changes)), {"batch_size": batch_size, "prepend_bos": prepend_bos}
    hooks = list(widths)
    if is_plain(model) and can_change(hooks):
        for index, tokens in by_length(model, prompts, **batching):
            for block in in_blocks(numbers, batch_size // len(index)):
                how = {"max_new_tokens": max_new_tokens, "eos": model.tokenizer.eos_token_id}
                intervention = Intervention(_together([changes[i] for i in block], widths))
                new = greedy_copies(model, tokens, copies=len(block), intervention=intervention, **how)
                yield index, block, new.flatten(0, 1)
        return
    for whole in in_batches(model, prompts, room=max_new_tokens, **batching):
        at_once = min(batch_size, rows_at_once(model, whole.tokens.shape[1] + max_new_tokens))
        for batch in whole.parts(at_once):
            past = run_before(model, batch.tokens, batch.mask)
            for block in in_blocks(numbers, at_once // len(batch.index)):
                some = _together([changes[i] for i in block], widths)
                copies = len(block)
                new = completed_copies(
                    model,
                    batch,
                    lambda at, some=some, copies=copies: change_hooks(some, at=at, n_copies=copies),
                    copies=copies,
                    positions="answer",
                    max_new_tokens=max_new_tokens,
                    past=past,
                )
                yield batch.index, block, new


def _together(changes: Sequence[Scaled | None], widths: Mapping[str, int]) -> dict[str, Change]:
    """What is done to the copies at each hook point."""
    made: dict[str, Change] = {}
    for hook in dict.fromkeys(change.hook for change in changes if change is not None):
        factor, offset = torch.ones(len(changes), widths[hook]), torch.zeros(len(changes), widths[hook])
        for copy, change in enumerate(changes):
            if change is not None and change.hook == hook:
                factor[copy, change.neuron], offset[copy, change.neuron] = change.factor, change.offset
        made[hook] = _scaling(factor, offset)
    return made


def _scaling(factor: Float[Tensor, "copy neuron"], offset: Float[Tensor, "copy neuron"]) -> Change:
    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal factor, offset
        factor, offset = factor.to(h.device), offset.to(h.device)
        return h * factor[copy] + offset[copy]

    return change

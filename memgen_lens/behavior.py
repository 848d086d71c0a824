"""Complete prompts greedily and classify the outputs: all that training and analysis share.

Works on any HookedTransformer (and on whatever else meets the `LensModel` protocol), through its own forward, so that
every hook fires. Does not know what the outputs are used for.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.matching import as_stops, cut
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.types import LensModel, Split
from memgen_lens.fast.decoding import Intervention, greedy_copies
from memgen_lens.fast.support import is_plain
from memgen_lens.models.guard import lens_model
from memgen_lens.models.step import greedy_tokens, rows_at_once
from memgen_lens.models.tokens import by_length, decode, in_batches


@arguments(
    model=lens_model("observe"),
    task=kinds.TaskLike,
    split=kinds.SplitName,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def observe(
    model: LensModel, task: Any, *, split: Split = "memorized", batch_size: int = 2048, progress: bool = True
) -> list[Outcome]:
    """What a model answers to every prompt of a task's split.

    Args:
        model: A HookedTransformer with a tokenizer that covers the task's texts.
        task: A task (`memgen_lens.tasks`).
        split: ``"memorized"``, ``"rephrased"``, ``"heldout"`` or ``"validation"``.
        batch_size: Prompts in one forward pass.
        progress: Show a progress bar, should it take longer than two seconds.

    Returns:
        One outcome a prompt, in the order of ``task.items(split)``.

    Raises:
        TaskError: The task has no such split.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    return observe_items(model, task, task.items(split), batch_size=batch_size, progress=progress)


def observe_items(
    model: LensModel, task: Any, items: Sequence[Item], *, batch_size: int = 2048, progress: bool = True
) -> list[Outcome]:
    """What a model answers to the prompts of some items; see `observe`."""
    outputs = complete(
        model,
        [item.prompt for item in items],
        max_new_tokens=answer_tokens(model, task),
        batch_size=batch_size,
        progress=progress,
    )
    return [
        Outcome(item, output, task.classify(item, output), task.is_memorized_form(item, output))
        for item, output in zip(items, outputs, strict=True)
    ]


def answer_tokens(model: LensModel, task: Any) -> int:
    """Tokens of a task's longest answer under a model's tokenizer, the end-of-text token counted.

    An object that is no `memgen_lens.tasks.Task` need not know tokenizers: what it declares is taken.
    """
    if model.tokenizer is None or not hasattr(task, "answer_tokens"):
        return task.max_answer_tokens
    return task.answer_tokens(model.tokenizer)


@arguments(
    model=lens_model("complete"),
    prompts=kinds.Texts,
    max_new_tokens=kinds.Count,
    batch_size=kinds.Count,
    prepend_bos=kinds.Flag | None,
    use_cache=kinds.Flag,
    progress=kinds.Flag,
    stop=kinds.Texts,
)
def complete(
    model: LensModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 2048,
    prepend_bos: bool | None = None,
    use_cache: bool = True,
    progress: bool = True,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """Greedy completions of prompts, without the prompt and the end-of-text token.

    A batch gives each prompt what it would get alone: its prompts are of about one length, padding is masked, and
    positions are counted without it.

    Args:
        model: A lens model with a tokenizer.
        prompts: Any number of prompts.
        max_new_tokens: Tokens generated at most, the end-of-text token counted.
        batch_size: Prompts in one forward pass.
        prepend_bos: Whether a begin-of-text token is put before each prompt that does not begin with it. Default: what
            a HookedTransformer's or native Bridge's ``cfg.default_prepend_bos`` says, and on another Bridge what the
            Hugging Face model's own tokenizer does.
        use_cache: Keep keys and values while generating; without, the outputs are the same and slower.
        progress: Show a progress bar, should it take longer than two seconds.
        stop: Texts that end a completion: it is cut before the first of them, after it is generated.

    Raises:
        ModelError: The model is compiled or no lens model, the tokenizer lacks a character, or model and tokens are on
            different devices.
        PairsError: A text of ``stop`` is empty.
    """
    call = "complete"
    stops = as_stops(stop, call=call)
    outputs = [""] * len(prompts)
    with progress_bar(len(prompts), "completing", shown=progress) as bar:
        for index, new in _greedy(model, prompts, max_new_tokens, batch_size, prepend_bos, use_cache):
            for i, text in zip(index, decode(model, new), strict=True):
                outputs[i] = cut(text, stops)
            bar.update(len(index))
    return outputs


def _greedy(
    model: LensModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    prepend_bos: bool | None,
    use_cache: bool,
) -> Iterator[tuple[list[int], Int[Tensor, "batch new"]]]:
    """New tokens batch by batch, by the fast forward where no hook is to fire."""
    if use_cache and is_plain(model):
        for index, tokens in by_length(model, prompts, batch_size=batch_size, prepend_bos=prepend_bos):
            how = {"copies": 1, "max_new_tokens": max_new_tokens, "eos": model.tokenizer.eos_token_id}
            yield index, greedy_copies(model, tokens, intervention=Intervention({}), **how)[0]
        return
    for whole in in_batches(model, prompts, batch_size=batch_size, room=max_new_tokens, prepend_bos=prepend_bos):
        for batch in whole.parts(rows_at_once(model, whole.tokens.shape[1] + max_new_tokens, cached=use_cache)):
            how = {"mask": batch.mask, "max_new_tokens": max_new_tokens, "use_cache": use_cache}
            yield batch.index, greedy_tokens(model, batch.tokens, **how)

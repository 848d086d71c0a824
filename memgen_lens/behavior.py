"""Complete prompts greedily and classify the outputs: all that training and analysis share.

Works on any HookedTransformer (and on whatever else meets the `LensModel` protocol), through its own forward, so that
every hook fires. Does not know what the outputs are used for.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.matching import as_stops, cut
from memgen_lens.core.types import LensModel, Split
from memgen_lens.fast.decoding import Intervention, greedy_copies
from memgen_lens.fast.support import is_plain
from memgen_lens.models.step import greedy_tokens
from memgen_lens.models.tokens import by_length, decode


def observe(model: LensModel, task: Any, *, split: Split = "memorized", batch_size: int = 2048) -> list[Outcome]:
    """What a model answers to every prompt of a task's split.

    Args:
        model: A HookedTransformer with a tokenizer that covers the task's texts.
        task: A task (`memgen_lens.tasks`).
        split: ``"memorized"``, ``"rephrased"``, ``"heldout"`` or ``"validation"``.
        batch_size: Prompts in one forward pass.

    Returns:
        One outcome a prompt, in the order of ``task.items(split)``.

    Raises:
        TaskError: The task has no such split.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    return observe_items(model, task, task.items(split), batch_size=batch_size)


def observe_items(model: LensModel, task: Any, items: Sequence[Item], *, batch_size: int = 2048) -> list[Outcome]:
    """What a model answers to the prompts of some items; see `observe`."""
    outputs = complete(
        model, [item.prompt for item in items], max_new_tokens=task.max_answer_tokens, batch_size=batch_size
    )
    return [
        Outcome(item, output, task.classify(item, output), task.is_memorized_form(item, output))
        for item, output in zip(items, outputs, strict=True)
    ]


def complete(
    model: LensModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 2048,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """Greedy completions of prompts, without the prompt and the end-of-text token.

    Prompts are grouped by their length in tokens rather than padded, so that a batch gives each prompt what it would
    get alone.

    Args:
        model: A HookedTransformer with a tokenizer.
        prompts: Any number of prompts.
        max_new_tokens: Tokens generated at most, the end-of-text token counted.
        batch_size: Prompts in one forward pass.
        stop: Texts that end a completion: it is cut before the first of them, after it is generated.

    Raises:
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
        PairsError: A text of ``stop`` is empty.
    """
    stops = as_stops(stop, call="complete")
    outputs = [""] * len(prompts)
    for index, tokens in by_length(model, prompts, batch_size=batch_size):
        new = _greedy(model, tokens, max_new_tokens=max_new_tokens)
        for i, text in zip(index, decode(model, new), strict=True):
            outputs[i] = cut(text, stops)
    return outputs


def _greedy(model: LensModel, tokens: Int[Tensor, "batch pos"], *, max_new_tokens: int) -> Int[Tensor, "batch new"]:
    """`greedy_tokens`, by the fast forward where no hook is to fire."""
    if not is_plain(model):
        return greedy_tokens(model, tokens, max_new_tokens=max_new_tokens)
    how = {"copies": 1, "max_new_tokens": max_new_tokens, "eos": model.tokenizer.eos_token_id}
    return greedy_copies(model, tokens, intervention=Intervention({}), **how)[0]

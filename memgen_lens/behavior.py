"""Complete prompts greedily and classify the outputs: all that training and analysis share.

Works on any HookedTransformer (and on whatever else meets the `LensModel` protocol), through its own forward, so that
every hook fires. Does not know what the outputs are used for.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.core.types import LensModel, Split
from memgen_lens.fast.decoding import Intervention, greedy_copies
from memgen_lens.fast.products import fast_products
from memgen_lens.fast.support import is_plain, require_room

with quiet_imports():
    from transformer_lens import HookedTransformer, TransformerLensKeyValueCache
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry


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


def complete(model: LensModel, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 2048) -> list[str]:
    """Greedy completions of prompts, without the prompt and the end-of-text token.

    Prompts are grouped by their length in tokens rather than padded, so that a batch gives each prompt what it would
    get alone.

    Args:
        model: A HookedTransformer with a tokenizer.
        prompts: Any number of prompts.
        max_new_tokens: Tokens generated at most, the end-of-text token counted.
        batch_size: Prompts in one forward pass.

    Raises:
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    outputs = [""] * len(prompts)
    for index, tokens in by_length(model, prompts, batch_size=batch_size):
        new = _greedy(model, tokens, max_new_tokens=max_new_tokens)
        for i, text in zip(index, decode(model, new), strict=True):
            outputs[i] = text
    return outputs


def _greedy(model: LensModel, tokens: Int[Tensor, "batch pos"], *, max_new_tokens: int) -> Int[Tensor, "batch new"]:
    """`greedy_tokens`, by the fast forward where no hook is to fire."""
    if not is_plain(model):
        return greedy_tokens(model, tokens, max_new_tokens=max_new_tokens)
    how = {"copies": 1, "max_new_tokens": max_new_tokens, "eos": model.tokenizer.eos_token_id}
    return greedy_copies(model, tokens, intervention=Intervention({}), **how)[0]


def by_length(
    model: LensModel, prompts: Sequence[str], *, batch_size: int
) -> list[tuple[list[int], Int[Tensor, "batch pos"]]]:
    """Tokenize prompts and batch them with others of the same length.

    Returns:
        For each batch the indices of its prompts and their tokens ``[batch, pos]``, nothing padded.

    Raises:
        ModelError: The model has no tokenizer, the tokenizer lacks a character, a prompt is empty or longer than the
            context, or model and tokens are on different devices.
    """
    if not prompts:
        return []
    tokens, lengths = tokenized(model, prompts)
    batches = []
    for length in torch.unique(lengths).tolist():
        same = (lengths == length).nonzero().flatten().split(batch_size)
        batches += [(index.tolist(), tokens[index.to(tokens.device), :length]) for index in same]
    return batches


@torch.inference_mode()
def greedy_tokens(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    prefix: TransformerLensKeyValueCache | None = None,
    during: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
) -> Int[Tensor, "batch new"]:
    """Greedy continuations of prompts of one length, until all have ended or ``max_new_tokens`` are made.

    Args:
        model: Model with a tokenizer that has an end-of-text token.
        tokens: Prompts.
        max_new_tokens: Tokens generated at most.
        use_cache: Keep keys and values (a HookedTransformer only; others run the whole sequence every time).
        prefix: Keys and values of all but the prompts' last token (see `prefix_cache`), which are then not run again;
            it is added to.
        during: Context that the forward pass of each step runs in, by step.

    Returns:
        New tokens; after a sequence's end, end-of-text tokens.

    Raises:
        ModelError: A sequence has not ended where the model's context does.
    """
    eos = model.tokenizer.eos_token_id
    cache = prefix
    if cache is None and use_cache and isinstance(model, HookedTransformer):
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, len(tokens))
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    sequence, inputs = tokens, tokens if prefix is None else tokens[:, -1:]
    for step in range(max_new_tokens):
        require_room(sequence.shape[1], model.cfg.n_ctx, prompt_length=tokens.shape[1])
        # An explicit mask: TransformerLens would otherwise take generated end-of-text tokens for padding.
        extra = {"attention_mask": torch.ones_like(inputs)}
        extra |= {"past_kv_cache": cache} if cache is not None else {}
        with during(step), fast_products(model):
            logits = model(inputs, **extra)
        new = logits[:, -1].argmax(-1).masked_fill(ended, eos)
        ended |= new == eos
        sequence = torch.cat([sequence, new[:, None]], dim=1)
        inputs = new[:, None] if cache is not None else sequence
        if bool(ended.all()):
            break
    return sequence[:, tokens.shape[1] :]


@torch.inference_mode()
def prefix_cache(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> TransformerLensKeyValueCache:
    """Keys and values of all but the last token of prompts of one length, for `greedy_tokens`."""
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, len(tokens))
    before = tokens[:, :-1]
    if before.shape[1]:
        with fast_products(model):
            model(before, attention_mask=torch.ones_like(before), past_kv_cache=cache, return_type=None)
    return cache


def repeat_cache(cache: TransformerLensKeyValueCache, copies: int, *, room: int) -> TransformerLensKeyValueCache:
    """The keys and values of a batch repeated, copy after copy; the cache itself is left as it is.

    Args:
        cache: Keys and values of a batch.
        copies: How often to repeat them.
        room: Positions that are going to be added.
    """
    return TransformerLensKeyValueCache(
        entries=[_RoomyEntry.of(entry, copies, room) for entry in cache.entries],
        previous_attention_mask=cache.previous_attention_mask.repeat(copies, 1),
    )


@dataclass
class _RoomyEntry(TransformerLensKeyValueCacheEntry):
    """Keys and values of one layer with room for what is added, where TransformerLens' own copies all of them anew."""

    buffers: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, entry: TransformerLensKeyValueCacheEntry, copies: int, room: int) -> "_RoomyEntry":
        n = entry.past_keys.shape[1]
        buffers = []
        for past in (entry.past_keys, entry.past_values):
            batch, _, *rest = past.shape
            buffer = past.new_empty(copies, batch, n + room, *rest)
            buffer[:, :, :n] = past
            buffers.append(buffer.flatten(0, 1))
        return cls(buffers[0][:, :n], buffers[1][:, :n], buffers=buffers)

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        n = self.past_keys.shape[1]
        end = n + new_keys.shape[1]
        for buffer, new in zip(self.buffers, (new_keys, new_values), strict=True):
            buffer[:, n:end] = new
        self.past_keys, self.past_values = (buffer[:, :end] for buffer in self.buffers)
        return self.past_keys, self.past_values


def decode(model: LensModel, tokens: Int[Tensor, "batch new"]) -> list[str]:
    """Generated tokens as text, up to the first end-of-text token."""
    eos = model.tokenizer.eos_token_id
    rows = list(map(tuple, tokens.tolist()))
    distinct = list(dict.fromkeys(rows))  # of many prompts under many settings, few say something new
    texts = model.tokenizer.batch_decode(
        [row[: row.index(eos)] if eos in row else row for row in distinct], clean_up_tokenization_spaces=False
    )
    text_of = dict(zip(distinct, texts, strict=True))
    return [text_of[row] for row in rows]


def tokenized(model: LensModel, prompts: Sequence[str]) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, " prompt"]]:
    """Tokens, padded on the right, and the length of each prompt; errors as in `by_length`."""
    call = "tokenizing prompts"
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ModelError(
            call,
            expected="a model whose tokenizer has an end-of-text token",
            received="no tokenizer" if tokenizer is None else "a tokenizer without eos_token",
            fix="Pass one when the model is made: HookedTransformer(cfg, tokenizer=tokenizer).",
        )
    encoded = _encoded(tokenizer, list(prompts))
    unknown = tokenizer.unk_token_id
    has_unknown = unknown is not None and unknown != tokenizer.eos_token_id
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids or (has_unknown and unknown in ids):
            lacking = _unknown_pieces(tokenizer, prompt) if has_unknown else []
            raise ModelError(
                call,
                expected="non-empty prompts over the tokenizer's vocabulary",
                received=repr(prompt) + (f", in which {', '.join(map(repr, lacking))} has no token" if lacking else ""),
                fix="Use the tokenizer of the task that the model was trained on, or change the prompt.",
            )
    # TransformerLens may put a begin-of-text token before every prompt; the first prompt tells.
    own = model.to_tokens(prompts[0], truncate=False)
    extra = own.shape[1] - len(encoded[0])
    sizes = np.array([len(ids) + extra for ids in encoded])
    lengths = torch.from_numpy(sizes)
    if own[0, extra:].tolist() == encoded[0]:
        tokens = np.full((len(encoded), int(sizes.max())), tokenizer.eos_token_id)
        tokens[:, :extra] = own[0, :extra].tolist()
        tokens[:, extra:][np.arange(sizes.max() - extra) < sizes[:, None] - extra] = list(chain.from_iterable(encoded))
    else:  # a tokenizer that adds something behind the prompts as well
        tokens = model.to_tokens(list(prompts), padding_side="right", truncate=False).cpu().numpy()
    if int(lengths.max()) > model.cfg.n_ctx:
        raise ModelError(
            call,
            expected=f"prompts of at most {model.cfg.n_ctx} tokens, the model's context",
            received=f"{int(lengths.max())} tokens: {prompts[int(lengths.argmax())]!r}"[:160],
            fix="Shorten the prompt.",
        )
    on_device = torch.from_numpy(tokens).to(own.device)
    require_same_device(model, on_device)
    return on_device, lengths


def _encoded(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, nothing added."""
    if not tokenizer.is_fast:
        return tokenizer(prompts, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer  # without what transformers makes of each encoding: half of the time
    backend.no_padding()  # that another call may have left behind; transformers sets its own at each call
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(prompts, add_special_tokens=False)]


def _unknown_pieces(tokenizer: Any, text: str) -> list[str]:
    """The pieces of a text that a tokenizer has no token for."""
    if not tokenizer.is_fast:
        return [
            c for c in dict.fromkeys(text) if tokenizer.unk_token_id in tokenizer.encode(c, add_special_tokens=False)
        ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return list(dict.fromkeys(text[start:end] for token, (start, end) in places if token == tokenizer.unk_token_id))


def require_same_device(model: LensModel, tokens: Tensor) -> None:
    """Refuse tokens on another device than the model's weights.

    Raises:
        ModelError: Saying where each is.
    """
    weights = next(iter(model.parameters()), tokens)
    if weights.device.type != tokens.device.type:
        raise ModelError(
            "running the model",
            expected="model and tokens on one device",
            received=f"weights on {weights.device}, tokens on {tokens.device}",
            fix="Move the model with model.to(device), which also tells model.cfg.device.",
        )

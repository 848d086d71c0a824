"""Greedy generation through a model's own forward, with its key-value cache, so that every hook fires.

Does not know what is hooked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.quiet import quiet_imports
from memgen_lens.core.types import LensModel
from memgen_lens.fast.products import fast_products
from memgen_lens.fast.support import is_hooked_transformer, require_room

with quiet_imports():
    from transformer_lens import TransformerLensKeyValueCache
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry


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
    if cache is None and use_cache and is_hooked_transformer(model):
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
def prefix_cache(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> TransformerLensKeyValueCache:
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

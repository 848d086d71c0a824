"""Keys and values of positions that have been run: TransformerLens' cache, or transformers' on a Bridge.

Does not run a model.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.quiet import quiet_imports
from memgen_lens.fast.support import is_hooked_transformer

with quiet_imports():
    from transformer_lens import TransformerLensKeyValueCache
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
    from transformers import DynamicCache


@dataclass
class Past:
    """What has been run of some sequences; a step adds to it.

    Attributes:
        cache: TransformerLens' keys and values (a HookedTransformer's) or transformers' (a Bridge's).
        mask: 1 for a token, 0 for padding, of all positions that have been run.
    """

    cache: Any
    mask: Int[Tensor, "batch pos"]

    @classmethod
    def of_nothing(cls, model: Any, batch: int, device: torch.device) -> "Past":
        """An empty past."""
        mask = torch.ones(batch, 0, dtype=torch.long, device=device)
        if is_hooked_transformer(model):
            return cls(TransformerLensKeyValueCache.init_cache(model.cfg, device, batch), mask)
        config = getattr(model.original_model, "config", None)
        return cls(DynamicCache(config=config) if config is not None else DynamicCache(), mask)

    @property
    def is_whole(self) -> bool:
        """Whether the model did keep what was run (with a transformers that Bridges do not know, it may not)."""
        if isinstance(self.cache, TransformerLensKeyValueCache):
            return True
        return self.cache.get_seq_length() == self.mask.shape[1]

    def repeated(self, copies: int, *, room: int) -> "Past":
        """The past of a batch repeated, copy after copy; this one is left as it is.

        Args:
            copies: How often to repeat it.
            room: Positions that are going to be added.
        """
        mask = self.mask.repeat(copies, 1)
        if isinstance(self.cache, TransformerLensKeyValueCache):
            cache = TransformerLensKeyValueCache(
                entries=[_RoomyEntry.of(entry, copies, room) for entry in self.cache.entries],
                previous_attention_mask=self.cache.previous_attention_mask.repeat(copies, 1),
            )
            return Past(cache, mask)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (part.repeat(copies, 1, 1, 1) for part in (layer.keys, layer.values))
        return Past(cache, mask)


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

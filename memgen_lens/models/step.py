"""One forward step through a model's own forward, with its key-value cache, so that every hook fires.

For both of TransformerLens' kinds of model. Does not know what is hooked.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.core.types import LensModel
from memgen_lens.fast.products import fast_products
from memgen_lens.fast.support import is_hooked_transformer, require_room
from memgen_lens.models.cache import Past
from memgen_lens.models.tokens import input_device

LOGITS_AT_ONCE = 1 << 27
"""Logits of one forward pass at least (512 MiB of float32)."""
CACHE_AT_ONCE = 1 << 26
"""Numbers that the keys and values of one batch may hold at least (256 MiB of float32)."""
SHARE = 4
"""On a CUDA device either may take one part in so many of the memory that is free."""


def rows_at_once(model: LensModel, length: int, *, cached: bool = True, n: int = 1) -> int:
    """Rows of ``length`` positions that one forward pass may hold, so that logits and cache stay within bounds.

    Args:
        model: A lens model.
        length: Positions of a row, those in the cache included.
        cached: Whether keys and values are kept.
        n: Positions whose logits are asked for.
    """
    cfg = model.cfg
    vocabulary = max(int(getattr(cfg, "d_vocab_out", -1) or -1), int(cfg.d_vocab), 1)
    logits = vocabulary * (n if _keeps_last_logits(model) else length)
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    past = 2 * cfg.n_layers * heads * cfg.d_head * length if cached else 1
    room = numbers_at_once(input_device(model))
    return max(1, min(max(LOGITS_AT_ONCE, room) // logits, max(CACHE_AT_ONCE, room) // max(past, 1)))


def numbers_at_once(device: torch.device) -> int:
    """Numbers of four bytes that a share of a CUDA device's free memory holds; 0 elsewhere, where speed is the bound.

    A power of two, so that what is free may change a little and batches, and so rounding, stay as they are.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return 1 << max(0, (free // (4 * SHARE)).bit_length() - 1)


def forward(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Past | None = None,
) -> Float[Tensor, "batch d_vocab"]:
    """Logits behind the last position; ``past`` is added to. See `last_logits`."""
    return last_logits(model, tokens, mask, past)[:, -1]


def last_logits(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    past: Past | None = None,
    *,
    n: int = 1,
) -> Float[Tensor, "batch last d_vocab"]:
    """Logits behind the last ``n`` positions; ``past`` is added to.

    Args:
        model: A lens model.
        tokens: Tokens behind the past, padded on the left if at all.
        mask: 1 for a token, 0 for padding; TransformerLens would otherwise take an end-of-text token for padding.
        past: What has been run of the same sequences.
        n: Positions, at most as many as are run.
    """
    if is_hooked_transformer(model):
        cache = {} if past is None else {"past_kv_cache": past.cache}
        with fast_products(model):
            logits = model(tokens, attention_mask=mask, **cache)
    else:
        whole = mask if past is None else torch.cat([past.mask, mask], dim=1)
        extra = {"logits_to_keep": n} if _keeps_last_logits(model) else {}
        if takes(model, "use_cache"):
            extra |= {"use_cache": past is not None}
        if past is not None:
            extra["past_key_values"] = past.cache
        with fast_products(model):
            logits = model(tokens, attention_mask=whole, **extra)
    if past is not None:
        past.mask = torch.cat([past.mask, mask], dim=1)
    return logits[:, -n:]


@torch.inference_mode()
def run_before(model: LensModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> Past | None:
    """The past of all but the prompts' last token, for `greedy_tokens`; None where the model keeps none."""
    if not keeps_past(model):
        return None
    past = Past.of_nothing(model, len(tokens), tokens.device)
    if tokens.shape[1] > 1:
        forward(model, tokens[:, :-1], mask[:, :-1], past)
    return past if past.is_whole else None


@torch.inference_mode()
def greedy_tokens(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    mask: Int[Tensor, "batch pos"] | None = None,
    use_cache: bool = True,
    past: Past | None = None,
    before: Callable[[int, slice], None] = lambda step, positions: None,
) -> Int[Tensor, "batch new"]:
    """Greedy continuations of prompts, until all have ended or ``max_new_tokens`` are made.

    Args:
        model: Model with a tokenizer that has an end-of-text token.
        tokens: Prompts, padded on the left if at all.
        max_new_tokens: Tokens generated at most.
        mask: 1 for a token, 0 for padding; default: there is none.
        use_cache: Keep keys and values where the model can; otherwise the whole sequence is run every time.
        past: What has been run of all but the prompts' last token (see `run_before`); it is added to.
        before: Called before each forward pass with the step and the positions that it runs, counted from the first
            of the prompts.

    Returns:
        New tokens; after a sequence's end, end-of-text tokens.

    Raises:
        ModelError: A sequence has not ended where the model's context does.
    """
    eos = model.tokenizer.eos_token_id
    mask = torch.ones_like(tokens) if mask is None else mask
    if past is None and use_cache and keeps_past(model):
        past = Past.of_nothing(model, len(tokens), tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    sequence = tokens
    for step in range(max_new_tokens):
        require_room(sequence.shape[1], model.cfg.n_ctx, prompt_length=tokens.shape[1])
        new_from = 0 if past is None else past.mask.shape[1]
        before(step, slice(new_from, sequence.shape[1]))
        logits = forward(model, sequence[:, new_from:], mask[:, new_from:], past)
        if past is not None and not past.is_whole:
            past = None  # the model does not keep what it was told to: run everything again from now on
            if new_from > 0:  # and what had been kept may not have been read
                before(step, slice(0, sequence.shape[1]))
                logits = forward(model, sequence, mask)
        new = logits.argmax(-1).masked_fill(ended, eos)
        ended |= new == eos
        sequence = torch.cat([sequence, new[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if bool(ended.all()):
            break
    return sequence[:, tokens.shape[1] :]


def keeps_past(model: LensModel) -> bool:
    """Whether a model can be given keys and values of what was run before."""
    if is_hooked_transformer(model):
        cfg = model.cfg
        # Ungrouped keys and values are as many as the queries, which TransformerLens' cache does not expect.
        ungrouped = cfg.n_key_value_heads is not None and cfg.ungroup_grouped_query_attention
        return cfg.attention_dir == "causal" and not ungrouped
    return takes(model, "past_key_values")


def takes(model: Any, argument: str) -> bool:
    """Whether the forward of the model in a Bridge has an argument; a lens model of any other kind has none."""
    inner = getattr(model, "original_model", None)
    return inner is not None and argument in signature(inner.forward).parameters


def _keeps_last_logits(model: LensModel) -> bool:
    return not is_hooked_transformer(model) and takes(model, "logits_to_keep")

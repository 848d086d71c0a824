"""Prompts to tokens and back, as a model's own tokenizer does.

Does not run the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.core.types import LensModel
from memgen_lens.fast.support import is_hooked_transformer, is_native_bridge

LONGEST = 1.25
"""How much longer than the shortest the longest prompt of a padded batch may be (and two tokens)."""


@dataclass(frozen=True)
class Batch:
    """Prompts that run together.

    Attributes:
        index: Their places among all prompts.
        tokens: Their tokens, padded on the left, so that all answer positions are the last one.
        mask: 1 for a token, 0 for padding.
    """

    index: list[int]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]

    def parts(self, size: int) -> Iterator["Batch"]:
        """The batch in parts of at most ``size`` prompts."""
        for first in range(0, len(self.index), size):
            some = slice(first, first + size)
            yield Batch(self.index[some], self.tokens[some], self.mask[some])


def by_length(
    model: LensModel, prompts: Sequence[str], *, batch_size: int, prepend_bos: bool | None = None
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
    tokens, lengths = tokenized(model, prompts, prepend_bos=prepend_bos)
    batches = []
    for length in torch.unique(lengths).tolist():
        same = (lengths == length).nonzero().flatten().split(batch_size)
        batches += [(index.tolist(), tokens[index.to(tokens.device), :length]) for index in same]
    return batches


def in_batches(
    model: LensModel,
    prompts: Sequence[str],
    *,
    batch_size: int,
    tokens_at_once: int | None = None,
    room: int = 0,
    prepend_bos: bool | None = None,
) -> list[Batch]:
    """Tokenize prompts and batch them with others of about the same length, padded on the left and masked.

    A prompt gets what it would get alone, to rounding: padding is masked, and positions are counted without it. Where
    the model cannot be given padding, prompts run with others of exactly their length.

    Args:
        model: A lens model.
        prompts: Any number of prompts.
        batch_size: Prompts in one batch at most.
        tokens_at_once: Tokens in one batch at most (of several prompts), padding counted.
        room: Tokens that are going to be generated behind the prompts.
        prepend_bos: See `tokenized`.

    Raises:
        ModelError: See `by_length`.
    """
    if not prompts:
        return []
    tokens, lengths = tokenized(model, prompts, prepend_bos=prepend_bos)
    pad = model.tokenizer.pad_token_id
    sizes, batches = lengths.numpy(), []
    order = np.argsort(sizes, kind="stable")
    start = 0
    while start < len(order):
        shortest = int(sizes[order[start]])
        # The context is as wide as a padded batch, so that prompts which may reach its end are not padded.
        pads = takes_padding(model) and shortest * LONGEST + 2 + room <= model.cfg.n_ctx
        widest = int(shortest * LONGEST) + 2 if pads else shortest
        stop = start + int(np.searchsorted(sizes[order[start:]], widest, side="right"))
        longest = int(sizes[order[stop - 1]])
        at_once = batch_size if tokens_at_once is None else min(batch_size, max(1, tokens_at_once // longest))
        stop = min(stop, start + at_once)
        index = order[start:stop]
        width = int(sizes[index].max())
        rows = tokens[torch.from_numpy(index).to(tokens.device), :width]
        # Right-padded rows are turned until their padding stands in front.
        shift = width - lengths[torch.from_numpy(index)].to(rows.device)
        place = (torch.arange(width, device=rows.device) - shift[:, None]) % width
        mask = (torch.arange(width, device=rows.device) >= shift[:, None]).long()
        rows = rows.gather(1, place)
        batches.append(Batch(index.tolist(), rows if pad is None else rows.masked_fill(mask == 0, pad), mask))
        start = stop
    return batches


def takes_padding(model: LensModel) -> bool:
    """Whether padding on the left, masked, leaves a model's numbers as they are.

    Not where every position sees all others, nor where positions cannot be told from a mask.
    """
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        return False
    if is_hooked_transformer(model):
        return True
    derives = getattr(model, "_accepts_derived_position_ids", None)
    return derives is not None and bool(derives())


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


def tokenized(
    model: LensModel, prompts: Sequence[str], *, prepend_bos: bool | None = None
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, " prompt"]]:
    """Tokens, padded on the right, and the length of each prompt; errors as in `by_length`.

    Args:
        model: A lens model.
        prompts: At least one prompt.
        prepend_bos: Whether a begin-of-text token is put before each prompt that does not begin with it. Default: a
            HookedTransformer's or native Bridge's ``cfg.default_prepend_bos``; on another Bridge, what the Hugging Face
            model's own tokenizer does (TransformerLens gives it one that always does).
    """
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
    for prompt, ids in zip(prompts, encoded, strict=True):
        lacking = _unknown_pieces(tokenizer, prompt) if unknown is not None and unknown in ids else []
        if not ids or lacking:
            raise ModelError(
                call,
                expected="non-empty prompts over the tokenizer's vocabulary",
                received=repr(prompt) + (f", in which {', '.join(map(repr, lacking))} has no token" if lacking else ""),
                fix="Use the tokenizer of the task that the model was trained on, or change the prompt.",
            )
    begins = _beginning(model, prompts[0], encoded[0], prepend_bos)
    if begins is None:  # a tokenizer that adds something behind the prompts as well
        own = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        each = [model.to_tokens(prompt, truncate=False, **own)[0].tolist() for prompt in prompts]
    else:
        each = [ids if begins and ids[: len(begins)] == begins else begins + ids for ids in encoded]
    sizes = np.array([len(ids) for ids in each])
    lengths = torch.from_numpy(sizes)
    tokens = np.full((len(each), int(sizes.max())), tokenizer.eos_token_id)
    tokens[np.arange(sizes.max()) < sizes[:, None]] = list(chain.from_iterable(each))
    if int(lengths.max()) > model.cfg.n_ctx:
        raise ModelError(
            call,
            expected=f"prompts of at most {model.cfg.n_ctx} tokens, the model's context",
            received=f"{int(lengths.max())} tokens: {prompts[int(lengths.argmax())]!r}"[:160],
            fix="Shorten the prompt.",
        )
    on_device = torch.from_numpy(tokens).to(input_device(model))
    require_same_device(model, on_device)
    return on_device, lengths


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens: of one that is spread over several devices, where its embedding is.

    Weights without numbers (``meta``) are nowhere: then, where the config says.
    """
    if is_hooked_transformer(model):
        return torch.device(model.cfg.device)
    inner = getattr(model, "original_model", model)
    weights = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else inner
    first = next(iter(weights.parameters()), None)
    if first is None:
        return torch.device("cpu")
    return torch.device(model.cfg.device or "cpu") if first.device.type == "meta" else first.device


def _beginning(model: LensModel, prompt: str, ids: list[int], prepend_bos: bool | None) -> list[int] | None:
    """Tokens that are put before every prompt; None where something is put behind them too."""
    if is_hooked_transformer(model) or is_native_bridge(model):
        own = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(prompt, truncate=False, **own)[0].tolist()
        n_before = len(tokens) - len(ids)
        # A prompt that begins with the token may have got it once more, or TransformerLens may have taken it away.
        bos = model.tokenizer.bos_token_id
        if tokens == ids or (n_before < 0 and tokens == ids[-n_before:]):
            return []
        if n_before == 1 and tokens[0] == bos == ids[0] and tokens[1:] == ids:
            return [bos]
        return tokens[:n_before] if n_before > 0 and tokens[n_before:] == ids else None
    bos = model.tokenizer.bos_token_id
    if prepend_bos is not None:
        return [bos] if prepend_bos and bos is not None else []
    # What `load_model` keeps is as it was; another Bridge has only what TransformerLens made of it.
    return list(own_beginning(getattr(model, "hugging_face_tokenizer", model.tokenizer)))


def own_beginning(tokenizer: Any) -> tuple[int, ...]:
    """What a Hugging Face tokenizer puts before a text by itself (TransformerLens makes it begin every text)."""
    if tokenizer.init_kwargs.get("add_bos_token") and tokenizer.name_or_path:
        again = _from_its_place(tokenizer.name_or_path)
        tokenizer = tokenizer if again is None else again
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for n_before in range(len(whole) - len(bare) + 1):
        if whole[n_before : n_before + len(bare)] == bare:
            return tuple(whole[:n_before])
    return ()


@lru_cache(maxsize=8)
def _from_its_place(name_or_path: str) -> Any:
    """The tokenizer as it was saved, where it is on this machine."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except Exception:  # whatever keeps it from being read, what is there now is all that is known
        return None


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
    if tokenizer.unk_token_id == tokenizer.eos_token_id:
        text = text.replace(tokenizer.eos_token, "")  # which the user may have meant
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

"""Prompts to tokens and back, as a model's own tokenizer does.

Does not run the model.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.core.types import LensModel


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

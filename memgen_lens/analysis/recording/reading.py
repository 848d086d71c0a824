"""Read chosen sites at the last position of prompts, block of pairs by block of pairs, and keep nothing else.

Does not know where the values go: `activations` keeps them, attribution sums them up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.analysis.recording.finite import EMBEDDING, require_finite
from memgen_lens.core.errors import SiteError
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.types import LensModel
from memgen_lens.fast.blocks import Blocks
from memgen_lens.fast.products import fast_products
from memgen_lens.fast.prompts import at_last_position, can_read
from memgen_lens.fast.support import is_hooked_transformer, is_plain
from memgen_lens.models.sites import ENTERS_FIRST_BLOCK, block_of, site_hooks
from memgen_lens.models.step import takes
from memgen_lens.models.tokens import Batch, in_batches, tokenized
from memgen_lens.processes import ALONE, World

TOKENS_AT_ONCE = 20_480
"""Tokens of one forward pass, where no number of prompts is asked for."""
IN_CACHE = 4_096
"""Tokens of one forward pass of a model's own on a processor, whose caches hold what so many make of a small model."""
NO_POSITIONS = ("hook_pattern", "hook_attn_scores")
"""Hook points whose second axis is heads, whatever its length."""


@dataclass(frozen=True)
class RecordedBlock:
    """Some consecutive pairs' activations; good until the next block is made.

    Attributes:
        first: Place of the first of these pairs among all.
        sides: By site (and `EMBEDDING`), memorized then generalized: ``[2, pair, layer, neuron]``, float32.
        tokens: Token ids, right-padded with -1: ``[2, pair, pos]``.
    """

    first: int
    sides: dict[str, Float[np.ndarray, "2 pair layer neuron"]]
    tokens: Int[np.ndarray, "2 pair pos"]


def recorded_blocks(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    *,
    batch_size: int | None,
    progress: bool = False,
    call: str,
    world: World = ALONE,
) -> Iterator[RecordedBlock]:
    """Activations block by block, in the order of the pairs; nothing is kept of the blocks before, room is used again.

    Where ``world`` is of several processes, each reads consecutive ones of the very blocks that one would read: which
    prompts are run together decides the last bits of what is read.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: There are no pairs.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    pairs.require(1, len(pairs), call=call)
    known = model.hook_dict  # a Bridge makes it anew at each look
    groups = {site: site_hooks(model, site, known=known) for site in sites} | {EMBEDDING: [ENTERS_FIRST_BLOCK]}
    if batch_size is None:
        some = [pairs.memorized[0].prompt, pairs.generalized[0].prompt]
        longest = int(tokenized(model, some, prepend_bos=pairs.prepend_bos)[1].max())
        batch_size = max(256, TOKENS_AT_ONCE // longest)
    step = max(1, batch_size // 2)
    read = _reader(model, groups, batch_size, pairs.prepend_bos)
    firsts = world.share(range(0, len(pairs), step))
    n_read = sum(min(step, len(pairs) - first) for first in firsts)
    with progress_bar(2 * n_read, "recording", shown=progress and world.is_first) as bar:
        for first in firsts:
            block = _recorded(read, pairs, slice(first, first + step))
            for name, sides in block.sides.items():
                require_finite(call, name, list(sides), pairs.take(np.arange(first, min(first + step, len(pairs)))))
            bar.update(2 * block.tokens.shape[1])
            yield block


def at_answer_position(
    model: LensModel, prompts: Sequence[str], sites: Sequence[str], *, batch_size: int, prepend_bos: bool | None = None
) -> dict[str, Float[np.ndarray, "prompt layer neuron"]]:
    """Activations of chosen sites at the last position of any prompts, at least one, in their order, by site.

    Args:
        model: A lens model.
        prompts: Any texts.
        sites: Short names, or hook points by their full names.
        batch_size: Prompts in one forward pass at most.
        prepend_bos: See `memgen_lens.complete`.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    known = model.hook_dict
    read = _reader(model, {site: site_hooks(model, site, known=known) for site in sites}, batch_size, prepend_bos)
    found: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for first in range(0, len(prompts), batch_size):
        values = read(list(prompts[first : first + batch_size])).values
        for site in sites:
            found[site].append(values[site].copy())  # the reader's room is used again
    return {site: np.concatenate(blocks) for site, blocks in found.items()}


class _Read(NamedTuple):
    """What groups of hook points give at the last position of prompts, and the prompts' tokens, padded with -1."""

    values: dict[str, Float[np.ndarray, "prompt layer neuron"]]
    tokens: Int[np.ndarray, "prompt pos"]


def _recorded(read: Callable[[list[str]], _Read], pairs: PromptPairs, block: slice) -> RecordedBlock:
    values, tokens = read([item.prompt for item in (*pairs.memorized[block], *pairs.generalized[block])])
    sides = {site: value.reshape(2, -1, *value.shape[1:]) for site, value in values.items()}
    return RecordedBlock(block.start, sides, tokens.reshape(2, -1, tokens.shape[1]))


def _reader(
    model: LensModel, groups: Mapping[str, list[str]], batch_size: int, prepend_bos: bool | None
) -> Callable[[list[str]], _Read]:
    """What reads the hook points: the fast forward where it can, else the model's own."""
    hooks = list(dict.fromkeys(hook for group in groups.values() for hook in group))
    at_once = IN_CACHE if next(iter(model.parameters())).device.type == "cpu" else TOKENS_AT_ONCE

    def fast(prompts: list[str]) -> _Read:
        padded, lengths = tokenized(model, prompts, prepend_bos=prepend_bos)
        found = at_last_position(blocks, padded, lengths, list(groups.values()))
        filled = torch.arange(padded.shape[1]) < lengths[:, None]
        values = {name: values.cpu().numpy() for name, values in zip(groups, found, strict=True)}
        return _Read(values, padded.cpu().masked_fill(~filled, -1).numpy())

    def own(prompts: list[str]) -> _Read:
        batches = in_batches(model, prompts, batch_size=batch_size, tokens_at_once=at_once, prepend_bos=prepend_bos)
        order = np.argsort([i for batch in batches for i in batch.index])
        kept = read_last_position(model, batches, hooks)
        values = {
            name: np.stack([np.concatenate(kept[hook])[order] for hook in group], axis=1)
            for name, group in groups.items()
        }
        return _Read(values, _right_padded(batches, len(prompts)))

    if not is_plain(model) or not can_read(hooks):
        return own
    with torch.inference_mode():
        blocks = Blocks(model, few_shapes=True)
    return fast


def read_last_position(
    model: LensModel, batches: Sequence[Batch], hooks: Sequence[str]
) -> dict[str, list[Float[np.ndarray, "batch neuron"]]]:
    """What the hook points give at the last position of some prompts, batch by batch, heads flattened.

    Raises:
        SiteError: A hook point has no row for each position, or the forward pass never reaches it.
    """
    found = read_last_positions(model, batches, hooks, n=1)
    return {name: [values[:, 0] for values in each] for name, each in found.items()}


@torch.inference_mode()
def read_last_positions(
    model: LensModel, batches: Sequence[Batch], hooks: Sequence[str], *, n: int
) -> dict[str, list[Float[np.ndarray, "batch pos neuron"]]]:
    """What the hook points give at the last ``n`` positions of prompts that have as many, batch by batch.

    Raises:
        SiteError: A hook point has no row for each position, or the forward pass never reaches it.
    """
    kept: dict[str, list[np.ndarray]] = {name: [] for name in hooks}
    seen: dict[str, np.ndarray] = {}  # some hook points fire more than once a pass, with the same values
    shape: list[int] = []

    def keeper(name: str) -> Callable[[Tensor, Any], None]:
        # By the name that was asked for: on a Bridge, the hook point's own name is another.
        def keep(activation: Tensor, hook: Any) -> None:
            by_head = name.endswith(NO_POSITIONS) or str(hook.name).endswith(NO_POSITIONS)
            if by_head or activation.ndim < 3 or list(activation.shape[:2]) != shape:
                raise SiteError(
                    f"site {name!r}",
                    expected="activations with one row a position, [batch, pos, ...]",
                    received=f"{list(activation.shape)} for tokens of {shape}",
                    fix="Choose a site of the residual stream, the MLP or the heads' values.",
                )
            seen[name] = activation[:, -n:].flatten(2).float().cpu().numpy().copy()

        return keep

    with ExitStack() as stack:
        try:
            stack.enter_context(model.hooks(fwd_hooks=[(name, keeper(name)) for name in hooks]))
        except (AssertionError, ValueError) as error:  # TransformerLens knows of some before they are run
            raise _never_called(str(error)) from None
        for batch in batches:
            shape[:] = batch.tokens.shape
            _run(model, batch, hooks)
            for name in hooks:
                if name not in seen:
                    raise _never_called(f"{name}, which it has and never calls")
                kept[name].append(seen.pop(name))
    return kept


def _run(model: LensModel, batch: Batch, hooks: Sequence[str]) -> None:
    """A forward pass as far as the hooks need it, without the vocabulary where that can be."""
    stop = _stop_layer(model, hooks)
    if is_hooked_transformer(model):
        behind_norm = any(name.startswith("unembed") for name in hooks)
        with fast_products(model):
            model(
                batch.tokens,
                attention_mask=batch.mask,
                return_type="logits" if behind_norm else None,
                stop_at_layer=stop,
            )
        return
    logits = any(name.startswith(("unembed", "hook_unembed")) for name in hooks)
    extra = {"logits_to_keep": 1} if takes(model, "logits_to_keep") and not logits else {}
    extra |= {"use_cache": False} if takes(model, "use_cache") else {}
    # A Bridge stops by an exception from a block: it has none behind the last.
    stop = None if stop == model.cfg.n_layers else stop
    with fast_products(model):
        model(batch.tokens, attention_mask=batch.mask, stop_at_layer=stop, **extra)


def _never_called(which: str) -> SiteError:
    return SiteError(
        "reading sites",
        expected="hook points that this model's forward pass reaches",
        received=which,
        fix="TransformerLens calls some only where a setting of its config says so, e.g. use_attn_result.",
    )


def _stop_layer(model: LensModel, hooks: Sequence[str]) -> int | None:
    """The first block that no hook needs; None where a hook lies behind the blocks."""
    layers = [block_of(hook) for hook in hooks]
    return None if None in layers else max(layer for layer in layers if layer is not None) + 1


def _right_padded(batches: Sequence[Batch], n: int) -> Int[np.ndarray, "prompt pos"]:
    """Tokens of all prompts in their order, padded on the right with -1."""
    tokens = np.full((n, max((batch.tokens.shape[1] for batch in batches), default=0)), -1, dtype=np.int64)
    for batch in batches:
        rows, filled = batch.tokens.cpu().numpy(), batch.mask.cpu().numpy().astype(bool)
        for place, row, real in zip(batch.index, rows, filled, strict=True):
            tokens[place, : real.sum()] = row[real]
    return tokens

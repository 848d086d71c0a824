"""Record activations at the answer position, at the sites asked for and nowhere else.

The answer position is the last token of a prompt, whose logits pick the first answer token. Does not score.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.core.errors import SiteError
from memgen_lens.core.files import damaged, read_arrays, read_json, user_path, write_arrays, write_json
from memgen_lens.core.items import Item
from memgen_lens.core.ownership import require_ours
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, SiteActivations
from memgen_lens.core.run_directory import alone_in
from memgen_lens.core.shards import map_shard, new_shard
from memgen_lens.core.types import LensModel
from memgen_lens.fast.blocks import Blocks
from memgen_lens.fast.products import fast_products
from memgen_lens.fast.prompts import at_last_position, can_read
from memgen_lens.fast.support import is_plain
from memgen_lens.models.sites import site_hooks
from memgen_lens.models.tokens import by_length, tokenized

EMBEDDING = "embedding"
"""Name under which the embedding at the answer position is kept beside the sites."""
SIDES = ("memorized", "generalized")
TOKENS_AT_ONCE = 20_480
"""Tokens of one forward pass, where no number of prompts is asked for."""
NO_POSITIONS = ("hook_pattern", "hook_attn_scores")
"""Hook points whose second axis is heads, whatever its length."""


def record(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    *,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> Activations:
    """Activations of both prompts of every pair at the answer position.

    No cache of the model is made: the last position of the sites asked for is kept, batch by batch, and the forward
    pass stops after the last layer asked for. Where the model is a plain HookedTransformer (no hooks on it, see
    `memgen_lens.fast.support`), beginnings that prompts of a batch share are run once, and of the last layer the last
    position alone; else the model's own forward runs, prompts of one length in a batch. The numbers are the same to
    rounding.

    Args:
        model: A HookedTransformer; left without hooks, also after an exception.
        pairs: Prompt pairs, ours or a user's own.
        sites: TransformerLens short names, e.g. ``["resid_post", "post"]``; heads are flattened into the neuron
            axis (``z``: neuron = head * d_head + coordinate).
        batch_size: Prompts in one forward pass; default: as many as make some 20,000 tokens, at least 256.
        out: Directory to write the activations into as safetensors, one file a site, with a manifest. They are then
            read from there where and when they are used (`load_activations` opens them again), and memory does not
            grow with the pairs.

    Returns:
        For each site both sides as float32 ``[pair, layer, neuron]``; and the token embedding (with position, where
        it is added to the residual stream) at the answer position, which the probes' baseline needs.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: There are no pairs.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
        RunDirectoryError: ``out`` cannot be written, is being written by another process, or holds somebody else's
            file of one of these names.
    """
    blocks = recorded_blocks(model, pairs, sites, batch_size=batch_size, call="record")
    first = next(blocks)
    shapes = {name: (len(pairs), *values.shape[2:]) for name, values in first.sides.items()}
    with ExitStack() as stack:
        if out is not None:
            out = user_path(out, call="record(out=...)")
            stack.enter_context(alone_in(out, call=f"record(out={str(out)!r})"))
            files = [*(f"{name}.safetensors" for name in (*shapes, "tokens")), "manifest.json"]
            require_ours([out / name for name in files], call=f"record(out={str(out)!r})")
        sides = {
            name: {side: np.empty(shape, np.float32) for side in SIDES}
            if out is None
            else stack.enter_context(new_shard(Path(out) / f"{name}.safetensors", dict.fromkeys(SIDES, shape)))
            for name, shape in shapes.items()
        }
        tokens = []
        for block in chain([first], blocks):
            rows = slice(block.first, block.first + len(block.tokens[0]))
            for name, values in block.sides.items():
                for side, value in zip(SIDES, values, strict=True):
                    sides[name][side][rows] = value
            tokens.append(block.tokens)
    widest = max(block.shape[2] for block in tokens)
    padded = [np.pad(block, ((0, 0), (0, 0), (0, widest - block.shape[2])), constant_values=-1) for block in tokens]
    tokens = np.concatenate(padded, axis=1).reshape(2 * len(pairs), -1)
    if out is not None:
        write_arrays(Path(out) / "tokens.safetensors", {"tokens": tokens})
        write_json(Path(out) / "manifest.json", {"sites": list(sites)} | vars(pairs))
        return load_activations(out)
    recorded = {name: SiteActivations(**both) for name, both in sides.items()}
    return Activations(embedding=recorded.pop(EMBEDDING), sites=recorded, pairs=pairs, tokens=tokens)


def load_activations(directory: str | Path) -> Activations:
    """Open what ``record(..., out=directory)`` wrote; arrays are read from disk where and when they are used.

    Raises:
        RunDirectoryError: A file is missing or damaged.
    """
    directory = user_path(directory, call="load_activations")
    manifest = read_json(directory / "manifest.json")
    try:
        pairs = PromptPairs(
            memorized=tuple(Item(**row) for row in manifest["memorized"]),
            generalized=tuple(Item(**row) for row in manifest["generalized"]),
            split=np.array(manifest["split"]),
            n_items=manifest["n_items"],
            n_flipped=manifest["n_flipped"],
            n_items_by_task=manifest["n_items_by_task"],
        )
        sites = {name: SiteActivations(**map_shard(directory / f"{name}.safetensors")) for name in manifest["sites"]}
        embedding = SiteActivations(**map_shard(directory / f"{EMBEDDING}.safetensors"))
        tokens = read_arrays(directory / "tokens.safetensors")["tokens"]
    except (KeyError, TypeError) as error:
        raise damaged(directory / "manifest.json", f"content that is not its own ({error!r})") from None
    return Activations(sites=sites, pairs=pairs, embedding=embedding, tokens=tokens)


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
    model: LensModel, pairs: PromptPairs, sites: Sequence[str], *, batch_size: int | None, call: str
) -> Iterator[RecordedBlock]:
    """Activations block by block, in the order of the pairs; nothing is kept of the blocks before, room is used again.

    Raises:
        SiteError: A site is unknown, or the model lacks it.
        PairsError: There are no pairs.
        ModelError: The tokenizer lacks a character, or model and tokens are on different devices.
    """
    if isinstance(sites, str):
        raise SiteError(call, expected="a list of sites", received=repr(sites), fix=f"Write sites=[{sites!r}].")
    pairs.require(1, len(pairs), call=call)
    embedding = [name for name in ("hook_embed", "hook_pos_embed") if name in model.hook_dict]
    groups = {site: site_hooks(model, site) for site in sites} | {EMBEDDING: embedding}
    if batch_size is None:
        longest = int(tokenized(model, [pairs.memorized[0].prompt, pairs.generalized[0].prompt])[1].max())
        batch_size = max(256, TOKENS_AT_ONCE // longest)
    step = max(1, batch_size // 2)
    read = _reader(model, groups, batch_size)
    for first in range(0, len(pairs), step):
        yield _recorded(read, pairs, slice(first, first + step))


class _Read(NamedTuple):
    """What groups of hook points give at the last position of prompts, and the prompts' tokens, padded with -1."""

    values: dict[str, Float[np.ndarray, "prompt layer neuron"]]
    tokens: Int[np.ndarray, "prompt pos"]


def _recorded(read: Callable[[list[str]], _Read], pairs: PromptPairs, block: slice) -> RecordedBlock:
    values, tokens = read([item.prompt for item in (*pairs.memorized[block], *pairs.generalized[block])])
    values[EMBEDDING] = values[EMBEDDING].sum(1, keepdims=True)
    sides = {site: value.reshape(2, -1, *value.shape[1:]) for site, value in values.items()}
    return RecordedBlock(block.start, sides, tokens.reshape(2, -1, tokens.shape[1]))


def _reader(model: LensModel, groups: Mapping[str, list[str]], batch_size: int) -> Callable[[list[str]], _Read]:
    """What reads the hook points: the fast forward where it can, else the model's own."""
    hooks = list(dict.fromkeys(hook for group in groups.values() for hook in group))

    def fast(prompts: list[str]) -> _Read:
        padded, lengths = tokenized(model, prompts)
        found = at_last_position(blocks, padded, lengths, list(groups.values()))
        filled = torch.arange(padded.shape[1]) < lengths[:, None]
        values = {name: values.cpu().numpy() for name, values in zip(groups, found, strict=True)}
        return _Read(values, padded.cpu().masked_fill(~filled, -1).numpy())

    def own(prompts: list[str]) -> _Read:
        batches = by_length(model, prompts, batch_size=batch_size)
        order = np.argsort([i for index, _ in batches for i in index])
        kept: dict[str, list[np.ndarray]] = {name: [] for name in hooks}
        for _, tokens in batches:
            for name, value in last_position(model, tokens, hooks).items():
                kept[name].append(value.float().cpu().numpy())
        in_order = {name: np.concatenate(parts)[order] for name, parts in kept.items()}
        values = {name: np.stack([in_order[hook] for hook in group], axis=1) for name, group in groups.items()}
        return _Read(values, _pad([(index, tokens.cpu().numpy()) for index, tokens in batches], len(prompts)))

    if not is_plain(model) or not can_read(hooks):
        return own
    with torch.inference_mode():
        blocks = Blocks(model, few_shapes=True)
    return fast


@torch.inference_mode()
def last_position(model: LensModel, tokens: Any, hooks: Sequence[str]) -> dict[str, Float[Tensor, "batch neuron"]]:
    """What the hook points give at the last position of some prompts, heads flattened."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        by_head = str(hook.name).endswith(NO_POSITIONS)
        if by_head or activation.ndim < 3 or activation.shape[1] != tokens.shape[1]:
            raise SiteError(
                f"site {hook.name!r}",
                expected="activations with one row a position, [batch, pos, ...]",
                received=f"{list(activation.shape)} for tokens of {list(tokens.shape)}",
                fix="Choose a site of the residual stream, the MLP or the heads' values.",
            )
        kept[hook.name] = activation[:, -1].flatten(1).clone()

    behind_norm = any(name.startswith("unembed") for name in hooks)
    with model.hooks(fwd_hooks=[(name, keep) for name in hooks]), fast_products(model):
        model(tokens, return_type="logits" if behind_norm else None, stop_at_layer=_stop_layer(model, hooks))
    for name in hooks:
        if name not in kept:
            raise SiteError(
                f"site {name!r}",
                expected="a hook point that this model's forward pass reaches",
                received=f"{name}, which it has and never calls",
                fix="TransformerLens calls some only where a setting of its config says so, e.g. use_attn_result.",
            )
    return kept


def _stop_layer(model: LensModel, hooks: Sequence[str]) -> int | None:
    """The first block that no hook needs; None where a hook lies behind the blocks."""
    layers = [int(hook.split(".")[1]) if hook.startswith("blocks.") else -1 for hook in hooks]
    behind = any(
        layer < 0 and hook not in ("hook_embed", "hook_pos_embed") for hook, layer in zip(hooks, layers, strict=True)
    )
    # Stopping before the last block's end would save nothing but the unembedding; where hooks lie behind it, run on.
    return None if behind else max(layers) + 1


def _pad(batches: list[tuple[list[int], np.ndarray]], n: int) -> np.ndarray:
    tokens = np.full((n, max((rows.shape[1] for _, rows in batches), default=0)), -1, dtype=np.int64)
    for index, rows in batches:
        tokens[index, : rows.shape[1]] = rows
    return tokens

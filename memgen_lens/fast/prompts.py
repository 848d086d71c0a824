"""Many prompts at once, each beginning that several of them share run once.

Under causal attention a position depends on the tokens up to it alone. So prompts are laid out as a tree of their
beginnings, each node of which is one row; only attention sees them one by one. Does not generate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.attention import attention, gathered_attention
from memgen_lens.fast.blocks import BLOCK_SITES, MODEL_SITES, Blocks, Taps

TOKENS_AT_ONCE = 10_240
"""Tokens of the prompts that are run together: enough for products at full speed, few enough for the cache."""
PIECE = 1 << 20
"""Numbers that attention takes at a time: queries, keys and values, or scores; few enough for the cache."""


@dataclass(frozen=True)
class PrefixTree:
    """Prompts as a tree of their beginnings.

    Attributes:
        tokens: Tokens that stand somewhere ``[word]``, each with each of its positions: all that the first layer's
            queries, keys and values depend on.
        positions: These positions ``[word]``.
        word: The word that each beginning ends with ``[node]``; short beginnings first.
        path: The node of each position of each prompt ``[prompt, pos]``; 0 behind a prompt's end.
        place: One place of each node in the flattened ``path`` ``[node]``.
        last: The node of each whole prompt ``[prompt]``.
    """

    tokens: Int[Tensor, " word"]
    positions: Int[Tensor, " word"]
    word: Int[Tensor, " node"]
    path: Int[Tensor, "prompt pos"]
    place: Int[Tensor, " node"]
    last: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "prompt pos"], lengths: Int[Tensor, " prompt"]) -> "PrefixTree":
        """The tree of prompts that are padded on the right."""
        n_prompts, n_positions = tokens.shape
        prompts = torch.arange(n_prompts, device=tokens.device)
        lengths = lengths.to(tokens.device)
        path = torch.zeros_like(tokens)
        place, first = [], 0
        before = torch.zeros_like(prompts)
        for position in range(n_positions):
            here = prompts[lengths > position]
            key = before[here] * (int(tokens.max()) + 1) + tokens[here, position] if len(here) else here
            distinct, node = torch.unique(key, return_inverse=True)
            # Any prompt with this beginning will do: the largest, so that it does not depend on the order of writes.
            prompt = torch.zeros_like(distinct).scatter_reduce_(0, node, here, "amax")
            place.append(prompt * n_positions + position)
            before[here] = node
            path[here, position] = node + first
            first += len(distinct)
        flat = torch.cat(place)
        words, word = torch.unique(tokens.flatten()[flat] * n_positions + flat % n_positions, return_inverse=True)
        last = path[prompts, lengths - 1]
        return cls(words // n_positions, words % n_positions, word, path, flat, last)


def can_read(hooks: Sequence[str]) -> bool:
    """Whether `at_last_position` knows all of these hook points."""
    return all(
        hook in MODEL_SITES or (hook.startswith("blocks.") and hook.split(".", 2)[2] in BLOCK_SITES) for hook in hooks
    )


@torch.inference_mode()
def at_last_position(
    blocks: Blocks,
    tokens: Int[Tensor, "prompt pos"],
    lengths: Int[Tensor, " prompt"],
    groups: Sequence[Sequence[str]],
) -> list[Float[Tensor, "prompt layer neuron"]]:
    """What hook points give at the last position of each prompt.

    In the last block that a hook lies in, only that position is computed behind attention; later blocks are not run.

    Args:
        blocks: The model.
        tokens: Prompts, padded on the right.
        lengths: Tokens of each.
        groups: Hook points, by full names that `can_read`; those of one group have one width, heads flattened.

    Returns:
        For each group what its hook points give, stacked; good until the next call with the same ``blocks``.
    """
    found = _Found(blocks, len(tokens), groups)
    # In their order, prompts stand beside those that they share their beginning with.
    order = torch.from_numpy(np.lexsort(tokens.cpu().numpy().T[::-1])).to(tokens.device)
    for prompts in order.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
        some = lengths.to(tokens.device)[prompts]
        _read(blocks, tokens[prompts, : int(some.max())], some, prompts, found)
    return [values.transpose(0, 1) for values in found.values]


class _Found:
    """What has been read so far, and who reads it.

    Args:
        blocks: The model.
        n_prompts: Prompts in all.
        groups: See `at_last_position`.
    """

    def __init__(self, blocks: Blocks, n_prompts: int, groups: Sequence[Sequence[str]]) -> None:
        self.blocks, self.n_prompts, self.groups = blocks, n_prompts, groups
        self.values = [torch.empty(0)] * len(groups)
        self.places: dict[str, list[tuple[int, int]]] = {}
        for group, names in enumerate(groups):
            for layer, name in enumerate(names):
                self.places.setdefault(name, []).append((group, layer))

    def keep(self, name: str, prompts: Int[Tensor, " row"], h: Float[Tensor, "row neuron"]) -> None:
        """Keep a hook point's values of some prompts."""
        for group, layer in self.places[name]:
            if not len(self.values[group]):
                n_layers, width = len(self.groups[group]), h.shape[1]
                room = self.blocks.buffer(f"group {group}", n_layers * self.n_prompts, width)
                self.values[group] = room.view(n_layers, self.n_prompts, width)
            self.values[group][layer].index_copy_(0, prompts, h.float())


def _read(
    blocks: Blocks,
    tokens: Int[Tensor, "prompt pos"],
    lengths: Int[Tensor, " prompt"],
    prompts: Int[Tensor, " prompt"],
    found: _Found,
) -> None:
    """`at_last_position` of prompts that are run together; ``prompts`` are their numbers."""
    tree, start = PrefixTree.of(tokens, lengths), int(lengths.min()) - 1
    behind = any(name.startswith("ln_final") for name in found.places)
    layers = [int(name.split(".")[1]) for name in found.places if name.startswith("blocks.")]
    stop = blocks.cfg.n_layers if behind else max(layers, default=-1) + 1
    at: Tensor | None = tree.word[tree.last]
    """The row of each prompt's last position: a word before the first layer's attention, then a node, then its own."""

    def reader(name: str) -> Any:
        def read(h: Tensor, first: int) -> Tensor:
            if at is None:
                found.keep(name, prompts[first : first + len(h)], h)
            else:
                inside = ((at >= first) & (at < first + len(h))).nonzero().flatten()
                values = blocks.buffer("read", len(inside), h.shape[1])
                found.keep(name, prompts[inside], torch.index_select(h.float(), 0, at[inside] - first, out=values))
            return h

        return read

    taps: Taps = {name: reader(name) for name in found.places}
    x, path = blocks.embed(tree.tokens, tree.positions, taps), tree.word[tree.path]
    for layer in range(stop):
        ends = layer == stop - 1

        def attend(qkv: Tensor, layer: int = layer, path: Tensor = path, ends: bool = ends) -> Tensor:
            nonlocal at
            at = None if ends else tree.last
            if ends:
                z = _attended(blocks, layer, qkv, path, start)
                return z[torch.arange(len(z), device=z.device), lengths - 1 - start]
            return _of_nodes(blocks, _attended(blocks, layer, qkv, path), tree)

        kept = tree.last if ends else None
        rows = kept if layer else tree.word if kept is None else tree.word[kept]
        x, path = blocks.run(layer, x, attend, taps, rows=rows), tree.path
    if behind:
        blocks.logits(x, taps)


@torch.inference_mode()
def keys_and_values(
    blocks: Blocks, tokens: Int[Tensor, "prompt pos"]
) -> list[Float[Tensor, "2 prompt pos head d_head"]]:
    """Keys and values of prompts of one length, layer by layer, keys turned by their positions."""
    cfg = blocks.cfg
    if not tokens.shape[1]:
        empty = torch.zeros(2, *tokens.shape, cfg.n_heads, cfg.d_head, device=tokens.device)
        return [empty] * cfg.n_layers
    tree = PrefixTree.of(tokens, torch.full((len(tokens),), tokens.shape[1]))
    found: list[Tensor] = []
    x, path = blocks.embed(tree.tokens, tree.positions, {}), tree.word[tree.path]
    for layer in range(cfg.n_layers):
        ends = layer == cfg.n_layers - 1

        def attend(qkv: Tensor, layer: int = layer, path: Tensor = path, ends: bool = ends) -> Tensor:
            heads = blocks.rotated(layer, _gathered(qkv, path), 0)
            found.append(heads[:, :, 1:].movedim(2, 0).contiguous())
            if ends:
                return qkv.new_empty(0, cfg.n_heads * cfg.d_head)
            return _of_nodes(blocks, _attended(blocks, layer, qkv, path), tree)

        # Behind the last layer's keys and values nothing is wanted: no row goes on.
        rows = tree.last[:0] if ends else None if layer else tree.word
        x, path = blocks.run(layer, x, attend, {}, rows=rows), tree.path
    return found


def _attended(
    blocks: Blocks, layer: int, qkv: Float[Tensor, "row 3 head d_head"], path: Int[Tensor, "prompt pos"], start: int = 0
) -> Float[Tensor, "prompt kept width"]:
    """Attention of the prompts' positions from ``start`` on, whose rows ``path`` tells."""
    n_prompts, n_positions = path.shape
    n_kept, width = n_positions - start, qkv[0, 0].numel()
    z = blocks.buffer("z", n_prompts * n_kept, width).view(n_prompts, n_kept, width)
    at_once = max(1, PIECE // (n_positions * max(qkv[0].numel(), blocks.cfg.n_heads * n_positions)))
    for first in range(0, n_prompts, at_once):
        some = slice(first, first + at_once)
        if blocks.cfg.positional_embedding_type == "rotary":
            attended = attention(blocks.rotated(layer, _gathered(qkv, path[some]), 0), start, blocks.scales[layer])
        else:
            attended = gathered_attention(qkv, path[some], start, blocks.scales[layer])
        z[some] = attended.flatten(2)
    return z


def _of_nodes(blocks: Blocks, z: Float[Tensor, "prompt pos width"], tree: PrefixTree) -> Float[Tensor, "node width"]:
    out = blocks.buffer("z of nodes", len(tree.place), z.shape[2])
    return torch.index_select(z.flatten(0, 1), 0, tree.place, out=out)


def _gathered(
    qkv: Float[Tensor, "row 3 head d_head"], path: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos 3 head d_head"]:
    return qkv.index_select(0, path.flatten()).view(*path.shape, *qkv.shape[1:])

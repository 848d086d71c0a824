"""A model's blocks over rows of tokens, without a batch axis, and a look or a hand at any site in them.

No gradient. What attends to what is the caller's to say, so that prompts may share rows. Does not know prompts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.mlp import ACTIVATIONS, activated, mlp
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.products import linear
from memgen_lens.fast.support import is_native_bridge

Taps = Mapping[str, Callable[[Tensor, int], Tensor]]
"""By hook-point name, what is called with some consecutive rows of the site ``[row, neuron]`` (heads flattened) and the
number of the first of them, and gives what goes on in their place."""
Attend = Callable[[Float[Tensor, "row 3 head d_head"]], Float[Tensor, "kept width"]]
"""From queries, keys and values of all rows, the heads' values of the rows that go on."""
BLOCK_SITES = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Sites of a block that can be tapped, in their order."""
MODEL_SITES = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized")
"""Sites outside the blocks that can be tapped."""
PIECE = 1024
"""Rows that go through a block's products together: what they need in between stays in the processor's cache."""
SMALLEST_PIECE = 64
"""Rows that are not parted further, where few shapes are wanted."""


class Blocks:
    """The forward pass of one model, a step at a time; good for as long as its weights stay what they are.

    Args:
        model: A model that `support.is_plain` is true of.
        few_shapes: Part rows so that few shapes recur, for work without end: slower by some percent, and memory
            levels off.
    """

    def __init__(self, model: Any, *, few_shapes: bool = False) -> None:
        self.smallest = SMALLEST_PIECE if few_shapes else PIECE
        self.model, self.cfg = parameters_of(model), model.cfg
        blocks = self.model.blocks
        self.scales = [1 / float(block.attn.attn_scale) if model.cfg.use_attn_scale else 1.0 for block in blocks]
        self._buffers: dict[str, Tensor] = {}
        self._mid_enters_mlp_alone = is_native_bridge(model)
        self._qkv = [qkv_weights(block.attn, model.cfg) for block in blocks]

    def embed(
        self, tokens: Int[Tensor, " row"], positions: Int[Tensor, " row"], taps: Taps
    ) -> Float[Tensor, "row d_model"]:
        """The residual stream before the first block."""
        x = _tap(taps, "hook_embed", F.embedding(tokens, self.model.embed.W_E), 0)
        if self.cfg.positional_embedding_type == "standard":
            x = x + _tap(taps, "hook_pos_embed", F.embedding(positions, self.model.pos_embed.W_pos), 0)
        return x

    def run(
        self,
        layer: int,
        x: Float[Tensor, "row d_model"],
        attend: Attend,
        taps: Taps,
        *,
        rows: Int[Tensor, " kept"] | None = None,
    ) -> Float[Tensor, "kept d_model"]:
        """One block.

        Args:
            layer: Which.
            x: The residual stream before it; what is given for it is good until the block after the next is run.
            attend: Attention over all rows.
            taps: Looks and hands at sites.
            rows: The rows that go on behind attention, as ``attend`` gives them, each any number of times; None = all.
        """
        cfg = self.cfg
        qkv = self.buffer("qkv", len(x), self._qkv[layer][0].shape[1])
        for piece in _pieces(len(x), self.smallest):
            qkv[piece] = self._before_attention(layer, x[piece], piece.start, taps)
        z = attend(qkv.view(len(x), 3, cfg.n_heads, cfg.d_head))
        if rows is not None:
            x = torch.index_select(x, 0, rows, out=self.buffer("rows", len(rows), cfg.d_model))
        return self.behind(layer, x, z, taps)

    def behind(
        self, layer: int, x: Float[Tensor, "row d_model"], z: Float[Tensor, "row width"], taps: Taps
    ) -> Float[Tensor, "row d_model"]:
        """One block behind its attention.

        Args:
            layer: Which.
            x: The residual stream before the block.
            z: What its heads give.
            taps: Looks and hands at sites.
        """
        out = self.buffer(f"residual {layer % 2}", len(x), self.cfg.d_model)
        for piece in _pieces(len(x), self.smallest):
            out[piece] = self._behind_attention(layer, x[piece], z[piece], piece.start, taps)
        return out

    def buffer(self, name: str, n_rows: int, width: int) -> Float[Tensor, "row width"]:
        """Room for rows, the same at every call: large blocks taken anew would leave holes in the process's memory."""
        room = self._buffers.get(name)
        if room is None or room.numel() < n_rows * width:
            weights = self.model.embed.W_E
            room = self._buffers[name] = torch.empty(
                n_rows * width * 5 // 4, dtype=weights.dtype, device=weights.device
            )
        return room[: n_rows * width].view(n_rows, width)

    def _before_attention(
        self, layer: int, x: Float[Tensor, "row d_model"], first: int, taps: Taps
    ) -> Float[Tensor, "row width3"]:
        """Queries, keys and values of some rows; in ``x`` stands then what the taps make of it."""
        prefix = f"blocks.{layer}."
        if prefix + "hook_resid_pre" in taps:
            x.copy_(taps[prefix + "hook_resid_pre"](x, first))
        normed = _normed(self.model.blocks[layer].ln1, x, self.cfg, taps, prefix + "ln1.hook_normalized", first)
        qkv = linear(normed, *self._qkv[layer])
        if not any(prefix + f"attn.hook_{name}" in taps for name in "qkv"):
            return qkv
        thirds = zip("qkv", qkv.chunk(3, dim=1), strict=True)
        return torch.cat([_tap(taps, f"{prefix}attn.hook_{name}", third, first) for name, third in thirds], dim=1)

    def _behind_attention(
        self,
        layer: int,
        x: Float[Tensor, "row d_model"],
        z: Float[Tensor, "row width"],
        first: int,
        taps: Taps,
    ) -> Float[Tensor, "row d_model"]:
        """The residual stream behind the block, of some rows."""
        block, prefix = self.model.blocks[layer], f"blocks.{layer}."
        z = _tap(taps, prefix + "attn.hook_z", z, first)
        attn_out = linear(z, block.attn.W_O.flatten(0, 1), block.attn.b_O)
        x = _tap(taps, prefix + "hook_attn_out", attn_out, first).add(x)
        mid = _tap(taps, prefix + "hook_resid_mid", x, first)
        # A Bridge's hook point of this name lies behind the fork: what is put there does not stay in the stream.
        x = x if self._mid_enters_mlp_alone else mid
        normed = _normed(block.ln2, mid, self.cfg, taps, prefix + "ln2.hook_normalized", first)
        mlp_out = _tapped_mlp(block.mlp, normed, self.cfg, taps, prefix + "mlp.", first)
        x = _tap(taps, prefix + "hook_mlp_out", mlp_out, first).add(x)
        return _tap(taps, prefix + "hook_resid_post", x, first)

    def logits(self, x: Float[Tensor, "row d_model"], taps: Taps) -> Float[Tensor, "row d_vocab"]:
        """The logits behind the last block."""
        if self.cfg.normalization_type is not None:
            x = _normed(self.model.ln_final, x, self.cfg, taps, "ln_final.hook_normalized", 0)
        return linear(x, self.model.unembed.W_U, self.model.unembed.b_U)

    def rotated(
        self, layer: int, heads: Float[Tensor, "batch pos 3 head d_head"], first: int
    ) -> Float[Tensor, "batch pos 3 head d_head"]:
        """Queries and keys turned by their positions, from ``first`` on, where the model has rotary ones."""
        return rotated(self.model.blocks[layer].attn, heads, self.cfg, first)


def _pieces(n: int, smallest: int) -> list[slice]:
    """``n`` rows in pieces of `PIECE`, the rest in powers of two down to ``smallest``, and what is left.

    oneDNN keeps what it has compiled for each shape, and freed blocks of ever other sizes leave holes in memory.
    """
    pieces, first = [], 0
    while first < n:
        rest = n - first
        size = PIECE if rest >= PIECE else 1 << (rest.bit_length() - 1) if rest > smallest else rest
        pieces.append(slice(first, first + size))
        first += size
    return pieces


def norm(module: Any, x: Float[Tensor, "row d_model"], cfg: Any) -> Float[Tensor, "row d_model"]:
    """What a normalization layer gives, fused."""
    if cfg.normalization_type is None:
        return x
    if cfg.normalization_type.startswith("LN"):
        return F.layer_norm(x, (cfg.d_model,), getattr(module, "w", None), getattr(module, "b", None), cfg.eps)
    return F.rms_norm(x, (cfg.d_model,), getattr(module, "w", None), cfg.eps)


def qkv_weights(attn: Any, cfg: Any) -> tuple[Float[Tensor, "d_model width3"], Float[Tensor, " width3"]]:
    """Weights and biases of queries, keys and values side by side: one product in place of three."""
    width = cfg.n_heads * cfg.d_head
    # [head, d_model, d_head] -> [d_model, head * d_head]
    weight = torch.cat([w.transpose(0, 1).reshape(cfg.d_model, width) for w in (attn.W_Q, attn.W_K, attn.W_V)], 1)
    return weight, torch.cat([b.flatten() for b in (attn.b_Q, attn.b_K, attn.b_V)])


def rotated(
    attn: Any, heads: Float[Tensor, "batch pos 3 head d_head"], cfg: Any, first: int = 0
) -> Float[Tensor, "batch pos 3 head d_head"]:
    """Queries and keys turned by their positions, from ``first`` on, where a model has rotary ones."""
    if cfg.positional_embedding_type != "rotary":
        return heads
    q, k, v = heads.unbind(2)
    turned = [attn.apply_rotary(q, first), attn.apply_rotary(k, first)]  # float32 also where all else is bfloat16
    return torch.stack([*(t.to(v.dtype) for t in turned), v], 2)


def _tap(taps: Taps, name: str, rows: Tensor, first: int) -> Tensor:
    return taps[name](rows, first) if name in taps else rows


def _normed(
    module: Any, x: Float[Tensor, "row d_model"], cfg: Any, taps: Taps, name: str, first: int
) -> Float[Tensor, "row d_model"]:
    if name not in taps:
        return norm(module, x, cfg)
    scaled = F.layer_norm if cfg.normalization_type.startswith("LN") else F.rms_norm
    x = taps[name](scaled(x, (cfg.d_model,), eps=cfg.eps), first)
    x = x * module.w if hasattr(module, "w") else x
    return x + module.b if hasattr(module, "b") else x


def _tapped_mlp(
    module: Any, x: Float[Tensor, "row d_model"], cfg: Any, taps: Taps, prefix: str, first: int
) -> Float[Tensor, "row d_model"]:
    if not any(prefix + name in taps for name in ("hook_pre", "hook_pre_linear", "hook_post")):
        return mlp(module, x, cfg)
    act_fn = ACTIVATIONS[cfg.act_fn]
    if cfg.gated_mlp:
        gate = _tap(taps, prefix + "hook_pre", x @ module.W_gate, first)
        post = act_fn(gate) * _tap(taps, prefix + "hook_pre_linear", x @ module.W_in, first) + module.b_in
    elif prefix + "hook_pre" in taps:
        post = act_fn(taps[prefix + "hook_pre"](linear(x, module.W_in, module.b_in), first))
    else:
        post = activated(module, x, cfg.act_fn)
    return linear(_tap(taps, prefix + "hook_post", post, first), module.W_out, module.b_out)

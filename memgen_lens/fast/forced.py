"""Answers fed in behind prompts, under many interventions at the answer position: only what these change is run anew.

Prompts and answers are run once. A run with changes sets in at the first layer that it changes: there at the answer
position alone, where nothing else can have changed, and above it at the answer's positions, whose queries attend to the
keys of the prompt, which all copies share. Does not know what the interventions are for.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.blocks import Blocks, Taps
from memgen_lens.fast.decoding import Change, where_copies_part
from memgen_lens.fast.prompts import keys_and_values


class Forced:
    """Prompts with answers behind them, run once.

    Args:
        model: A model that `support.is_plain` is true of.
        tokens: Prompts of one length.
        answers: What is fed in behind each, for each of some answers; the last token of an answer need not be.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Any, tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "answer prompt token"]
    ) -> None:
        self.blocks, self.first = Blocks(model), tokens.shape[1] - 1
        last = tokens[None, :, -1:].expand(len(answers), -1, -1)
        fed = torch.cat([last, answers], dim=2)
        self.shape = tuple(fed.shape)  # answer, prompt, position from the answer position on
        self.shared = keys_and_values(self.blocks, tokens[:, :-1])
        positions = torch.arange(self.first, self.first + fed.shape[2], device=fed.device).expand(fed.shape)
        x = self.blocks.embed(fed.flatten(), positions.flatten(), {})
        self.before: list[Float[Tensor, "answer prompt pos d_model"]] = []
        self.z: list[Float[Tensor, "prompt width"]] = []
        for layer in range(self.blocks.cfg.n_layers):
            self.before.append(x.clone().view(*self.shape, -1))
            x = self.blocks.run(layer, x, partial(self._attended, layer, True), {})

    @torch.inference_mode()
    def changed(self, changes: Mapping[str, Change], copies: int) -> Float[Tensor, "copy answer prompt pos d_vocab"]:
        """Logits behind the answer position and those that follow it.

        Args:
            changes: By full hook-point name, what is done at the answer position; at least one.
            copies: Copies of each prompt, which the changes tell apart.

        Returns:
            Logits; only behind the answer position, and of one answer, as that is the same before all, where nothing is
            changed below the last layer's attention: none of the later positions can see it.
        """
        blocks, (n_answers, n_prompts, n_positions) = self.blocks, self.shape
        layer, before_attention = where_copies_part(changes, blocks.cfg.n_layers)
        here = None
        if not before_attention:
            x, z = self.before[layer][0, :, 0].repeat(copies, 1), self.z[layer].repeat(copies, 1)
            here = blocks.behind(layer, x, z, self._taps(changes, 1, 1))
            layer += 1
        if layer == blocks.cfg.n_layers:
            assert here is not None, "a change before the last layer's attention leaves that layer to be run"
            return blocks.logits(here, {}).view(copies, 1, n_prompts, 1, -1)
        x = self.before[layer].repeat(copies, 1, 1, 1, 1).view(copies, *self.shape, -1)
        if here is not None:
            x[:, :, :, 0] = here.view(copies, 1, n_prompts, -1)
        x, taps = x.flatten(0, 3), self._taps(changes, n_answers, n_positions)
        for above in range(layer, blocks.cfg.n_layers):
            x = blocks.run(above, x, partial(self._attended, above, False), taps)
        return blocks.logits(x, {}).view(copies, *self.shape, -1)

    def _taps(self, changes: Mapping[str, Change], n_answers: int, n_positions: int) -> Taps:
        """The changes, of rows ``[copy, answer, prompt, pos]`` at position 0 alone."""
        n_prompts = self.shape[1]

        def tap(change: Change, rows: Tensor, first: int) -> Tensor:
            row = torch.arange(first, first + len(rows), device=rows.device)
            here = (row % n_positions == 0).nonzero().flatten()
            row = row[here]
            new = change(rows[here], row // (n_answers * n_prompts * n_positions), row // n_positions % n_prompts)
            return rows.index_copy(0, here, new)

        return {name: partial(tap, change) for name, change in changes.items()}

    def _attended(self, layer: int, keep: bool, qkv: Float[Tensor, "row 3 head d_head"]) -> Float[Tensor, "row width"]:
        """Attention of rows ``[sequence, prompt, pos]`` to the prompt's keys and to the sequence's own."""
        _, n_prompts, n = self.shape
        heads = self.blocks.rotated(layer, qkv.unflatten(0, (-1, n)), self.first)
        q, k, v = (rearrange(part, "n q h d -> n h q d") for part in heads.unbind(2))
        axes = {"b": n_prompts, "h": qkv.shape[2], "t": n}
        keys, values = (rearrange(part, "b p h d -> b h p d") for part in self.shared[layer])
        before = rearrange(q, "(s b) h t d -> b h (s t) d", b=n_prompts) @ keys.transpose(2, 3)
        before = rearrange(before, "b h (s t) p -> p (s b h t)", t=n)
        # The keys come first: all queries share each vector of the softmax.
        own = rearrange(q @ k.transpose(2, 3), "n h q k -> k n h q")
        own = own + torch.full((n, n), -math.inf, device=qkv.device).tril(-1)[:, None, None]  # later keys are unseen
        pattern = (torch.cat([before, own.flatten(1)]) * self.blocks.scales[layer]).softmax(0)
        z = rearrange(pattern[: len(before)], "p (s b h t) -> b h (s t) p", **axes) @ values
        z = rearrange(z, "b h (s t) d -> (s b t) (h d)", t=n)
        weights = rearrange(pattern[len(before) :], "k (n h q) -> n h q k", h=axes["h"], q=n)
        z = z + rearrange(weights @ v, "n h q d -> (n q) (h d)")
        if keep:
            self.z.append(z.view(*self.shape, -1)[0, :, 0].clone())
        return z

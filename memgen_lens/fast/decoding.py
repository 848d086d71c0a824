"""Greedy completions of the same prompts under many interventions at once.

The interventions differ from some layer on, from the last token of the prompt on. So the prompts before that token are
run once for all; the layers below run once for each distinct sequence, as interventions that say the same share it;
and above, the rows of one prompt attend together to the keys and values that they share. Does not know what the
interventions are for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.blocks import BLOCK_SITES, Blocks
from memgen_lens.fast.prompts import keys_and_values
from memgen_lens.fast.support import require_room

Change = Callable[[Float[Tensor, "row neuron"], Int[Tensor, " row"], Int[Tensor, " row"]], Float[Tensor, "row neuron"]]
"""From a site's rows, the copy and the prompt of each, what goes on in their place."""
BEFORE_ATTENTION = ("hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v")


@dataclass(frozen=True)
class Intervention:
    """What is done to the copies of a batch of prompts.

    Attributes:
        changes: By full hook-point name (of `BLOCK_SITES`), what is done there at the newest position.
        first_only: At the prompt's last position alone; else at every generated one too.
        later_only: At the generated positions alone.
    """

    changes: dict[str, Change]
    first_only: bool = False
    later_only: bool = False

    def at(self, *, first: bool) -> dict[str, Change]:
        """What is done at the newest position, which is the prompt's last (``first``) or a generated one."""
        return {} if (self.later_only if first else self.first_only) else self.changes


def can_change(hooks: list[str]) -> bool:
    """Whether `greedy_copies` knows all of these hook points."""
    return all(hook.startswith("blocks.") and hook.split(".", 2)[2] in BLOCK_SITES for hook in hooks)


@dataclass
class _Sequences:
    """Sequences that are generated side by side: their prompts, and their keys and values so far.

    Attributes:
        prompt: The prompt that each continues ``[sequence]``, in ascending order.
        past: By layer, keys and values of the positions since the prompt's last one ``[2, step, sequence, width]``.
    """

    prompt: Int[Tensor, " sequence"]
    past: dict[int, Float[Tensor, "2 step sequence width"]] = field(default_factory=dict)

    def take(self, index: Int[Tensor, " taken"]) -> "_Sequences":
        """Some of the sequences, each any number of times."""
        past = {layer: kept.index_select(2, index) for layer, kept in self.past.items()}
        return _Sequences(self.prompt[index], past)


@torch.inference_mode()
def greedy_copies(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    *,
    copies: int,
    max_new_tokens: int,
    eos: int,
    intervention: Intervention,
) -> Int[Tensor, "copy prompt new"]:
    """Greedy continuations of every copy of every prompt.

    Args:
        model: A model that `support.is_plain` is true of.
        tokens: Prompts of one length.
        copies: Copies of each prompt, which the intervention tells apart.
        max_new_tokens: Tokens generated at most.
        eos: The token that ends a sequence; it fills what is behind its end.
        intervention: What is done to the copies.

    Returns:
        New tokens.

    Raises:
        ModelError: A sequence has not ended where the model's context does.
    """
    n_prompts, device = len(tokens), tokens.device
    state = _State.of(Blocks(model), tokens, copies, intervention)
    out = torch.full((n_prompts * copies, max_new_tokens), eos, device=device)
    n_made = 0
    for step in range(max_new_tokens):
        n_made = step + 1
        new = state.next_tokens(tokens.shape[1] - 1 + step, intervention, first=step == 0)
        out[state.row, step] = new
        going = (new != eos).nonzero().flatten()
        if not len(going):
            break
        state.go_on(going, new)
    return out.view(n_prompts, copies, max_new_tokens)[:, :, :n_made].transpose(0, 1)


@dataclass
class _State:
    """Where the generation stands.

    Attributes:
        blocks: The model.
        prompt_length: Tokens of a prompt.
        copies: Copies of each prompt.
        shared: By layer, keys and values of all but the prompts' last token.
        first_layer: The first layer in which something is changed.
        spread_before: Whether that is before its attention.
        row: Those of all rows that have not ended ``[sequence]``: the copies of the first prompt, of the second, ...
        rows: These rows, with their past in the layers from the first that is changed on.
        nodes: Distinct sequences among the rows, with their past in the layers below.
        node_of_row: The node of each row ``[sequence]``.
        words: The newest token of each node.
    """

    blocks: Blocks
    prompt_length: int
    copies: int
    shared: list[Float[Tensor, "2 prompt before head d_head"]]
    first_layer: int
    spread_before: bool
    row: Int[Tensor, " sequence"]
    rows: _Sequences
    nodes: _Sequences
    node_of_row: Int[Tensor, " sequence"]
    words: Int[Tensor, " node"]

    @classmethod
    def of(cls, blocks: Blocks, tokens: Int[Tensor, "prompt pos"], copies: int, intervention: Intervention) -> "_State":
        """The state before the first new token."""
        row = torch.arange(len(tokens) * copies, device=tokens.device)
        return cls(
            blocks,
            tokens.shape[1],
            copies,
            keys_and_values(blocks, tokens[:, :-1]),
            *where_copies_part(intervention.changes, blocks.cfg.n_layers),
            row=row,
            rows=_Sequences(row // copies),
            nodes=_Sequences(torch.arange(len(tokens), device=tokens.device)),
            node_of_row=row // copies,
            words=tokens[:, -1],
        )

    def next_tokens(self, position: int, intervention: Intervention, *, first: bool) -> Int[Tensor, " sequence"]:
        """The most likely token behind the newest one of each row."""
        blocks, n_layers = self.blocks, self.blocks.cfg.n_layers
        require_room(position + 1, blocks.cfg.n_ctx, prompt_length=self.prompt_length)
        taps = {name: partial(self._changed, change) for name, change in intervention.at(first=first).items()}
        x = blocks.embed(self.words, torch.full_like(self.words, position), {})
        for layer in range(n_layers):
            parts = layer == self.first_layer
            if parts and self.spread_before:
                x = x.index_select(0, self.node_of_row)
            below = layer < self.first_layer or (parts and not self.spread_before)
            spread = self.node_of_row if parts and below else None
            attend = partial(self._attended, layer, position, self.nodes if below else self.rows, spread)
            x = blocks.run(layer, x, attend, taps, rows=spread)
        if self.first_layer == n_layers:
            x = x.index_select(0, self.node_of_row)
        return blocks.logits(x, {}).argmax(-1)

    def go_on(self, going: Int[Tensor, " going"], new: Int[Tensor, " sequence"]) -> None:
        """Add the new tokens to the rows that go on; the others have ended."""
        if len(going) < len(new):
            self.row, self.rows, self.node_of_row = self.row[going], self.rows.take(going), self.node_of_row[going]
            new = new[going]
        # Rows of one node that say the same token go on as one node.
        n_tokens = int(new.max()) + 1
        distinct, self.node_of_row = torch.unique(self.node_of_row * n_tokens + new, return_inverse=True)
        self.nodes, self.words = self.nodes.take(distinct // n_tokens), distinct % n_tokens

    def _changed(self, change: Change, h: Float[Tensor, "some neuron"], first: int) -> Float[Tensor, "some neuron"]:
        some = slice(first, first + len(h))
        return change(h, self.row[some] % self.copies, self.rows.prompt[some])

    def _attended(
        self,
        layer: int,
        position: int,
        sequences: _Sequences,
        spread: Int[Tensor, " spread"] | None,
        qkv: Float[Tensor, "sequence 3 head d_head"],
    ) -> Float[Tensor, "kept width"]:
        """Attention of each sequence's newest position, for each row where a block's rows are spread behind it."""
        heads = self.blocks.rotated(layer, qkv[:, None], position)[:, 0]
        own = heads[:, 1:].flatten(2).transpose(0, 1)[:, None]  # [2, step, sequence, width]
        # A copy in any case: the room of queries, keys and values is used again.
        own = torch.cat([sequences.past[layer], own], dim=1) if layer in sequences.past else own.clone()
        sequences.past[layer] = own
        own_heads = own.unflatten(3, qkv.shape[2:])
        z = _attention(heads[:, 0], own_heads, self.shared[layer], sequences.prompt, self.blocks.scales[layer])
        return z if spread is None else z.index_select(0, spread)


def where_copies_part(changes: Mapping[str, Change], n_layers: int) -> tuple[int, bool]:
    """The first layer in which something is changed, and whether that is before its attention."""
    sites = sorted((int(name.split(".")[1]), BLOCK_SITES.index(name.split(".", 2)[2])) for name in changes)
    if not sites:
        return n_layers, False
    layer, site = sites[0]
    return layer, BLOCK_SITES[site] in BEFORE_ATTENTION


def _attention(
    q: Float[Tensor, "sequence head d_head"],
    own: Float[Tensor, "2 step sequence head d_head"],
    shared: Float[Tensor, "2 prompt before head d_head"],
    prompt: Int[Tensor, " sequence"],
    scale: float,
) -> Float[Tensor, "sequence width"]:
    """Attention to the keys of the prompt, which its sequences share, and to each sequence's own."""
    _, n_prompts, n_before, n_heads, _ = shared.shape
    own_scores = (q * own[0]).sum(3)  # [step, sequence, head]
    if not n_before:
        return _weighted((own_scores * scale).softmax(0), own[1])
    place, slots = _places(prompt, n_prompts)
    keys, values = shared.transpose(2, 3)  # 2 x [prompt, head, before, d_head]
    by_slot = {"slot": slots, "head": n_heads}
    siblings = _placed(q.flatten(1), place, n_prompts * slots)
    siblings = rearrange(siblings, "(prompt slot) (head d) -> prompt head slot d", **by_slot)
    scores = siblings @ keys.transpose(2, 3)  # [prompt, head, slot, before]
    scores = rearrange(scores, "prompt head slot before -> before (prompt slot) head")
    before_scores = scores.index_select(1, place)
    # The keys come first: all sequences share each vector of the softmax.
    pattern = (torch.cat([before_scores, own_scores]) * scale).softmax(0)
    before = rearrange(pattern[:n_before], "before sequence head -> sequence (head before)")
    weights = _placed(before, place, n_prompts * slots)
    weights = rearrange(weights, "(prompt slot) (head before) -> prompt head slot before", **by_slot)
    z = rearrange(weights @ values, "prompt head slot d -> (prompt slot) (head d)").index_select(0, place)
    return z + _weighted(pattern[n_before:], own[1])


def _weighted(
    pattern: Float[Tensor, "step sequence head"], values: Float[Tensor, "step sequence head d_head"]
) -> Float[Tensor, "sequence width"]:
    return (pattern[..., None] * values).sum(0).flatten(1)


def _places(prompt: Int[Tensor, " sequence"], n_prompts: int) -> tuple[Int[Tensor, " sequence"], int]:
    """A place for each sequence in a table of prompts and slots, and the number of slots."""
    counts = torch.bincount(prompt, minlength=n_prompts)
    starts = counts.cumsum(0) - counts
    slots = int(counts.max())
    return prompt * slots + torch.arange(len(prompt), device=prompt.device) - starts[prompt], slots


def _placed(
    x: Float[Tensor, "sequence width"], place: Int[Tensor, " sequence"], n_places: int
) -> Float[Tensor, "place width"]:
    return x if len(x) == n_places else x.new_zeros(n_places, x.shape[1]).index_copy_(0, place, x)

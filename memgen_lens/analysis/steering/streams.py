"""Complete prompts while their residual stream is that of other prompts, at some depth and positions.

Does not know pairs, nor judge what is said.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.core.errors import SiteError
from memgen_lens.core.types import LensModel
from memgen_lens.models.sites import site_hooks
from memgen_lens.models.step import forward, greedy_tokens, keeps_past, rows_at_once
from memgen_lens.models.tokens import by_length, decode, tokenized


def stream_hooks(model: LensModel) -> list[str]:
    """Hook points of the residual stream by depth: what enters each block, then what leaves the last."""
    return [*site_hooks(model, "resid_pre"), site_hooks(model, "resid_post")[-1]]


@dataclass(frozen=True)
class Patch:
    """Where the residual stream of a prompt is another's.

    Attributes:
        depth: Blocks that have been run.
        columns: Whether each position is, counted from the end: the last is the answer position; short prompts have
            less of them.
    """

    depth: int
    columns: Bool[Tensor, " pos"]


@torch.inference_mode()
def patched_outputs(
    model: LensModel,
    prompts: Sequence[str],
    sources: Sequence[str],
    patches: Sequence[Patch],
    *,
    max_new_tokens: int,
    batch_size: int,
    prepend_bos: bool | None,
    done: Callable[[int], Any],
) -> list[list[str]]:
    """Greedy completions of prompts under each of several patches from the prompts beside them.

    The prompt's positions are patched, never what is generated behind it: with a key-value cache the prompt is run
    once, without one it is patched anew at each step.

    Args:
        model: A lens model.
        prompts: Prompts.
        sources: For each a prompt of as many tokens, whose residual stream is taken.
        patches: Any number; they ride in the batch dimension.
        max_new_tokens: Tokens generated at most.
        batch_size: Rows (patches x prompts) in one forward pass at most.
        prepend_bos: See `memgen_lens.complete`.
        done: Told how many completions have been made.

    Returns:
        For each patch, one output a prompt.

    Raises:
        SiteError: The residual stream has no row for each position.
    """
    outputs = [[""] * len(prompts) for _ in patches]
    of_sources = tokenized(model, sources, prepend_bos=prepend_bos)[0]
    for index, tokens in by_length(model, prompts, batch_size=batch_size, prepend_bos=prepend_bos):
        width = tokens.shape[1]
        values = _streams(model, of_sources[torch.tensor(index, device=of_sources.device), :width])
        room = rows_at_once(model, width + max_new_tokens, cached=keeps_past(model))
        for some in _blocks(len(patches), max(1, min(batch_size, room) // len(index))):
            run = _Run(model, values, [patches[i] for i in some], max_new_tokens)
            texts = iter(decode(model, run.completed(tokens)))
            for i in some:
                for place in index:
                    outputs[i][place] = next(texts)
            done(len(some) * len(index))
    return outputs


@dataclass(frozen=True)
class _Run:
    """Some patches of prompts of one length.

    Attributes:
        model: The model.
        values: The sources' residual stream, by depth ``[prompt, pos, d_model]``.
        patches: The patches.
        max_new_tokens: Tokens generated at most.
    """

    model: LensModel
    values: Sequence[Float[Tensor, "prompt pos d_model"]]
    patches: Sequence[Patch]
    max_new_tokens: int

    def completed(self, tokens: Int[Tensor, "prompt pos"]) -> Int[Tensor, "row new"]:
        """New tokens, patch after patch."""
        width, runs = tokens.shape[1], [0]

        def before(step: int, span: slice) -> None:
            # With a cache the prompt is run once; without, it is run anew at each step, with what was generated.
            runs[0] = span.stop if span.start == 0 else 0

        def hook_of(depth: int) -> Callable[[Tensor, Any], Tensor]:
            masks = torch.stack([_fitted(p.columns, width) & (p.depth == depth) for p in self.patches])

            def put(activation: Tensor, hook: Any) -> Tensor:
                if not runs[0]:
                    return activation
                _require_rows(activation, runs[0])
                rows = activation[:, :width].unflatten(0, (len(self.patches), -1))  # [patch, prompt, pos, d_model]
                chosen = masks[:, None, :, None].to(rows.device)
                new = torch.where(chosen, self.values[depth].to(rows), rows).flatten(0, 1)
                return torch.cat([new, activation[:, width:]], dim=1)

            return put

        names = stream_hooks(self.model)
        hooks = [(names[depth], hook_of(depth)) for depth in sorted({p.depth for p in self.patches})]
        with self.model.hooks(fwd_hooks=hooks):
            return greedy_tokens(
                self.model,
                tokens.repeat(len(self.patches), 1),
                max_new_tokens=self.max_new_tokens,
                before=before,
            )


def _streams(model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> list[Float[Tensor, "prompt pos d_model"]]:
    """The residual stream of prompts of one length, by depth."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor, Any], None]:
        def keep(activation: Tensor, hook: Any) -> None:
            _require_rows(activation, tokens.shape[1])
            seen[name] = activation.detach().clone()

        return keep

    names = stream_hooks(model)
    with model.hooks(fwd_hooks=[(name, keeper(name)) for name in names]):
        forward(model, tokens, torch.ones_like(tokens))
    return [seen[name] for name in names]


def _fitted(columns: Bool[Tensor, " pos"], width: int) -> Bool[Tensor, " width"]:
    """Columns, counted from the end, as positions of prompts of a width."""
    fitted = torch.zeros(width, dtype=torch.bool)
    n = min(width, len(columns))
    fitted[width - n :] = columns[len(columns) - n :]
    return fitted


def _require_rows(activation: Tensor, n: int) -> None:
    if activation.ndim != 3 or activation.shape[1] != n:
        raise SiteError(
            "patching the residual stream",
            expected=f"activations of the {n} positions that are run, [batch, pos, d_model]",
            received=f"{list(activation.shape)}",
            fix="Patch a model whose residual stream has one row a position.",
        )


def _blocks(n: int, size: int) -> Iterator[range]:
    for first in range(0, n, size):
        yield range(first, min(first + size, n))

"""Hooks that change rows of a site at some positions of a forward pass, for copies that ride in the batch dimension.

Does not know what the changes are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memgen_lens.core.errors import ModelError, PairsError, SiteError
from memgen_lens.fast.decoding import Change
from memgen_lens.models.passes import At


def change_hooks(
    changes: dict[str, Change],
    *,
    at: Callable[[], At | None],
    n_copies: int,
    n_sources: int | None = None,
) -> list[tuple[Any, Callable[..., Any]]]:
    """Hooks that make these changes, each of as many equal blocks of rows being a copy of the same prompts.

    Args:
        changes: By full hook-point name.
        at: Asked in each hook for the positions of the running forward pass that are changed; None for none.
        n_copies: Blocks of rows.
        n_sources: How many prompts there must be; None for any number.

    Raises (when a hook runs):
        SiteError: The site has no row for each position.
        ModelError: The rows are not as many equal blocks.
        PairsError: There are other than ``n_sources`` prompts.
    """

    def hook_of(name: str, change: Change) -> Callable[..., Tensor]:
        def steer(activation: Tensor, hook: Any) -> Tensor:
            here = at()
            if here is None:
                return activation
            if activation.ndim < 3 or activation.shape[1] != here.length:
                raise SiteError(
                    f"steering site {name!r}",
                    expected=f"activations of the {here.length} positions that are run, [batch, pos, ...]",
                    received=f"{list(activation.shape)}",
                    fix="Steer the residual stream, the MLP or the heads' values: this one holds cached positions too.",
                )
            n_prompts = _prompts_of(activation, n_copies, n_sources)
            if isinstance(here.chosen, slice):
                row = torch.arange(len(activation), device=activation.device)
                part = activation[:, here.chosen]
                row = row.repeat_interleave(part.shape[1])
                place: Any = (slice(None), here.chosen)
            else:
                place = here.chosen.to(activation.device).nonzero(as_tuple=True)
                part, row = activation[place][:, None], place[0]
            flat = part.flatten(2).flatten(0, 1)  # heads into the neuron axis, positions into rows
            changed = change(flat, row // n_prompts, row % n_prompts).to(part.dtype).view_as(part)
            if changed.shape == activation.shape:
                return changed
            new = activation.clone()
            new[place] = changed if isinstance(here.chosen, slice) else changed[:, 0]
            return new

        return steer

    return [(name, hook_of(name, change)) for name, change in changes.items()]


def _prompts_of(activation: Tensor, n: int, n_sources: int | None) -> int:
    """How many prompts each of ``n`` equal blocks of a batch holds."""
    if len(activation) % n:
        raise ModelError(
            "steering",
            expected=f"a batch in {n} equal blocks",
            received=f"{len(activation)} rows",
            fix="Repeat the prompts.",
        )
    n_prompts = len(activation) // n
    if n_sources not in (None, n_prompts):
        raise PairsError(
            "Steering.applied(mode='patch')",
            expected=f"a batch of {n_sources} prompts, one for each source pair",
            received=f"{n_prompts}",
            fix="Name the source pair of each prompt: applied(model, toward=..., pairs=[...]).",
        )
    return n_prompts

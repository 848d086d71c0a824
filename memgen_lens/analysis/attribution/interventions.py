"""A neuron's effect on the contrast of a prompt: by gradients for all neurons at once, or exactly, one at a time.

Each function takes prompts that have been asked (`contrast`), and gives one number a prompt and neuron. Does not know
pairs nor scores.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.analysis.attribution.contrast import Asked, Contrast, Hooks
from memgen_lens.core.errors import ModelError, SiteError
from memgen_lens.fast.decoding import Change

Values = Float[Tensor, "batch layer neuron"]


def gradients(contrast: Contrast, asked: Asked, hooks: Sequence[str]) -> list[Float[Tensor, "batch neuron"]]:
    """Gradient of the contrast by each hook point's activation at the answer position, all in one backward pass."""
    deltas: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[..., Tensor]:
        def add(activation: Tensor, hook: Any) -> Tensor:
            if name in deltas:
                return activation  # some hook points fire twice a pass, with the same values
            at = _answer_rows(name, activation, asked)
            deltas[name] = torch.zeros_like(at, requires_grad=True)
            return _put(activation, at + deltas[name], asked)

        return add

    with torch.enable_grad():
        value = contrast.of(asked, [(name, adding(name)) for name in hooks])
        _require_reached(hooks, deltas)
        found = _grad(value.sum(), [deltas[name] for name in hooks], hooks)
    return [_summed(gradient, 1, asked)[0] for gradient in found]


def path_gradients(
    contrast: Contrast, asked: Asked, hooks: Sequence[str], start: Values, end: Values, n: int, *, power: int = 1
) -> Values:
    """Mean gradient while one layer's activation goes straight from ``start`` to ``end``, the others as they come.

    By Gauss-Legendre quadrature with ``n`` points, a layer at a time.

    Args:
        contrast: The quantity.
        asked: Prompts.
        hooks: Hook points, one a layer.
        start: Where the path begins.
        end: Where it ends.
        n: Points.
        power: The path's share ``t`` is this power of what the points divide, ``t = u ** power``: above 1, they stand
            close together at the start.
    """
    u, weights = np.polynomial.legendre.leggauss(n)
    u = (u + 1) / 2
    points, weights = (
        torch.from_numpy(part).float().to(start.device) for part in (u**power, weights / 2 * power * u ** (power - 1))
    )
    at_once, means = contrast.copies(asked), []
    for layer, name in enumerate(hooks):
        mean = torch.zeros_like(start[:, layer])
        for part in torch.arange(n).split(at_once):
            t = points[part.to(points.device)][:, None, None]
            placed = start[:, layer] + t * (end[:, layer] - start[:, layer])  # [copy, batch, neuron]
            seen: list[Tensor] = []

            def put(activation: Tensor, hook: Any, placed: Tensor = placed, seen: list[Tensor] = seen) -> Tensor:
                rows = _answer_rows(str(hook.name), activation, asked)
                if not seen:
                    seen.append(_for_rows(placed, rows).requires_grad_())
                return _put(activation, seen[0], asked)

            with torch.enable_grad():
                value = contrast.of(asked, [(name, put)], copies=len(part))
                _require_reached([name], {name: None} if seen else {})
                (found,) = _grad(value.sum(), seen, [name])
            each = _summed(found, len(part), asked)
            mean += (weights[part.to(weights.device)][:, None, None] * each).sum(0)
        means.append(mean)
    return torch.stack(means, dim=1)


@torch.no_grad()
def changes(
    contrast: Contrast,
    asked: Asked,
    hooks: Sequence[str],
    values: Values,
    groups: Sequence[Bool[np.ndarray, "layer neuron"]],
    done: Callable[[int], Any] = lambda n: None,
) -> Float[Tensor, "batch group"]:
    """How the contrast changes where the neurons of one group have other values at the answer position.

    Args:
        contrast: The quantity.
        asked: Prompts.
        hooks: Hook points, one a layer.
        values: What is put in.
        groups: Which neurons are changed together.
        done: Told how many prompts have been run.
    """
    found, at_once = [], max(1, contrast.copies(asked) - 1)
    forced = contrast.forced(asked, hooks)
    nothing = np.zeros_like(groups[0])
    for first in range(0, len(groups), at_once):
        some = groups[first : first + at_once]
        # What nothing changes is run with the others: a pass of another size would round otherwise.
        masks = torch.from_numpy(np.stack([nothing, *some])).to(values.device)  # [copy, layer, neuron]
        touched = masks.any(0).any(1).nonzero().flatten().tolist()
        if forced is None:
            hooked: Hooks = [(hooks[layer], _putting(masks[:, layer], values[:, layer], asked)) for layer in touched]
            each = contrast.of(asked, hooked, copies=len(masks))
        else:
            taps: dict[str, Change] = {
                str(hooks[layer]): partial(_mixed, masks[:, layer], values[:, layer]) for layer in touched
            }
            each = contrast.changed(asked, forced, taps, len(masks))
        found.append(each[1:] - each[:1])
        done(len(some) * len(asked.index))
    return torch.cat(found).T


def _putting(
    mask: Bool[Tensor, "copy neuron"], values: Float[Tensor, "batch neuron"], asked: Asked
) -> Callable[..., Tensor]:
    """A hook that puts values in the place of each copy's neurons."""

    def change(activation: Tensor, hook: Any) -> Tensor:
        rows = _answer_rows(str(hook.name), activation, asked)
        own = rows.flatten(1).unflatten(0, (len(mask), -1, len(asked.index)))
        new = torch.where(mask[:, None, None], values.to(own.dtype), own)
        return _put(activation, new.flatten(0, 2).view_as(rows), asked)

    return change


def _mixed(
    mask: Bool[Tensor, "copy neuron"],
    values: Float[Tensor, "batch neuron"],
    rows: Float[Tensor, "row neuron"],
    copy: Int[Tensor, " row"],
    prompt: Int[Tensor, " row"],
) -> Float[Tensor, "row neuron"]:
    """The same without hooks, of rows whose copy and prompt are known."""
    return torch.where(mask[copy], values[prompt].to(rows.dtype), rows)


def _answer_rows(name: str, activation: Tensor, asked: Asked) -> Tensor:
    """What a hook point has at the answer position, ``[row, ...]``."""
    if activation.ndim < 3 or activation.shape[1] <= asked.at:
        raise SiteError(
            f"site {name!r}",
            expected="activations with one row a position that is run, [batch, pos, ...]",
            received=f"{list(activation.shape)}",
            fix="Choose a site of the residual stream, the MLP or the heads' values.",
        )
    return activation[:, asked.at]


def _put(activation: Tensor, rows: Tensor, asked: Asked) -> Tensor:
    if activation.shape[1] == 1:
        return rows[:, None]
    behind = activation[:, asked.at + 1 :]
    return torch.cat([activation[:, : asked.at], rows[:, None], behind], dim=1)


def _for_rows(values: Float[Tensor, "copy batch neuron"], rows: Tensor) -> Tensor:
    """Values for each copy's prompts, for all the rows of it: one or both answers of each prompt."""
    n_answers = len(rows) // (values.shape[0] * values.shape[1])
    each = values[:, None].expand(-1, n_answers, -1, -1).flatten(0, 2)
    return each.to(rows.dtype).reshape(rows.shape).clone()


def _summed(gradient: Tensor, copies: int, asked: Asked) -> Float[Tensor, "copy batch neuron"]:
    """A prompt's gradient is the sum of those of its rows, which share all up to the answer position."""
    return gradient.flatten(1).float().unflatten(0, (copies, -1, len(asked.index))).sum(1)


def _grad(value: Tensor, inputs: list[Tensor], hooks: Sequence[str]) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        raise ModelError(
            "attribute",
            expected="a quantity that can be traced back to the activations",
            received="one without a gradient",
            fix="Compute metric= with torch alone, and without detach().",
        )
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return tuple(torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True))


def _require_reached(hooks: Sequence[str], seen: Any) -> None:
    lacking = [name for name in hooks if name not in seen]
    if lacking:
        raise SiteError(
            "attribute",
            expected="hook points that this model's forward pass reaches",
            received=f"{lacking[0]}, which it has and never calls",
            fix="Choose a site inside the blocks.",
        )

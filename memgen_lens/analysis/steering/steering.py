"""Steer a model at inference time through hooks: shift neurons, or patch them with the paired prompt's values.

Does not choose its settings (see `sweep`) nor judge what it does (see `evaluation`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations, SteeringSetting
from memgen_lens.core.types import Direction, LensModel, Positions
from memgen_lens.fast.decoding import Change
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import At, watched_passes
from memgen_lens.models.sites import site_hooks


@dataclass(frozen=True)
class Steering:
    """Which neurons of one site are changed, and to what.

    Two modes. ``"shift"`` (arXiv 2412.18497 v2, sec. 5): ``h_i <- h_i + s * alpha * sign(rho_i) * abs(nmd_i)`` with
    ``s = +1`` towards memorization and ``-1`` towards generalization. ``"patch"``: the neurons take the values they
    have at the answer position of the paired prompt (activation patching restricted to neurons).

    Attributes:
        setting: What was asked for.
        scores: The scores the neurons were chosen by.
        selected: The neurons that are changed.
        shift: What is added towards memorization; 0 elsewhere, and everywhere in patch mode.
        source: In patch mode, the site's activations to patch from.
    """

    setting: SteeringSetting
    scores: NeuronScores
    selected: Bool[np.ndarray, "layer neuron"]
    shift: Float[np.ndarray, "layer neuron"]
    source: SiteActivations | None = None

    @classmethod
    @arguments(
        "Steering.from_scores",
        scores=kinds.one(NeuronScores),
        top_fraction=kinds.Share,
        alpha=kinds.Positive,
        mode=kinds.ModeName,
        source=kinds.one(Activations) | None,
        layers=kinds.Layers | None,
        positions=kinds.PositionsName | None,
    )
    def from_scores(
        cls,
        scores: NeuronScores,
        top_fraction: float = 0.1,
        alpha: float = 2.0,
        *,
        mode: Literal["shift", "patch"] = "shift",
        source: Activations | None = None,
        layers: int | Sequence[int] | None = None,
        positions: Positions | None = None,
    ) -> "Steering":
        """Steer the neurons with the largest abs(rho).

        Args:
            scores: Scores of one site.
            top_fraction: Share of the site's neurons, over all its layers, in (0, 1].
            alpha: Multiple of abs(nmd), above 0; not used in patch mode.
            mode: ``"shift"`` or ``"patch"``.
            source: Recorded activations to patch from; patch mode needs them.
            layers: Steer in this layer or these only; the neurons are still ranked over all.
            positions: ``"answer"`` (default): the answer position and every generated one. ``"prompt"``: the answer
                position alone (all that can be patched, as only there activations are recorded). ``"all"``: everywhere.

        Raises:
            SettingsError: A value is out of range, or the mode and the other arguments are at odds.
            SiteError: ``source`` lacks the scores' site.
        """
        call = "Steering.from_scores"
        n_layers = scores.rho.shape[0]
        chosen = np.arange(n_layers) if layers is None else np.atleast_1d(np.asarray(layers))
        if (chosen >= n_layers).any():
            raise SettingsError(
                f"{call}(layers=...)",
                expected=f"layers of the scores, 0 to {n_layers - 1}",
                received=repr(layers),
                fix="Change layers.",
            )
        if mode == "patch" and (source is None or positions not in (None, "prompt")):
            raise SettingsError(
                call,
                expected="source=record(...) and positions='prompt' with mode='patch'",
                received=f"source={'None' if source is None else '...'}, positions={positions!r}",
                fix="Activations are recorded at the answer position alone, so only there can they be patched.",
            )
        strength = np.abs(scores.rho).ravel()
        count = max(1, round(top_fraction * strength.size))
        selected = np.zeros(strength.size, dtype=bool)
        selected[np.argsort(-strength, kind="stable")[:count]] = True
        selected = selected.reshape(scores.rho.shape) & np.isin(np.arange(n_layers), chosen)[:, None]
        shift = alpha * np.sign(scores.rho) * np.abs(scores.nmd) * selected
        patching = mode == "patch"
        return cls(
            setting=SteeringSetting(
                scores.site,
                top_fraction,
                None if patching else alpha,
                "prompt" if patching else positions or "answer",
                mode,
            ),
            scores=scores,
            selected=selected,
            shift=np.zeros_like(shift) if patching else shift,
            source=source.site(scores.site) if source is not None and patching else None,
        )

    @arguments(
        "Steering.applied",
        model=lens_model("Steering.applied"),
        toward=kinds.DirectionName,
        pairs=kinds.Indices | None,
        prompt_length=kinds.Counts | None,
    )
    @contextmanager
    def applied(
        self,
        model: LensModel,
        *,
        toward: Direction,
        pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
        prompt_length: int | Sequence[int] | None = None,
    ) -> Iterator[LensModel]:
        """Steer every forward pass inside the ``with`` block; plain hooks, gone at its end, also after an exception.

        Each row is steered at its own answer position: the last one of its prompt that is no padding. A pass that goes
        on from a cache, or that runs the pass before and one more token, is a step of a generation.

        Args:
            model: A lens model; call it, or its ``generate``, as ever.
            toward: The behaviour to push towards.
            pairs: In patch mode, the source pair of each row of the batch; default: pair p for row p.
            prompt_length: Positions of the prompt, padding before it counted; of all rows or of each. Needed where
                answers are fed in behind the prompts. Default: a prompt ends where the attention mask does, or before
                the pad tokens that a row ends in.

        Yields:
            The model, steered.

        Raises:
            SiteError: The model lacks the site, or has another shape there than the scores.
            SettingsError: ``toward`` is not a behaviour to steer towards.
            ModelError: The model is compiled or no lens model; or (when it is run) where a prompt ends cannot be known.
        """
        with watched_passes(model, prompt_length=prompt_length) as passes:
            at = partial(passes.where, self.setting.positions)
            with model.hooks(fwd_hooks=steering_hooks(model, [self], toward=toward, pairs=pairs, at=at)):
                yield model


def steering_hooks(
    model: LensModel,
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    at: Callable[[], At | None],
    pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
) -> list[tuple[Any, Callable[..., Any]]]:
    """Hooks for several steerings of one site and mode at once, which ride in the batch dimension.

    Args:
        model: A lens model.
        steerings: One for every row, or one for each of as many equal blocks of rows, block after block.
        toward: See `Steering.applied`.
        at: Asked in each hook for the positions of the running forward pass that are changed; None for none.
        pairs: See `Steering.applied`; of the rows of one block.

    Raises:
        SiteError: The model lacks the site, or has another shape there than the scores; or (when it is run) the site
            has no row for each position.
    """
    first, n = steerings[0], len(steerings)

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
            n_prompts = _rows_of_a_block(activation, n, first, pairs)
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

    changes = steering_changes(model, steerings, toward=toward, pairs=pairs)
    return [(name, hook_of(name, change)) for name, change in changes.items()]


def steering_changes(
    model: LensModel,
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
) -> dict[str, Change]:
    """What several steerings of one site and mode do to rows of each hook point that any of them changes.

    Args:
        model: See `steering_hooks`.
        steerings: Which of them a row is steered by, its ``copy`` tells.
        toward: See `Steering.applied`.
        pairs: In patch mode, the source pair of each prompt.

    Raises:
        SiteError: The model lacks the site, or has another shape there than the scores.
    """
    first = steerings[0]
    hooks = site_hooks(model, first.setting.site)
    if len(hooks) != len(first.selected):
        raise _wrong_shape(first.setting.site, f"{len(first.selected)} layers", f"{len(hooks)}")
    sign = 1.0 if toward == "memorization" else -1.0

    def change_of(layer: int) -> Change:
        if first.source is None:
            shifts = np.stack([sign * s.shift[layer] for s in steerings])
            change = _shift(torch.as_tensor(shifts, dtype=torch.float32))
        else:
            side = first.source.generalized if toward == "generalization" else first.source.memorized
            rows = side[np.arange(len(side)) if pairs is None else _known_pairs(pairs, len(side)), layer]
            masks = np.stack([s.selected[layer] for s in steerings])
            change = _patch(torch.as_tensor(rows), torch.as_tensor(masks))

        def checked(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
            if h.shape[1] != first.selected.shape[1]:
                raise _wrong_shape(first.setting.site, f"{first.selected.shape[1]} neurons", f"{h.shape[1]}")
            return change(h, copy, prompt)

        return checked

    changed = np.flatnonzero(np.any([s.selected.any(1) for s in steerings], axis=0))
    return {hooks[layer]: change_of(layer) for layer in changed.tolist()}


def _known_pairs(pairs: Any, n: int) -> np.ndarray:
    """Indices of source pairs, each of which is there."""
    index = np.asarray(pairs)
    unknown = index[(index < 0) | (index >= n)]
    if len(unknown):
        raise PairsError(
            "Steering.applied(pairs=...)",
            expected=f"indices of source pairs, 0 to {n - 1}",
            received=str(unknown[0]),
            fix="Name the source pair of each prompt by its place in the recorded pairs.",
        )
    return index


def _shift(shifts: Float[Tensor, "copy neuron"]) -> Change:
    """Add each copy's shift; on the device of what is changed, which of a model spread over several is the layer's."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal shifts
        shifts = shifts.to(h.device)
        return h + (shifts[0] if len(shifts) == 1 else shifts.index_select(0, copy))

    return change


def _patch(rows: Float[Tensor, "prompt neuron"], masks: Bool[Tensor, "copy neuron"]) -> Change:
    """Put the source rows' values in where a copy's mask is true."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal rows, masks
        rows, masks = rows.to(h.device), masks.to(h.device)
        return torch.where(masks[copy], rows[prompt].to(h.dtype), h)

    return change


def _rows_of_a_block(part: Tensor, n: int, steering: Steering, pairs: Any) -> int:
    """How many prompts each of ``n`` equal blocks of a batch holds."""
    if len(part) % n:
        raise ModelError(
            "steering",
            expected=f"a batch in {n} equal blocks",
            received=f"{len(part)} rows",
            fix="Repeat the prompts.",
        )
    n_prompts = len(part) // n
    if steering.source is not None:
        n_sources = len(steering.source.memorized) if pairs is None else len(pairs)
        if n_prompts != n_sources:
            raise PairsError(
                "Steering.applied(mode='patch')",
                expected=f"a batch of {n_sources} prompts, one for each source pair",
                received=f"{n_prompts}",
                fix="Name the source pair of each prompt: applied(model, toward=..., pairs=[...]).",
            )
    return n_prompts


def _wrong_shape(site: str, expected: str, received: str) -> SiteError:
    return SiteError(
        f"steering site {site!r}",
        expected=f"a model with {expected} there, as in the scores",
        received=received,
        fix="Score this very model: attribute(record(model, ...), site).",
    )

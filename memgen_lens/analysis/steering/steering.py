"""Steer a model at inference time through hooks: shift neurons, or patch them with the paired prompt's values.

Does not choose its settings (see `sweep`) nor judge what it does (see `evaluation`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations, SteeringSetting
from memgen_lens.core.types import Direction, LensModel, Positions
from memgen_lens.fast.decoding import Change
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
    def from_scores(
        cls,
        scores: NeuronScores,
        top_fraction: float = 0.1,
        alpha: float = 2.0,
        *,
        mode: Literal["shift", "patch"] = "shift",
        source: Activations | None = None,
        layers: Sequence[int] | None = None,
        positions: Positions | None = None,
    ) -> "Steering":
        """Steer the neurons with the largest abs(rho).

        Args:
            scores: Scores of one site.
            top_fraction: Share of the site's neurons, over all its layers, in (0, 1].
            alpha: Multiple of abs(nmd), above 0; not used in patch mode.
            mode: ``"shift"`` or ``"patch"``.
            source: Recorded activations to patch from; patch mode needs them.
            layers: Steer in these layers only; the neurons are still ranked over all.
            positions: ``"answer"`` (default): the answer position and every generated one. ``"prompt"``: the answer
                position alone (all that can be patched, as only there activations are recorded). ``"all"``: everywhere.

        Raises:
            SettingsError: A value is out of range, or the mode and the other arguments are at odds.
            SiteError: ``source`` lacks the scores' site.
        """
        call = "Steering.from_scores"
        for name, value, known in (
            ("mode", mode, ("shift", "patch")),
            ("positions", positions, (None, "answer", "prompt", "all")),
        ):
            if value not in known:
                raise _out_of_range(call, name, f"one of {', '.join(map(repr, known))}", value)
        if not 0 < top_fraction <= 1:
            raise _out_of_range(call, "top_fraction", "a share in (0, 1]", top_fraction)
        if not 0 < alpha < float("inf"):
            raise _out_of_range(call, "alpha", "a finite multiple above 0", alpha)
        n_layers = scores.rho.shape[0]
        if layers is not None and not all(0 <= layer < n_layers for layer in layers):
            raise _out_of_range(call, "layers", f"layers of the scores, 0 to {n_layers - 1}", list(layers))
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
        selected = selected.reshape(scores.rho.shape)
        if layers is not None:
            selected &= np.isin(np.arange(n_layers), list(layers))[:, None]
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

    @contextmanager
    def applied(
        self,
        model: LensModel,
        *,
        toward: Direction,
        pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
        prompt_length: int | None = None,
    ) -> Iterator[LensModel]:
        """Steer every forward pass inside the ``with`` block; plain hooks, gone at its end, also after an exception.

        Args:
            model: A HookedTransformer; call it, or its ``generate``, as ever.
            toward: The behaviour to push towards.
            pairs: In patch mode, the source pair of each row of the batch; default: pair p for row p.
            prompt_length: Tokens of the prompt. Needed where the whole sequence is run again at every step
                (``use_past_kv_cache=False``) or answers are fed in: positions from ``prompt_length - 1`` on are then
                steered. Default: a forward pass of more than one token is a prompt, of one token a cached step. With
                ``prompt_length=1`` every pass of one token is taken for a prompt.

        Yields:
            The model, steered.

        Raises:
            SiteError: The model lacks the site, or has another shape there than the scores.
            SettingsError: ``toward`` is not a behaviour to steer towards.
        """
        with steered(model, [self], toward=toward, pairs=pairs, prompt_length=prompt_length):
            yield model

    def with_neurons(
        self, selected: Bool[np.ndarray, "layer neuron"], shift: Float[np.ndarray, "layer neuron"]
    ) -> "Steering":
        """The same setting on other neurons, for controls."""
        return replace(self, selected=selected, shift=shift)


@contextmanager
def steered(model: LensModel, steerings: Sequence[Steering], **how: Any) -> Iterator[None]:
    """Steer every forward pass inside the ``with`` block; arguments and errors as in `steering_hooks`."""
    with model.hooks(fwd_hooks=steering_hooks(model, steerings, **how)):
        yield


def steering_hooks(
    model: LensModel,
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
    prompt_length: int | None = None,
    where: slice | None = None,
) -> list[tuple[Any, Callable[..., Any]]]:
    """Hooks for several steerings of one site and mode at once, which ride in the batch dimension.

    Args:
        model: A HookedTransformer.
        steerings: One for every row, or one for each of as many equal blocks of rows, block after block.
        toward: See `Steering.applied`.
        pairs: See `Steering.applied`; of the rows of one block.
        prompt_length: See `Steering.applied`.
        where: Positions of the forward pass to change, whatever the setting says.

    Raises:
        SiteError: The model lacks the site, or has another shape there than the scores.
        SettingsError: ``toward`` is not a behaviour to steer towards.
    """
    first, n = steerings[0], len(steerings)

    def hook_of(change: Change) -> Callable[..., Tensor]:
        def steer(activation: Tensor, hook: Any) -> Tensor:
            chosen = where or _positions(first.setting.positions, activation.shape[1], prompt_length)
            if chosen is None:
                return activation
            part = activation[:, chosen]
            n_prompts = _rows_of_a_block(part, n, first, pairs)
            row = torch.arange(len(part), device=part.device).repeat_interleave(part.shape[1])
            flat = part.flatten(2).flatten(0, 1)  # heads into the neuron axis, positions into rows
            changed_part = change(flat, row // n_prompts, row % n_prompts).to(part.dtype).view_as(part)
            if part.shape == activation.shape:
                return changed_part
            new = activation.clone()
            new[:, chosen] = changed_part
            return new

        return steer

    changes = steering_changes(model, steerings, toward=toward, pairs=pairs)
    return [(name, hook_of(change)) for name, change in changes.items()]


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
        SettingsError: ``toward`` is not a behaviour to steer towards.
    """
    if toward not in ("generalization", "memorization"):
        raise SettingsError(
            "steering",
            expected="toward='generalization' or 'memorization'",
            received=repr(toward),
            fix="Choose one.",
        )
    first = steerings[0]
    hooks = site_hooks(model, first.setting.site)
    if len(hooks) != len(first.selected):
        raise _wrong_shape(first.setting.site, f"{len(first.selected)} layers", f"{len(hooks)}")
    device = next(iter(model.parameters())).device
    sign = 1.0 if toward == "memorization" else -1.0

    def change_of(layer: int) -> Change:
        if first.source is None:
            shifts = np.stack([sign * s.shift[layer] for s in steerings])
            change = _shift(torch.as_tensor(shifts, dtype=torch.float32, device=device))
        else:
            side = first.source.generalized if toward == "generalization" else first.source.memorized
            rows = side[np.arange(len(side)) if pairs is None else _known_pairs(pairs, len(side)), layer]
            masks = np.stack([s.selected[layer] for s in steerings])
            change = _patch(torch.as_tensor(rows, device=device), torch.as_tensor(masks, device=device))

        def checked(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
            if h.shape[1] != first.selected.shape[1]:
                raise _wrong_shape(first.setting.site, f"{first.selected.shape[1]} neurons", f"{h.shape[1]}")
            return change(h, copy, prompt)

        return checked

    changed = np.flatnonzero(np.any([s.selected.any(1) for s in steerings], axis=0))
    return {hooks[layer]: change_of(layer) for layer in changed.tolist()}


def _positions(positions: Positions, length: int, prompt_length: int | None) -> slice | None:
    """Which positions of a forward pass of ``length`` tokens are steered; None = none of them."""
    if positions == "all":
        return slice(None)
    is_cached_step = length == 1 if prompt_length is None else length < prompt_length
    if is_cached_step:
        return None if positions == "prompt" else slice(None)
    answer = (prompt_length or length) - 1
    return slice(answer, answer + 1) if positions == "prompt" else slice(answer, None)


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
    return lambda h, copy, prompt: h + (shifts[0] if len(shifts) == 1 else shifts.index_select(0, copy))


def _patch(rows: Float[Tensor, "prompt neuron"], masks: Bool[Tensor, "copy neuron"]) -> Change:
    return lambda h, copy, prompt: torch.where(masks[copy], rows[prompt].to(h.dtype), h)


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


def _out_of_range(call: str, name: str, expected: str, received: Any) -> SettingsError:
    return SettingsError(call, expected=f"{name}: {expected}", received=repr(received), fix=f"Change {name}.")


def _wrong_shape(site: str, expected: str, received: str) -> SiteError:
    return SiteError(
        f"steering site {site!r}",
        expected=f"a model with {expected} there, as in the scores",
        received=received,
        fix="Score this very model: attribute(record(model, ...), site).",
    )

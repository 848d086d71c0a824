"""What is done to which neurons of one site, and how it is put on a model: as hooks, or inside a ``with`` block.

Does not know how neurons and values were chosen (see `steering`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.analysis.steering.changes import (
    known_pairs,
    patch_change,
    rule_change,
    scale_change,
    set_change,
    shift_change,
)
from memgen_lens.analysis.steering.hooks import change_hooks
from memgen_lens.analysis.steering.rules import DIRECTIONS, Rules
from memgen_lens.analysis.steering.values import wrong_shape
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.records import NeuronScores, SiteActivations
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Direction, LensModel
from memgen_lens.fast.decoding import Change
from memgen_lens.models.fingerprint import Fingerprint
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import At, given_answers, positions_from, watched_passes
from memgen_lens.models.sites import site_hooks

HOW = {"pairs": kinds.Indices | None, "prompt_length": kinds.Counts | None, "toward": kinds.DirectionName}


@dataclass(frozen=True)
class Intervention:
    """Which neurons of one site are changed, and to what.

    Attributes:
        setting: What was asked for.
        scores: The scores the neurons were chosen by; None of a direction.
        selected: The neurons that are changed.
        shift: Of a shift or a direction, what is added towards memorization (towards generalization it is taken away);
            0 elsewhere, and everywhere in other modes.
        source: The site's activations that values are taken from, of a patch or where they are resampled.
        rules: What is added given the activation, where that was fitted.
        values: Towards generalization and towards memorization, what neurons are multiplied by (a scale) or set to (a
            clamp, an ablation); of all neurons, selected or not, as controls need the others'.
        draw: Where values are resampled, by pair the prompt whose values it takes: its place among the pairs' recalling
            prompts, or behind these among the computing ones.
        fingerprint: The model that it is for, where that was told (`Steering.fitted_to`).
    """

    setting: SteeringSetting
    scores: NeuronScores | None
    selected: Bool[np.ndarray, "layer neuron"]
    shift: Float[np.ndarray, "layer neuron"]
    source: SiteActivations | None = None
    rules: Rules | None = None
    values: Float[np.ndarray, "toward layer neuron"] | None = None
    draw: Int[np.ndarray, " pair"] | None = None
    fingerprint: Fingerprint | None = None

    @arguments("Steering.applied", model=lens_model("Steering.applied"), **HOW)
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

        Several nest, of the same site and neurons or of others. Hook points fire in the order of the forward pass, so
        that a steering of layer 1 sees what one of layer 0 has made of it; at one hook point the outer ``with`` is
        applied first, and the inner one to what it gives: a shift inside a clamp moves neurons from where the clamp
        has put them, a clamp inside a shift leaves nothing of it.

        Args:
            model: A lens model; call it, or its ``generate``, as ever.
            toward: The behaviour to push towards.
            pairs: Of a patch, and where values are resampled, the source pair of each row of the batch. Default: pair p
                for row p; where values are resampled, rows beyond the pairs begin with the first again.
            prompt_length: Positions of the prompt, padding before it counted; of all rows or of each. Needed where
                answers are fed in behind the prompts. Default: a prompt ends where the attention mask does, or before
                the pad tokens that a row ends in.

        Yields:
            The model, steered.

        Raises:
            SiteError: The model lacks the site, or has another shape there than the scores.
            SettingsError: ``toward`` is not a behaviour to steer towards.
            ModelError: The model is compiled or no lens model, or is not the one that a loaded steering was saved for;
                or (when it is run) where a prompt ends cannot be known.
        """
        with watched_passes(model, prompt_length=prompt_length) as passes:
            at = partial(passes.where, self.setting.positions)
            with model.hooks(fwd_hooks=steering_hooks(model, [self], toward=toward, pairs=pairs, at=at)):
                yield model

    @arguments("Steering.hooks", model=lens_model("Steering.hooks"), **HOW)
    def hooks(
        self,
        model: LensModel,
        *,
        toward: Direction,
        pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
        prompt_length: int | Sequence[int] | None = None,
    ) -> list[tuple[str, Callable[..., Any]]]:
        """The hooks themselves, for ``model.run_with_hooks(..., fwd_hooks=...)`` or ``model.hooks(fwd_hooks=...)``.

        In one forward pass of prompts they do what `applied` does, where no prompt is padded at its end. They see
        nothing but the activation, though, where `applied` watches what enters the model: that a row ends in padding,
        or that a pass is a step of a generation. So without ``prompt_length`` the last position of whatever is run is
        taken for the answer position: right in a generation with a cache for ``positions`` ``"answer"`` and
        ``"all"``; ``"prompt"`` would steer each step, and ``"generated"`` none.

        Args:
            model: The model that they are for, of which the names of its hook points are taken.
            toward: The behaviour to push towards.
            pairs: See `applied`.
            prompt_length: Positions of the prompt, padding before it counted, of all rows or of each; positions are
                then counted from the first of the pass, so that whole sequences have to be run.

        Returns:
            Full names of hook points, and a function for each.

        Raises:
            SiteError: The model lacks the site, or has another shape there than the scores.
            ModelError: The model is compiled or no lens model, or is not the one that a loaded steering was saved for.
        """

        def hook_of(name: str, change: Change) -> Callable[..., Any]:
            def steer(activation: Tensor, hook: Any) -> Tensor:
                batch, length = activation.shape[:2]
                answer = given_answers(length if prompt_length is None else prompt_length, batch)
                here = positions_from(answer, self.setting.positions, first=0, length=length)
                how: Any = {"at": lambda: here, "n_copies": 1, "n_sources": _n_sources([self], pairs)}
                return change_hooks({name: change}, **how)[0][1](activation, hook)

            return steer

        changes = steering_changes(model, [self], toward=toward, pairs=pairs)
        return [(name, hook_of(name, change)) for name, change in changes.items()]


def drawn_pairs(steering: Intervention, places: Any) -> Int[np.ndarray, " prompt"] | None:
    """What ``pairs`` are for prompts that belong to none, by their places in a list; None where none are needed.

    So a prompt takes the same resampled values whichever batch it rides in.
    """
    return None if steering.draw is None else np.asarray(places, dtype=np.int64) % len(steering.draw)


def steering_hooks(
    model: LensModel,
    steerings: Sequence[Intervention],
    *,
    toward: Direction,
    at: Callable[[], At | None],
    pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
) -> list[tuple[Any, Callable[..., Any]]]:
    """Hooks for several steerings of one site and mode at once, which ride in the batch dimension.

    Args:
        model: A lens model.
        steerings: One for every row, or one for each of as many equal blocks of rows, block after block.
        toward: See `Intervention.applied`.
        at: Asked in each hook for the positions of the running forward pass that are changed; None for none.
        pairs: See `Intervention.applied`; of the rows of one block.

    Raises:
        SiteError: The model lacks the site, or has another shape there than the scores; or (when it is run) the site
            has no row for each position.
        ModelError: It is not the model that a loaded steering was saved for.
    """
    changes = steering_changes(model, steerings, toward=toward, pairs=pairs)
    return change_hooks(changes, at=at, n_copies=len(steerings), n_sources=_n_sources(steerings, pairs))


def steering_changes(
    model: LensModel,
    steerings: Sequence[Intervention],
    *,
    toward: Direction,
    pairs: Sequence[int] | Int[np.ndarray, " row"] | None = None,
) -> dict[str, Change]:
    """What several steerings of one site and mode do to rows of each hook point that any of them changes.

    Args:
        model: See `steering_hooks`.
        steerings: Which of them a row is steered by, its ``copy`` tells.
        toward: See `Intervention.applied`.
        pairs: Where values are taken from a source, the source pair of each prompt.

    Raises:
        SiteError: The model lacks the site, or has another shape there than the scores.
        ModelError: It is not the model that a loaded steering was saved for.
    """
    for fingerprint in {s.fingerprint for s in steerings if s.fingerprint is not None}:
        fix = "Steer that model, or drop the check: dataclasses.replace(steer, fingerprint=None)."
        fingerprint.require(model, call="Steering.applied", fix=fix)
    first = steerings[0]
    hooks, (n_layers, n_neurons) = site_hooks(model, first.setting.site), first.selected.shape
    # A direction names its layers; of the model's others it knows nothing.
    if len(hooks) < n_layers or (first.scores is not None and len(hooks) > n_layers):
        raise wrong_shape(first.setting.site, f"{n_layers} layers", f"{len(hooks)}")

    def checked(change: Change) -> Change:
        def changed(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
            if h.shape[1] != n_neurons:
                raise wrong_shape(first.setting.site, f"{n_neurons} neurons", f"{h.shape[1]}")
            return change(h, copy, prompt)

        return changed

    layers = np.flatnonzero(np.any([s.selected.any(1) for s in steerings], axis=0))
    return {hooks[layer]: checked(_change(steerings, layer, toward, pairs)) for layer in layers.tolist()}


def _change(steerings: Sequence[Intervention], layer: int, toward: Direction, pairs: Any) -> Change:
    """What the steerings do to rows of one layer."""
    first, masks = steerings[0], np.stack([s.selected[layer] for s in steerings])
    if first.rules is not None:
        rules = [s.rules for s in steerings if s.rules is not None]
        return rule_change(
            [rule.towards[toward][layer] for rule in rules],
            np.stack([rule.gain[layer] for rule in rules]),
            np.stack([rule.taken_from[layer] for rule in rules]),
        )
    if first.source is not None:
        return patch_change(torch.as_tensor(_rows(first, toward, layer, pairs)), torch.as_tensor(masks))
    if first.values is None:
        sign = 1.0 if toward == "memorization" else -1.0
        shifts = np.stack([sign * s.shift[layer] for s in steerings])
        return shift_change(torch.as_tensor(shifts, dtype=torch.float32))
    values = np.stack([s.values[DIRECTIONS.index(toward), layer] for s in steerings if s.values is not None])
    if first.setting.mode == "scale":
        return scale_change(torch.as_tensor(np.where(masks, values, 1.0), dtype=torch.float32))
    return set_change(torch.as_tensor(values, dtype=torch.float32), torch.as_tensor(masks))


def _rows(steering: Intervention, toward: Direction, layer: int, pairs: Any) -> Float[np.ndarray, "row neuron"]:
    """The values of one layer that prompts take from the source."""
    assert steering.source is not None
    sides = steering.source.memorized, steering.source.generalized
    index = np.arange(len(sides[0])) if pairs is None else known_pairs(pairs, len(sides[0]))
    if steering.draw is None:
        return sides[0 if toward == "memorization" else 1][index, layer]
    side, place = np.divmod(steering.draw[index], len(sides[0]))
    return np.where(side[:, None] == 0, sides[0][place, layer], sides[1][place, layer])


def _n_sources(steerings: Sequence[Intervention], pairs: Any) -> int | None:
    """How many prompts a batch must hold; None for any number."""
    first = steerings[0]
    if first.source is None or (pairs is None and first.draw is not None):
        return None
    return len(first.source.memorized if pairs is None else pairs)

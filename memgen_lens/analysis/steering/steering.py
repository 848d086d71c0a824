"""Steer a model at inference time through hooks: shift neurons, patch them, or add what a fitted rule says.

Does not choose its settings (see `sweep`) nor judge what it does (see `evaluation`).
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

from memgen_lens.analysis.steering.changes import known_pairs, patch_change, rule_change, shift_change
from memgen_lens.analysis.steering.hooks import change_hooks
from memgen_lens.analysis.steering.rules import DEFAULT_SIZE, Rules, SiteFits, best_predicted
from memgen_lens.analysis.steering.selection import strongest
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError, SiteError
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Direction, FittedKind, LensModel, Mode, Positions
from memgen_lens.fast.decoding import Change
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import At, watched_passes
from memgen_lens.models.sites import site_hooks


@dataclass(frozen=True)
class Steering:
    """Which neurons of one site are changed, and to what.

    ``"shift"`` (arXiv 2412.18497 v2, sec. 5): ``h_i <- h_i + s * alpha * sign(rho_i) * abs(nmd_i)`` with
    ``s = +1`` towards memorization and ``-1`` towards generalization. ``"patch"``: the neurons take the values they
    have at the answer position of the paired prompt (activation patching restricted to neurons). Two more depend on the
    activation that a row has (`from_activations`).

    Attributes:
        setting: What was asked for.
        scores: The scores the neurons were chosen by.
        selected: The neurons that are changed.
        shift: In shift mode, what is added towards memorization; 0 elsewhere, and everywhere in other modes.
        source: In patch mode, the site's activations to patch from.
        rules: What is added given the activation, where that was fitted.
    """

    setting: SteeringSetting
    scores: NeuronScores
    selected: Bool[np.ndarray, "layer neuron"]
    shift: Float[np.ndarray, "layer neuron"]
    source: SiteActivations | None = None
    rules: Rules | None = None

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
        mode: Mode = "shift",
        source: Activations | None = None,
        layers: int | Sequence[int] | None = None,
        positions: Positions | None = None,
    ) -> "Steering":
        """Steer the neurons with the largest abs(score): of abs(rho), unless `attribute` was given another method.

        Of a causal method's scores the largest above 0: there the neuron's value on the recalled prompt makes for the
        memorized answer, so that a shift towards it does too. Where fewer are above 0, fewer are steered.

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
        selected = strongest(scores, top_fraction, layers, call=call)
        if mode == "patch" and (source is None or positions not in (None, "prompt")):
            raise SettingsError(
                call,
                expected="source=record(...) and positions='prompt' with mode='patch'",
                received=f"source={'None' if source is None else '...'}, positions={positions!r}",
                fix="Activations are recorded at the answer position alone, so only there can they be patched.",
            )
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

    @classmethod
    @arguments(
        "Steering.from_activations",
        scores=kinds.one(NeuronScores),
        acts=kinds.one(Activations),
        top_fraction=kinds.Share,
        alpha=kinds.Positive,
        kind=kinds.KindName,
        n_clusters=kinds.Count,
        rank=kinds.Count,
        layers=kinds.Layers | None,
        positions=kinds.PositionsName | None,
        seed=kinds.Seed,
    )
    def from_activations(
        cls,
        scores: NeuronScores,
        acts: Activations,
        top_fraction: float = 0.1,
        alpha: float = 1.0,
        *,
        kind: FittedKind = "clusters",
        n_clusters: int = DEFAULT_SIZE["clusters"],
        rank: int = DEFAULT_SIZE["low_rank"],
        layers: int | Sequence[int] | None = None,
        positions: Positions | None = None,
        seed: int = 0,
    ) -> "Steering":
        """Add to the neurons with the largest abs(rho) what a rule says that looks at the activation of each row.

        ``h_i <- h_i + alpha * delta_i(h)``: the rule ``delta`` of a layer and direction sees all neurons of the site in
        that layer. It is fitted on the ``select`` pairs, to lead from one prompt's activation at the answer position to
        its partner's: towards generalization from the memorized side, as what is steered then recalls, towards
        memorization from the other. ``"clusters"``: the mean change of the k-means cluster whose centroid is nearest
        (with one cluster, `from_scores` at this alpha wherever rho and nmd have one sign, as the mean change is nmd).
        ``"low_rank"``: a reduced-rank ridge regression, its ridge chosen by cross-validation grouped by item. Neither
        is in arXiv 2412.18497, where every prompt is shifted alike.

        A rule knows activations of the unsteered model at the answer position. At generated positions
        (``positions="answer"``) and everywhere (``"all"``) it is asked about others. Where several layers are steered,
        the second sees rows that the first has moved, and moves them on: beyond the other side, for all it knows.
        So by default one layer is steered: the one where rules close the most of the distance between partners on
        selected neurons, on items of ``select`` that they were not fitted on. That says how well a change is
        predicted, not what it does to the answer; `memgen_lens.sweep_steering` tries layers on ``tune``.

        Args:
            scores: Scores of one site.
            acts: Recorded activations of that site; only the ``select`` pairs are read.
            top_fraction: Share of the site's neurons, over all its layers, in (0, 1].
            alpha: Multiple of the change that the rule says, above 0.
            kind: ``"clusters"`` or ``"low_rank"``.
            n_clusters: Clusters, at most as many as ``select`` has items.
            rank: Largest rank of the map, at most as large as items in ``select`` and neurons are many.
            layers: Steer in this layer or these; the neurons are still ranked over all. Default: the best predicted.
            positions: See `from_scores`; ``"prompt"`` is where the rule was fitted.
            seed: Seed of k-means.

        Raises:
            SettingsError: A value is out of range.
            SiteError: ``acts`` lack the scores' site, or have another shape there.
            PairsError: ``select`` holds fewer than 8 pairs, or one item only.
            ModelError: An activation is not finite.
        """
        call, size = "Steering.from_activations", n_clusters if kind == "clusters" else rank
        fits = SiteFits(acts, scores.site, kind=kind, size=size, seed=seed, call=call)
        return by_rules(fits, scores, top_fraction, alpha, layers=layers, positions=positions, call=call)

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


def by_rules(
    fits: SiteFits,
    scores: NeuronScores,
    top_fraction: float,
    alpha: float,
    *,
    layers: int | Sequence[int] | None,
    positions: Positions | None,
    call: str,
) -> Steering:
    """What `Steering.from_activations` gives, of rules that many settings share."""
    if fits.shape != scores.rho.shape:
        raise _wrong_shape(scores.site, "x".join(map(str, scores.rho.shape)), "x".join(map(str, fits.shape)))
    selected = strongest(scores, top_fraction, layers, call=call)
    if layers is None:
        selected &= (np.arange(len(selected)) == best_predicted(fits, selected))[:, None]
    return Steering(
        setting=SteeringSetting(scores.site, top_fraction, alpha, positions or "answer", fits.kind, fits.size),
        scores=scores,
        selected=selected,
        shift=np.zeros_like(scores.rho),
        rules=Rules.of(fits, selected, alpha),
    )


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
    source = steerings[0].source
    n_sources = None if source is None else len(source.memorized if pairs is None else pairs)
    changes = steering_changes(model, steerings, toward=toward, pairs=pairs)
    return change_hooks(changes, at=at, n_copies=len(steerings), n_sources=n_sources)


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
        if first.rules is not None:
            rules = [s.rules for s in steerings if s.rules is not None]
            change = rule_change(
                [rule.towards[toward][layer] for rule in rules],
                np.stack([rule.gain[layer] for rule in rules]),
                np.stack([rule.taken_from[layer] for rule in rules]),
            )
        elif first.source is None:
            shifts = np.stack([sign * s.shift[layer] for s in steerings])
            change = shift_change(torch.as_tensor(shifts, dtype=torch.float32))
        else:
            side = first.source.generalized if toward == "generalization" else first.source.memorized
            rows = side[np.arange(len(side)) if pairs is None else known_pairs(pairs, len(side)), layer]
            masks = np.stack([s.selected[layer] for s in steerings])
            change = patch_change(torch.as_tensor(rows), torch.as_tensor(masks))

        def checked(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
            if h.shape[1] != first.selected.shape[1]:
                raise _wrong_shape(first.setting.site, f"{first.selected.shape[1]} neurons", f"{h.shape[1]}")
            return change(h, copy, prompt)

        return checked

    changed = np.flatnonzero(np.any([s.selected.any(1) for s in steerings], axis=0))
    return {hooks[layer]: change_of(layer) for layer in changed.tolist()}


def _wrong_shape(site: str, expected: str, received: str) -> SiteError:
    return SiteError(
        f"steering site {site!r}",
        expected=f"a model with {expected} there, as in the scores",
        received=received,
        fix="Score this very model: attribute(record(model, ...), site).",
    )

"""Make a steering: of scores, of what a rule fitted on activations says, of directions; keep one, and read it again.

Does not choose its settings (see `sweep`) nor judge what it does (see `evaluation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from memgen_lens.analysis.steering.by_direction import ByDirection
from memgen_lens.analysis.steering.intervention import steering_changes
from memgen_lens.analysis.steering.intervention import steering_hooks as steering_hooks
from memgen_lens.analysis.steering.rules import DEFAULT_SIZE, Rules, SiteFits, best_predicted
from memgen_lens.analysis.steering.saving import load_steering, save_steering
from memgen_lens.analysis.steering.selection import DEFAULT_FRACTION, Choice, strongest
from memgen_lens.analysis.steering.values import values_for, wrong_shape
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Ablation, FittedKind, LensModel, Positions, ScoredMode
from memgen_lens.models.fingerprint import Fingerprint
from memgen_lens.models.guard import lens_model


@dataclass(frozen=True)
class Steering(ByDirection):
    """Which neurons of one site are changed, and to what, by the mode of its ``setting``.

    ``s`` is +1 towards memorization and -1 towards generalization; ``h`` is the activation of a selected neuron.

    ========== ========================================================================================================
    shift      ``h + s * alpha * sign(rho) * abs(nmd)`` (arXiv 2412.18497 v2, sec. 5)
    scale      ``(1 + alpha) h`` towards the behaviour that the neuron speaks for, ``max(0, 1 - alpha) h`` towards the
               other; at alpha 1 that doubles neurons or silences them, as Dai et al. do (arXiv 2104.08696).
               A neuron speaks for the side on which its mean over ``select`` is farther from 0; without ``source`` for
               that of its rho's sign, which is the same where no activation is below 0
    clamp      the neuron's mean over ``select`` on the side of the behaviour steered towards
    ablate     the same in both directions: 0 (``how="zero"``); its mean over both sides of ``select`` (``"mean"``); or
               its value on a prompt of another item of ``select``, of either side, drawn once for each pair, all
               neurons from one prompt (``"resample"``)
    patch      its value at the answer position of the paired prompt (activation patching restricted to neurons)
    direction  ``h + s * alpha * v`` with one vector ``v`` a layer (`from_direction`, `from_mean_difference`,
               `from_sae`)
    clusters,  what a rule says that looks at the activations of the layer (`from_activations`)
    low_rank
    ========== ========================================================================================================

    Values come from the answer position. Where neurons are set to values at generated positions too, these are what
    they were there.
    """

    @classmethod
    @arguments(
        "Steering.from_scores",
        scores=kinds.one(NeuronScores),
        top_fraction=kinds.Share | None,
        alpha=kinds.Positive,
        mode=kinds.ModeName,
        source=kinds.one(Activations) | None,
        how=kinds.AblationName | None,
        top_k=kinds.Count | None,
        max_q=kinds.Share | None,
        neurons=kinds.Neurons | None,
        per_layer=kinds.Flag,
        layers=kinds.Layers | None,
        positions=kinds.PositionsName | None,
        seed=kinds.Seed,
    )
    def from_scores(
        cls,
        scores: NeuronScores,
        top_fraction: float | None = None,
        alpha: float = 2.0,
        *,
        mode: ScoredMode = "shift",
        source: Activations | None = None,
        how: Ablation | None = None,
        top_k: int | None = None,
        max_q: float | None = None,
        neurons: Sequence[tuple[int, int]]
        | Int[np.ndarray, "neuron 2"]
        | Bool[np.ndarray, "layer neuron"]
        | None = None,
        per_layer: bool = False,
        layers: int | Sequence[int] | None = None,
        positions: Positions | None = None,
        seed: int = 0,
    ) -> "Steering":
        """Steer neurons that scores choose; by default the tenth with the largest abs(score), which is abs(rho).

        Of a causal method's scores (see `memgen_lens.attribute`) the largest above 0: there the neuron's value on the
        recalled prompt makes for the memorized answer, so that a shift towards it does too. Where fewer are above 0,
        fewer are steered.

        Args:
            scores: Scores of one site.
            top_fraction: Share of the site's neurons with the largest abs(score), in (0, 1]; 0.1 where neurons are not
                chosen in another way.
            alpha: Strength, above 0; not used where neurons are set to values (clamp, ablate, patch).
            mode: See `Steering`.
            source: Recorded activations; a clamp, a patch, and an ablation but by 0 need them, a scale may use them.
            how: Of an ablation, ``"zero"`` (default), ``"mean"`` or ``"resample"``.
            top_k: In place of ``top_fraction``: so many neurons.
            max_q: Or all neurons whose q is at most this, in (0, 1].
            neurons: Or these: a list of (layer, neuron), or a boolean mask.
            per_layer: Take the fraction or number of each layer, not of all layers together.
            layers: Steer in this layer or these only; the neurons are still ranked as without it.
            positions: ``"answer"`` (default): the answer position and every generated one. ``"prompt"``: the answer
                position alone (all that can be patched, as only there activations of the pair are recorded).
                ``"generated"``: the generated ones alone. ``"all"``: everywhere.
            seed: Draws what is resampled.

        Raises:
            SettingsError: A value is out of range, neurons are chosen in two ways, or the mode and the other arguments
                are at odds.
            SiteError: ``source`` lacks the scores' site, or has another shape there.
            PairsError: ``select`` holds fewer than 8 pairs of ``source``, or one item only where values are resampled.
            ModelError: An activation is not finite.
        """
        call = "Steering.from_scores"
        choice = Choice(top_fraction, top_k, max_q, _as_array(neurons), per_layer, layers)
        selected = choice.mask(scores, call=call)
        if mode == "patch" and (source is None or positions not in (None, "prompt")):
            raise SettingsError(
                call,
                expected="source=record(...) and positions='prompt' with mode='patch'",
                received=f"source={'None' if source is None else '...'}, positions={positions!r}",
                fix="Activations are recorded at the answer position alone, so only there can they be patched.",
            )
        if how is not None and mode != "ablate":
            raise SettingsError(
                f"{call}(how=...)", expected="mode='ablate' with it", received=f"mode={mode!r}", fix="Leave out how."
            )
        how = how or ("zero" if mode == "ablate" else None)
        values = values_for(scores, alpha, mode, source, how, seed, call=call)
        shift = alpha * np.sign(scores.rho) * np.abs(scores.nmd) * selected
        setting = SteeringSetting(
            site=scores.site,
            top_fraction=(top_fraction or DEFAULT_FRACTION) if choice.words is None else float(selected.mean()),
            alpha=alpha if mode in ("shift", "scale") else None,
            positions="prompt" if mode == "patch" else positions or "answer",
            mode=mode,
            how=how,
            chosen=choice.words,
            method=scores.method,
        )
        return cls(setting, scores, selected, shift if mode == "shift" else np.zeros_like(shift), **vars(values))

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

    @arguments("Steering.fitted_to", model=lens_model("Steering.fitted_to"))
    def fitted_to(self, model: LensModel) -> "Steering":
        """The steering of this model and no other: steering another one is an error that says what differs.

        See `memgen_lens.models.fingerprint.Fingerprint.of` for what is told apart.

        Raises:
            SiteError: The model lacks the site, or has another number of layers there.
        """
        fitted = replace(self, fingerprint=None)
        steering_changes(model, [fitted], toward="memorization")
        return replace(fitted, fingerprint=Fingerprint.of(model))

    @arguments("Steering.save", directory=kinds.place("Steering.save"), model=lens_model("Steering.save") | None)
    def save(self, directory: str | Path, *, model: LensModel | None = None) -> Path:
        """Write ``steering.json`` and ``steering.safetensors`` into a directory and return its path.

        Args:
            directory: A folder, made where there is none.
            model: The model that it is for, whose fingerprint is saved (`fitted_to`); without one, that of
                ``fitted_to`` before, or none: then only the site's shape tells models apart.

        Raises:
            RunDirectoryError: It cannot be written, or somebody else's file is there.
            SiteError: See `fitted_to`.
        """
        return save_steering(self if model is None else self.fitted_to(model), Path(directory))

    @classmethod
    @arguments("Steering.load", directory=kinds.place("Steering.load"))
    def load(cls, directory: str | Path) -> "Steering":
        """Read what `save` wrote.

        Raises:
            RunDirectoryError: A file is missing or damaged, or of a later version.
        """
        return cls(**load_steering(Path(directory)))


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
        raise wrong_shape(scores.site, "x".join(map(str, scores.rho.shape)), "x".join(map(str, fits.shape)))
    selected = strongest(scores, top_fraction, layers, call=call)
    if layers is None:
        selected &= (np.arange(len(selected)) == best_predicted(fits, selected))[:, None]
    return Steering(
        setting=SteeringSetting(
            scores.site, top_fraction, alpha, positions or "answer", fits.kind, fits.size, method=scores.method
        ),
        scores=scores,
        selected=selected,
        shift=np.zeros_like(scores.rho),
        rules=Rules.of(fits, selected, alpha),
    )


def _as_array(neurons: Any) -> Any:
    return None if neurons is None else np.asarray(neurons)

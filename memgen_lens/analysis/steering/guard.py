"""Steer only those prompts on which a probe below expects the behaviour that is not wanted.

Does not judge what comes of it (see `guarded`), nor fit what is steered.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memgen_lens.analysis.recording.reading import at_answer_position
from memgen_lens.analysis.steering.decisions import Decisions, probe_is_late
from memgen_lens.analysis.steering.steering import Steering, steering_hooks
from memgen_lens.analysis.steering.threshold import choose_threshold
from memgen_lens.behavior import observe_items
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError, SiteError
from memgen_lens.core.guard_records import ChosenThreshold
from memgen_lens.core.layer_probe import LayerProbe
from memgen_lens.core.linear_probe import MAX_ITER, fit_probe
from memgen_lens.core.records import Activations, ProbeReport
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import watched_passes
from memgen_lens.models.sites import hook_of, place_of, site_hooks


@dataclass(frozen=True, init=False)
class Guard:
    """A steering that acts on those prompts alone whose behaviour a probe predicts to be the one steered away from.

    Towards generalization a prompt is steered where the predicted probability of memorization is at least the
    threshold; towards memorization, where that of generalization is. The probe reads the answer position, below what is
    steered or at the same hook point before it is changed, so that one forward pass both decides and steers. What is
    decided in a prompt's pass holds for all that is generated behind it. Rows that are left alone stay as they are, bit
    by bit. Neither is in arXiv 2412.18497, which predicts and steers apart.

    Attributes:
        probe: The probe, also given as a `fit_probes` report: then its best layer's.
        steering: What is done to the prompts that it picks.
        threshold: Predicted probability from which on a prompt is steered, in [0, 1].
        chosen: How the threshold was chosen, where `fit` has chosen it.

    Raises (when it is made):
        SiteError: The probe reads above what is steered, or before the first block.
        SettingsError: An argument is none of that.
    """

    probe: LayerProbe
    steering: Steering
    threshold: float
    chosen: ChosenThreshold | None = None

    @arguments(
        "Guard",
        probe=kinds.one(LayerProbe) | kinds.one(ProbeReport),
        steering=kinds.one(Steering),
        threshold=kinds.Probability,
        chosen=kinds.one(ChosenThreshold) | None,
    )
    def __init__(
        self,
        probe: LayerProbe | ProbeReport,
        steering: Steering,
        threshold: float,
        chosen: ChosenThreshold | None = None,
    ) -> None:
        read = probe.at() if isinstance(probe, ProbeReport) else probe
        given = {"probe": read, "steering": steering, "threshold": float(threshold), "chosen": chosen}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        reads, steers = hook_of(self.probe.site, self.probe.layer), _first_steered(self.steering)
        place, first = place_of(reads), place_of(steers)
        if place is not None and place[0] < 0:
            raise SiteError(
                "Guard",
                expected="a probe inside the blocks",
                received=f"one that reads {reads}, before them",
                fix="Take a probe of resid_pre, layer 0, in its place.",
            )
        if place is not None and first is not None and place > first:
            raise probe_is_late(reads, steers)

    @classmethod
    @arguments(
        "Guard.fit",
        model=lens_model("Guard.fit"),
        task=kinds.TaskLike | None,
        acts=kinds.one(Activations),
        steering=kinds.one(Steering),
        site=kinds.Text | None,
        layer=kinds.Number0 | None,
        false_trigger_rate=kinds.Part,
        toward=kinds.DirectionName,
        batch_size=kinds.Count,
    )
    def fit(
        cls,
        model: LensModel,
        task: Any | None,
        acts: Activations,
        steering: Steering,
        *,
        site: str | None = None,
        layer: int | None = None,
        false_trigger_rate: float = 0.01,
        toward: Direction = "generalization",
        batch_size: int = 2048,
    ) -> "Guard":
        """A guard with a probe fitted on ``select`` and a threshold chosen on ``tune``; ``test`` is not looked at.

        Of the recorded sites' layers that lie below what is steered, or at it, the one is taken whose probe has the
        smallest cross-validated log-loss on ``select``, folds grouped by item. The threshold is the lowest, in log-odds
        the middle of those that pick the same prompts, at which no more than ``false_trigger_rate`` of the prompts that
        are not to be steered are: of those of ``tune``, and of the task's ``validation`` prompts that the model answers
        by the rule, each by itself. (A model that was taught to recall recalls on some prompts that it never saw; to
        steer these is no false trigger.)

        Args:
            model: The model that the activations were recorded on.
            task: The task, for its ``validation`` prompts; None for a user's own pairs.
            acts: Recorded activations of at least one site that can be read in time.
            steering: What the guard is for.
            site: Read this site alone.
            layer: Read this layer alone.
            false_trigger_rate: Share of such prompts that may be steered, in [0, 1).
            toward: The direction that the guard is for.
            batch_size: Prompts in one forward pass.

        Raises:
            SiteError: ``site`` was not recorded, or no recorded layer lies below what is steered or at it.
            PairsError: ``select`` or ``tune`` holds fewer than 8 pairs.
        """
        probe = _best_probe(acts, steering, site, layer)
        tune, recorded = acts.pairs.of("tune"), acts.site(probe.site)
        sign = 1.0 if toward == "generalization" else -1.0
        of = {
            "generalization": sign * probe.log_odds(recorded.memorized[tune, probe.layer]),
            "memorization": sign * probe.log_odds(recorded.generalized[tune, probe.layer]),
        }
        wanted = of.pop(toward)
        unwanted = {"tune": next(iter(of.values()))}
        if task is not None and toward == "generalization":
            seen = observe_items(model, task, task.items("validation"), batch_size=batch_size, progress=False)
            prompts = [one.item.prompt for one in seen if one.behavior is Behavior.GENERALIZATION]
            if prompts:
                name = hook_of(probe.site, probe.layer)
                rows = at_answer_position(model, prompts, [name], batch_size=batch_size)[name][:, 0]
                unwanted["validation"] = probe.log_odds(rows)
        items = acts.pairs.item[tune]
        chosen = choose_threshold(wanted, unwanted, items, false_trigger_rate=false_trigger_rate)
        return cls(probe, steering, chosen.threshold, chosen)

    @arguments(
        "Guard.applied",
        model=lens_model("Guard.applied"),
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
        """Steer those rows of every forward pass inside the ``with`` block that the probe picks.

        Plain hooks, gone at the block's end, also after an exception. A prompt's row is decided on in the pass that
        runs its answer position; the passes that go on from it keep to that.

        Args:
            model: A lens model; call it, or its ``generate``, as ever.
            toward: See `Steering.applied`.
            pairs: See `Steering.applied`.
            prompt_length: See `Steering.applied`.

        Yields:
            The model, guarded.

        Raises:
            SiteError: The model lacks a site, or has another shape there; or the probe reads above what is steered.
            SettingsError: ``toward`` is not a behaviour to steer towards.
            ModelError: The model is compiled or no lens model; or (when it is run) where a prompt ends cannot be known,
                or a pass goes on from prompts that were not run inside the block.
        """
        probe, positions = self.probe, self.steering.setting.positions
        hooks = site_hooks(model, probe.site)
        if probe.layer >= len(hooks):
            raise SiteError(
                f"guard at {probe.site!r}",
                expected=f"a model with a layer {probe.layer} there, as the probe's",
                received=f"{len(hooks)} layers",
                fix="Fit the probe on this very model.",
            )
        name = hooks[probe.layer]
        with watched_passes(model, prompt_length=prompt_length) as passes:
            decisions = Decisions(
                name, len(probe.weight), lambda rows: picks(self, probe.log_odds(rows), toward), passes
            )
            at = partial(passes.where, positions)
            steering = steering_hooks(model, [self.steering], toward=toward, pairs=pairs, at=at)
            guarded = [(hook, decisions.guarded(hook, steer)) for hook, steer in steering]
            with model.hooks(fwd_hooks=[(name, decisions.read), *guarded]):
                yield model


def picks(guard: Guard, log_odds: Float[np.ndarray, " row"], toward: Direction) -> Bool[np.ndarray, " row"]:
    """Whether a guard steers prompts, given their log-odds of memorization."""
    with np.errstate(divide="ignore"):
        return (log_odds if toward == "generalization" else -log_odds) >= logit(guard.threshold)


def _first_steered(steering: Steering) -> str:
    """The hook point of the first layer in which something is changed."""
    layers = np.flatnonzero(steering.selected.any(1))
    return hook_of(steering.setting.site, int(layers[0]) if len(layers) else len(steering.selected) - 1)


def _best_probe(acts: Activations, steering: Steering, site: str | None, layer: int | None) -> LayerProbe:
    """The probe on ``select`` of the layer that tells best among those that can be read in time."""
    names = list(acts.sites) if site is None else [site]
    first = place_of(_first_steered(steering))
    found: list[tuple[float, str, int]] = []
    select = acts.pairs.of("select")
    labels, items = np.repeat([True, False], len(select)), np.tile(acts.pairs.item[select], 2)
    rows_of = {name: acts.site(name).take(select) for name in names}
    for name, recorded in rows_of.items():
        for number in range(recorded.memorized.shape[1]):
            place = place_of(hook_of(name, number))
            in_time = place is None or first is None or (0, 0) <= place <= first
            if in_time and layer in (None, number):
                rows = np.concatenate([recorded.memorized[:, number], recorded.generalized[:, number]])
                found.append((_log_loss(rows, labels, items), name, number))
    if not found:
        raise SiteError(
            "Guard.fit",
            expected="a recorded layer below what is steered, or at it",
            received=f"{', '.join(names)}{'' if layer is None else f', layer {layer}'}, where "
            f"{_first_steered(steering)} is steered",
            fix="Record lower sites too, record(model, pairs, sites=[..., 'resid_mid']), or steer higher layers alone: "
            "from_scores(..., layers=[...]).",
        )
    _, name, number = min(found, key=lambda entry: entry[0])
    recorded = rows_of[name]
    rows = np.concatenate([recorded.memorized[:, number], recorded.generalized[:, number]])
    return LayerProbe.of(fit_probe(rows, labels), name, number)


def _log_loss(
    rows: Float[np.ndarray, "row neuron"], labels: Bool[np.ndarray, " row"], items: Int[np.ndarray, " row"]
) -> float:
    """Cross-validated log-loss (nats a row) of a probe, all rows of an item in one fold."""
    n_items = len(np.unique(items))
    if n_items < 2:
        raise SettingsError(
            "Guard.fit", expected="pairs of at least 2 items in select", received="1", fix="Give more items."
        )
    decision = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITER)),
        rows,
        labels,
        groups=items,
        cv=GroupKFold(min(5, n_items)),
        method="decision_function",
    )
    return float(np.logaddexp(0, np.where(labels, -1, 1) * np.asarray(decision)).mean())

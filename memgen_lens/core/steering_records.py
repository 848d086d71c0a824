"""What steering stages hand each other and save: settings, rates, side effects, sweeps.

Plain values, so that what is saved can be read, drawn and reported without torch. They do not compute: the stages do.
"""

from dataclasses import dataclass, field
from typing import Any

from memgen_lens.core.types import Ablation, Direction, Mode, Positions


@dataclass(frozen=True)
class SteeringSetting:
    """One way to steer: which neurons, how hard, where.

    Attributes:
        site: Site whose neurons are changed.
        top_fraction: Share of the site's neurons, by largest abs(score), in (0, 1]; where they were chosen in another
            way (``chosen``), the share that they make.
        alpha: Multiple of abs(nmd), of a direction, or of the change that a fitted rule predicts; of a scale, what is
            added to a factor of 1 or taken from it; None where neurons are set to values.
        positions: See `memgen_lens.core.types.Positions`.
        mode: ``"shift"`` (the paper's), another of `memgen_lens.core.types.Mode`, or the kind of the rule fitted on the
            ``select`` pairs: ``"clusters"`` or ``"low_rank"``.
        size: Of a fitted rule, the number of its clusters or its rank; else None.
        how: Of an ablation, what neurons are set to; else None.
        chosen: How neurons were chosen, in words, where it was not by the top fraction over all layers; else None.
        method: What they were ranked by (`memgen_lens.attribute`); None of a direction.
    """

    site: str
    top_fraction: float
    alpha: float | None
    positions: Positions
    mode: Mode = "shift"
    size: int | None = None
    how: Ablation | None = None
    chosen: str | None = None
    method: str | None = "pearson"


@dataclass(frozen=True)
class SteeringRates:
    """What steering one side of the pairs towards the other behaviour does.

    Attributes:
        toward: The behaviour steered towards; the prompts are those that show the other one unsteered.
        n: Prompts.
        n_items: Items that they belong to: what the intervals count.
        shift: ``{"rate", "ci95"}``: share that now give the answer of ``toward``: the rule's (towards
            generalization), or the item's own memorized one (towards memorization: exact recall).
        memorized_form: Share whose output has the form of a memorized answer, its own or not.
        stayed: Share that still give the answer they gave unsteered.
        other: Share that give neither answer.
        controls: By control, ``{"mean", "ci95", "n_draws", "memorized_form": {...}, "other": {...}, "overlap"}`` over
            draws, where ``overlap`` is the share of the selected neurons that the control changes too; or
            ``{"mean": None, "why": ...}``.
        examples: A few prompts with their outputs before and after.
        others: Of the outputs that are neither answer, those said most often, ``{"output", "count",
            "memorized_form"}``; empty in runs of before.
    """

    toward: Direction
    n: int
    n_items: int
    shift: dict[str, Any]
    memorized_form: dict[str, Any]
    stayed: dict[str, Any]
    other: dict[str, Any]
    controls: dict[str, dict[str, Any]]
    examples: tuple[dict[str, str], ...]
    others: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SteeringRates":
        """What was written as JSON, by this version or an earlier one."""
        lists = {name: tuple(value.get(name, ())) for name in ("examples", "others")}
        return cls(**{**value, **lists})


@dataclass(frozen=True)
class SideEffects:
    """What steering does to held-out generic prompts, which it is not meant to change.

    Towards memorization such a prompt is, but for its label, what steering is asked to change: losing the rule there is
    no side effect alone.

    Attributes:
        n: Held-out prompts.
        heldout_generalization: Share answered by the rule, unsteered.
        heldout_generalization_steered: The same, steered towards generalization.
        heldout_generalization_steered_to_memorization: The same, steered towards memorization.
        kl_nats: Mean KL divergence (nats) of the steered (towards generalization) from the unsteered
            next-token distribution at the answer position.
        why: Why the figures are None, where they are.
        kl_nats_to_memorization: The same, steered towards memorization; None in runs of before.
        n_items: Items that the prompts belong to: what the intervals count; None in runs of before.
        ci95: By figure, its 95 % interval: Wilson's of a share, a bootstrap's of a divergence. Empty in runs of before.
        lost: By direction, ``{"loss", "ci95", "n", "n_items"}``: accuracy lost, prompt by prompt
            (`memgen_lens.core.stats.paired_loss`). Empty in runs of before.
        by_task: The same figures for each task of a mixture.
    """

    n: int
    heldout_generalization: float | None
    heldout_generalization_steered: float | None
    heldout_generalization_steered_to_memorization: float | None
    kl_nats: float | None
    why: str | None = None
    kl_nats_to_memorization: float | None = None
    n_items: int | None = None
    ci95: dict[str, list[float]] = field(default_factory=dict)
    lost: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_task: "dict[str, SideEffects]" = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SideEffects":
        """What was written as JSON, by this version or an earlier one."""
        parts = {name: cls.from_json(part) for name, part in value.get("by_task", {}).items()}
        return cls(**{**value, "by_task": parts})


@dataclass(frozen=True)
class SteeringTable:
    """Steering both ways on the test pairs, beside its controls and side effects.

    Attributes:
        setting: How it was steered.
        n_neurons_by_layer: Neurons that were changed.
        to_generalization: What it does to recalling prompts.
        to_memorization: What it does to computing prompts.
        side_effects: What it does to held-out prompts.
        predicted: Of a fitted rule, by direction, for each layer that is steered ``{"layer", "closed",
            "closed_by_one_shift"}``: which share of the squared distance from a prompt's activation to its partner's,
            on the selected neurons, what is added at alpha 1 closes for items that it was not fitted on, beside what
            one shift for all closes; at most 1, and below 0 where it leads away. None where nothing is fitted.
        by_task: Where the pairs are of several tasks of a mixture, what the same steering does to those of each, by
            task and direction, with its controls and without examples.
    """

    setting: SteeringSetting
    n_neurons_by_layer: tuple[int, ...]
    to_generalization: SteeringRates
    to_memorization: SteeringRates
    side_effects: SideEffects
    predicted: dict[str, list[dict[str, Any]]] | None = None
    by_task: dict[str, dict[str, SteeringRates]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SteeringTable":
        """What was written as JSON, by this version or an earlier one."""
        return cls(
            setting=SteeringSetting(**value["setting"]),
            n_neurons_by_layer=tuple(value["n_neurons_by_layer"]),
            to_generalization=SteeringRates.from_json(value["to_generalization"]),
            to_memorization=SteeringRates.from_json(value["to_memorization"]),
            side_effects=SideEffects.from_json(value["side_effects"]),
            predicted=value.get("predicted"),
            by_task={
                name: {way: SteeringRates.from_json(rates) for way, rates in ways.items()}
                for name, ways in value.get("by_task", {}).items()
            },
        )


@dataclass(frozen=True)
class SweepRow:
    """One setting of a steering sweep and its rates on the prompts it was swept on.

    Attributes:
        setting: The setting.
        layers: Layers it was restricted to; None = all (of a fitted rule: the one layer that it chooses).
        n: Pairs.
        n_items: Items that they belong to.
        to_generalization: Share of recalling prompts that now generalize.
        to_generalization_other: Share of them that now do neither.
        to_memorization: Share of computing prompts that now recall exactly.
        memorized_form: Share of computing prompts whose output now has the form of a memorized answer.
        to_memorization_other: Share of computing prompts whose output is neither the rule's nor of memorized form.
        share: Where it was restricted to some layers, the share of the site's neurons that are changed there.
        heldout_loss: Accuracy lost on prompts that it is not meant to change, steered towards generalization, in
            [-1, 1]; None where it was not measured.
        heldout_loss_to_memorization: The same, steered towards memorization.
        n_heldout: Prompts that the two were measured on.
    """

    setting: SteeringSetting
    layers: tuple[int, ...] | None
    n: int
    n_items: int
    to_generalization: float
    to_generalization_other: float
    to_memorization: float
    memorized_form: float
    to_memorization_other: float
    share: float | None = None
    heldout_loss: float | None = None
    heldout_loss_to_memorization: float | None = None
    n_heldout: int = 0

    @property
    def strength(self) -> float:
        """How much is changed: share of neurons times alpha (1 where there is none)."""
        share = self.setting.top_fraction if self.share is None else self.share
        return share * (self.setting.alpha or 1.0)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SweepRow":
        """What was written as JSON, by this version or an earlier one."""
        layers = None if value["layers"] is None else tuple(value["layers"])
        return cls(**{**value, "setting": SteeringSetting(**value["setting"]), "layers": layers})

    @property
    def gain(self) -> float:
        """Shift rate minus the rate of other outputs, summed over both directions, in [-2, 2]; what is maximized."""
        return self.gain_toward("generalization") + self.gain_toward("memorization")

    def gain_toward(self, toward: Direction) -> float:
        """The same in one direction, in [-1, 1]."""
        if toward == "generalization":
            return self.to_generalization - self.to_generalization_other
        return self.memorized_form - self.to_memorization_other

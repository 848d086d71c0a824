"""What a guarded steering is found to do: thresholds, rates of prompts that are steered, what becomes of them.

Plain values, so that what is saved can be read, drawn and reported without torch. They do not compute: the stages do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from memgen_lens.core.files import with_nulls, write_json
from memgen_lens.core.stats import Rate
from memgen_lens.core.steering_records import SteeringSetting

FILE = "guard.json"
"""What a run directory calls its `GuardTable`."""


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold and what it does on the prompts that it was chosen on.

    Attributes:
        threshold: Predicted probability from which on a prompt is steered, in [0, 1].
        false_trigger_rate: What was asked for, in [0, 1).
        caught: ``{"rate", "ci95", "k", "n", "n_items"}``: share of the prompts to be steered in ``tune`` that are.
        triggered: By set (``"tune"``; ``"validation"``: those answered by the rule), share of the prompts not to be
            steered that are.
    """

    threshold: float
    false_trigger_rate: float
    caught: dict[str, Any]
    triggered: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PolicyRates:
    """What becomes of the test prompts where all, none or some of them are steered towards generalization.

    Each but ``lost`` is ``{"rate", "ci95", "k", "n", "n_items"}``, or of a control ``{"mean", "ci95", "n_draws"}``;
    None where there are no held-out prompts.

    Attributes:
        prevented: Share of the recalling prompts that recall no longer.
        to_rule: Share of them that give the rule's answer.
        rephrased: Share of their rephrasings, which compute unsteered, that give the rule's answer.
        heldout: Share of held-out prompts that are answered by the rule.
        harmed: Share of held-out prompts that are answered by the rule unsteered alone.
        lost: Held-out accuracy lost: unsteered minus this, in [-1, 1].
    """

    prevented: dict[str, Any]
    to_rule: dict[str, Any]
    rephrased: dict[str, Any]
    heldout: dict[str, Any] | None
    harmed: dict[str, Any] | None
    lost: float | None


@dataclass(frozen=True)
class GuardCurve:
    """The same guard at other thresholds, from the one that steers everything to the one that steers nothing.

    Attributes:
        threshold: Predicted probability, ascending.
        prevented: See `PolicyRates`.
        heldout_triggered: Share of held-out prompts that are steered; NaN where there are none.
        rephrased_triggered: Share of rephrased prompts that are steered.
        lost: See `PolicyRates`; NaN where there are no held-out prompts.
    """

    threshold: Float[np.ndarray, " point"]
    prevented: Float[np.ndarray, " point"]
    heldout_triggered: Float[np.ndarray, " point"]
    rephrased_triggered: Float[np.ndarray, " point"]
    lost: Float[np.ndarray, " point"]


@dataclass(frozen=True)
class GuardTable:
    """A guard on the test prompts, beside steering all of them, none, and as many at random.

    Attributes:
        setting: What the prompts that are picked are steered by.
        site: The site that the probe reads.
        layer: Its layer.
        threshold: Predicted probability of memorization from which on a prompt is steered.
        chosen: How the threshold was chosen; None where it was given.
        n: Recalling prompts, and as many rephrased ones.
        n_items: Items that they belong to.
        n_heldout: Held-out prompts.
        triggered: By kind of prompt (``"memorized"``, ``"rephrased"``, ``"heldout"``) the share that is steered; of the
            latter two these are false triggers. ``"heldout_computing"``: of the held-out prompts that are answered by
            the rule unsteered, without those that recall what they were never taught.
        policies: ``"none"``, ``"guard"`` and ``"unconditional"``.
        shuffled: What comes of steering as many prompts, drawn at random among all kinds; as a control over draws.
        curve: Other thresholds.
        why: Why there are no held-out figures, where there are none.
    """

    setting: SteeringSetting
    site: str
    layer: int
    threshold: float
    chosen: ChosenThreshold | None
    n: int
    n_items: int
    n_heldout: int
    triggered: dict[str, dict[str, Any]]
    policies: dict[str, PolicyRates]
    shuffled: PolicyRates
    curve: GuardCurve
    why: str | None = None

    def save(self, directory: Path) -> None:
        """Write ``guard.json`` into a run directory."""
        write_json(directory / FILE, with_nulls(self))

    @classmethod
    def from_json(cls, value: Any) -> "GuardTable":
        """The table that ``guard.json`` holds."""
        chosen = value["chosen"]
        curve = {name: np.array(values, dtype=np.float64) for name, values in value["curve"].items()}
        return cls(
            **{
                **value,
                "setting": SteeringSetting(**value["setting"]),
                "chosen": None if chosen is None else ChosenThreshold(**chosen),
                "policies": {name: PolicyRates(**rates) for name, rates in value["policies"].items()},
                "shuffled": PolicyRates(**value["shuffled"]),
                "curve": GuardCurve(**curve),
            }
        )


def plain_rate(rate: Rate) -> dict[str, Any]:
    """A rate as it is saved."""
    return {"rate": rate.rate, "ci95": list(rate.ci95), "k": rate.k, "n": rate.n, "n_items": rate.n_items}

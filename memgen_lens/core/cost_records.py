"""What `memgen_lens.steering_cost` measures: what steering reaches and what it costs, as it grows stronger.

Plain values and numpy arrays that can be saved as JSON and drawn without torch. They do not steer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import record_read, write_record
from memgen_lens.core.steering_records import SteeringSetting

FILE = "steering_cost.json"
STEERED = "steered"
"""The curve of the steering itself; the others are its controls."""
FIGURES = ("shift", "memorized_form", "stayed", "other", "heldout_loss", "kl_nats")


@dataclass(frozen=True)
class Band:
    """One figure at every strength; NaN where it was not measured.

    Attributes:
        mean: Of the steering its rate (or mean); of a control the mean over its draws.
        low: Lower end of the steering's 95 % interval over items, or the 2.5th percentile of a control's draws.
        high: Upper end, or the 97.5th percentile.
    """

    mean: Float[np.ndarray, " strength"]
    low: Float[np.ndarray, " strength"]
    high: Float[np.ndarray, " strength"]


@dataclass(frozen=True)
class CostCurve:
    """One steering, or the draws of one control, as its strength grows.

    Attributes:
        n_draws: 1, or the draws of a control.
        shift: Share of prompts that now give the answer steered towards.
        memorized_form: Share whose output has the form of a memorized answer, its own or not.
        stayed: Share that still give the answer they gave unsteered.
        other: Share that give neither answer.
        heldout_loss: Accuracy lost on held-out prompts, in [-1, 1].
        kl_nats: Mean KL divergence (nats) of the steered from the unsteered next-token distribution there.
    """

    n_draws: int
    shift: Band
    memorized_form: Band
    stayed: Band
    other: Band
    heldout_loss: Band
    kl_nats: Band


@dataclass(frozen=True)
class SteeringCost:
    """What a steering reaches and what it costs at each strength, beside its controls.

    Attributes:
        setting: How it was steered, with the alpha that the steering came with.
        alphas: Strengths, rising.
        n: Prompts of each direction.
        n_items: Items that they belong to: what the intervals count.
        n_heldout: Held-out prompts; 0 where there were none.
        heldout: Share of them that the unsteered model answers by the rule; None where there were none.
        curves: By direction (``"generalization"``, ``"memorization"``) and by name, ``"steered"`` first.
        why: Why there are no held-out figures, where there are none.
    """

    setting: SteeringSetting
    alphas: tuple[float, ...]
    n: int
    n_items: int
    n_heldout: int
    heldout: float | None
    curves: dict[str, dict[str, CostCurve]]
    why: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One flat line a direction, curve and strength."""
        return [
            {"toward": toward, "name": name, "alpha": alpha, "n_draws": curve.n_draws}
            | {figure: float(getattr(curve, figure).mean[i]) for figure in FIGURES}
            for toward, curves in self.curves.items()
            for name, curve in curves.items()
            for i, alpha in enumerate(self.alphas)
        ]

    @arguments(directory=kinds.place("SteeringCost.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``steering_cost.json`` into a directory and return its path; what was not measured is null.

        In a run directory, the report shows it.

        Raises:
            RunDirectoryError: The file cannot be written.
        """
        return write_record(Path(directory) / FILE, self)

    @classmethod
    @arguments(path=kinds.place("SteeringCost.load"))
    def load(cls, path: str | Path) -> "SteeringCost":
        """Read what `save` wrote: the file, or the directory that holds it.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path, FILE) as value:
            changed = {
                "setting": SteeringSetting(**value["setting"]),
                "alphas": tuple(value["alphas"]),
                "curves": {
                    toward: {name: _curve(curve) for name, curve in curves.items()}
                    for toward, curves in value["curves"].items()
                },
            }
            return cls(**(value | changed))


def _curve(value: dict[str, Any]) -> CostCurve:
    bands = {
        name: Band(**{end: np.array(values, dtype=float) for end, values in value[name].items()}) for name in FIGURES
    }
    return CostCurve(n_draws=value["n_draws"], **bands)

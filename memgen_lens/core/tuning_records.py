"""What `memgen_lens.tune_steering` hands over: its objective, everything that was tried, and the point chosen.

Plain values that can be saved and drawn without torch. They do not steer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import record_read, write_record
from memgen_lens.core.settings import Settings
from memgen_lens.core.steering_records import SteeringTable, SweepRow
from memgen_lens.core.types import Direction

FILE = "tuned.json"


class SteeringObjective(Settings):
    """What a setting of steering is worth, as one number.

    In each direction: ``shift - other * (rate of other outputs) - heldout_loss * (accuracy lost on held-out prompts)``,
    the last below 0, and in the setting's favour, where steering mends more prompts than it breaks. Both directions are
    summed up unless one is named. Towards memorization an output in memorized form counts as shifted, as in
    `memgen_lens.choose_setting`, and held-out accuracy costs nothing by default: a held-out prompt that now answers in
    the form of a memory is, but for its label, what was asked for, and shift and loss would cancel.
    """

    other: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the rate of other outputs."""
    heldout_loss: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of held-out accuracy lost towards generalization."""
    heldout_loss_to_memorization: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of held-out accuracy lost towards memorization."""
    ties: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Items (of ``tune``) in each direction within which settings count as equals; of equals the gentlest is chosen. 0
    chooses the best, where a gentler one is as good to the last item."""

    @arguments("SteeringObjective.value", row=kinds.one(SweepRow), toward=kinds.DirectionName | None)
    def value(self, row: SweepRow, toward: Direction | None = None) -> float:
        """The objective of a setting; a loss that was not measured counts as none.

        Args:
            row: The setting's rates.
            toward: Count this direction alone.
        """
        there = row.to_generalization - self.other * row.to_generalization_other
        back = row.memorized_form - self.other * row.to_memorization_other
        there -= self.heldout_loss * (row.heldout_loss or 0.0)
        back -= self.heldout_loss_to_memorization * (row.heldout_loss_to_memorization or 0.0)
        return {"generalization": there, "memorization": back, None: there + back}[toward]

    def __str__(self) -> str:
        terms = [f"{self.other:g} * other", f"{self.heldout_loss:g} * held-out loss"]
        if self.heldout_loss_to_memorization:
            terms.append(f"{self.heldout_loss_to_memorization:g} * held-out loss towards memorization")
        return " - ".join(["shift", *terms])


def choose(rows: Any, objective: SteeringObjective, toward: Direction | None) -> SweepRow:
    """The gentlest setting among those that count as good as the best; of as gentle ones the best.

    Args:
        rows: Settings tried, at least one.
        objective: What they are worth.
        toward: Count this direction alone.
    """
    n_directions = 2 if toward is None else 1
    values = [objective.value(row, toward) for row in rows]
    best = max(values)
    equals = [
        (row, value)
        for row, value in zip(rows, values, strict=True)
        if value >= best - objective.ties * n_directions / row.n_items - 1e-9
    ]
    return min(equals, key=lambda pair: (pair[0].strength, -pair[1]))[0]


@dataclass(frozen=True)
class TunedSteering:
    """Everything that was tried on ``tune``, what was chosen there, and what that does on ``test``.

    Attributes:
        rows: One row a setting: the surface.
        chosen: The setting chosen on ``tune``, with its rates there.
        objective: What it was chosen by.
        toward: The direction that counted alone; None = both.
        table: Its figures on ``test``, beside controls and side effects.
        heldout: ``{"rate", "ci95", "k", "n", "n_items"}``: share of the sampled validation prompts that the unsteered
            model answers by the rule; None where there were none.
        why: Why held-out loss was not measured, where it was not.
        steering: The chosen `memgen_lens.Steering`; None in what was read from a file.
    """

    rows: tuple[SweepRow, ...]
    chosen: SweepRow
    objective: SteeringObjective
    toward: Direction | None
    table: SteeringTable
    heldout: dict[str, Any] | None = None
    why: str | None = None
    steering: Any = field(default=None, repr=False, compare=False)

    @arguments("TunedSteering.value", row=kinds.one(SweepRow))
    def value(self, row: SweepRow) -> float:
        """The objective of one of the rows."""
        return self.objective.value(row, self.toward)

    @arguments(
        "TunedSteering.choose",
        objective=kinds.one(SteeringObjective),
    )
    def choose(self, objective: SteeringObjective) -> SweepRow:
        """What another objective would have chosen among the same rows, without running anything."""
        return choose(self.rows, objective, self.toward)

    @arguments(directory=kinds.place("TunedSteering.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``tuned.json`` into a directory, the steering itself left out, and return its path.

        Raises:
            RunDirectoryError: The file cannot be written.
        """
        objective = {"objective": self.objective.model_dump()}
        return write_record(Path(directory) / FILE, {name: getattr(self, name) for name in SAVED} | objective)

    @classmethod
    @arguments(path=kinds.place("TunedSteering.load"))
    def load(cls, path: str | Path) -> "TunedSteering":
        """Read what `save` wrote: the file, or the directory that holds it.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path, FILE) as value:
            changed: dict[str, Any] = {
                "rows": tuple(map(SweepRow.from_json, value["rows"])),
                "chosen": SweepRow.from_json(value["chosen"]),
                "objective": SteeringObjective(**value["objective"]),
                "table": SteeringTable.from_json(value["table"]),
            }
            return cls(**(value | changed))


SAVED = tuple(name for name in TunedSteering.__dataclass_fields__ if name != "steering")
"""What of a record is written."""

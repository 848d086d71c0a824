"""How far prompts that compute can be brought to recall: the form of a memory (mode), and this item's (content).

Plain values, so that what is saved can be read, drawn and reported without torch. They do not compute: the stages do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memgen_lens.core.files import with_nulls, write_json
from memgen_lens.core.position_records import PositionTokens

FILE = "mode_and_content.json"
"""What a run directory calls its `ModeContent`."""
Source = Literal["own", "other"]
"""Whose recalling prompt is patched from: the item's own, or that of another item."""


@dataclass(frozen=True)
class ModeRow:
    """What is said under one intervention; each share is ``{"rate", "ci95", "k", "n", "n_items"}``.

    Attributes:
        name: What is done, in words.
        prompts: ``"computing"`` prompts, which give the rule's answer unsteered, or ``"recalling"`` ones.
        form: Share whose output has the form of a memorized answer, the item's own or not: mode.
        recall: Share whose output is the item's own memorized answer: content.
        rule: Share whose output is the rule's answer.
        of_source: Share whose output is the memorized answer of the item that is patched from, where that is another.
        source: Whose activations are patched in, where something is patched.
        depth: Blocks that have been run where the residual stream is patched: 0 before the first.
        positions: ``"answer"``: the answer position, ``"before"``: all others, ``"all"``; or one position, counted from
            the end.
    """

    name: str
    prompts: Literal["computing", "recalling"]
    form: dict[str, Any]
    recall: dict[str, Any]
    rule: dict[str, Any]
    of_source: dict[str, Any] | None = None
    source: Source | None = None
    depth: int | None = None
    positions: str | int | None = None


@dataclass(frozen=True)
class ModeContent:
    """Interventions towards memorization, each by mode and content, beside their controls.

    Attributes:
        rows: One an intervention: nothing, each steering, and patches by depth and positions.
        tokens: What stands at the positions that are patched one at a time.
        n_depths: Places of the residual stream that are patched: one more than blocks.
        n: Pairs whose prompts are steered.
        n_items: Items that they belong to.
        n_patched: Those of them that are patched: of equal length, beside another item's to patch from.
        one_form: Whether every answer of the rule has the form of a memorized one, so that mode cannot be seen.
    """

    rows: tuple[ModeRow, ...]
    tokens: PositionTokens
    n_depths: int
    n: int
    n_items: int
    n_patched: int
    one_form: bool

    def patched(self, source: Source, positions: str | int) -> list[ModeRow]:
        """The rows of patches from one source at some positions, by depth."""
        rows = [row for row in self.rows if row.source == source and row.positions == positions]
        return sorted(rows, key=lambda row: row.depth or 0)

    def save(self, directory: Path) -> None:
        """Write ``mode_and_content.json`` into a run directory."""
        write_json(directory / FILE, with_nulls(self))

    @classmethod
    def from_json(cls, value: Any) -> "ModeContent":
        """What ``mode_and_content.json`` holds."""
        tokens = value["tokens"]
        made = PositionTokens(
            memorized=tuple(tokens["memorized"]),
            generalized=tuple(tokens["generalized"]),
            memorized_share=np.array(tokens["memorized_share"], dtype=np.float64),
            generalized_share=np.array(tokens["generalized_share"], dtype=np.float64),
            differing=np.array(tokens["differing"], dtype=np.float64),
            n=np.array(tokens["n"], dtype=np.int64),
        )
        return cls(**{**value, "rows": tuple(ModeRow(**row) for row in value["rows"]), "tokens": made})

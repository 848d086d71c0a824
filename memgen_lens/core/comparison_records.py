"""What `memgen_lens.compare` finds: runs side by side, their mean over seeds, and what each setting changes.

Records hold plain values, and can be written as JSON and read back. They do not compare.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import record_read, with_nulls, write_record

FILE = "compare.json"


@dataclass(frozen=True)
class Measured:
    """One figure of one run.

    Attributes:
        run: The run's name.
        seed: Its seed.
        value: The figure; None where the run has none (too few prompts flip).
        ci95: Its 95 % interval over items, as the run gives it; None where it gives none.
        n: Prompts or pairs that it counts.
        n_items: Items that these belong to.
    """

    run: str
    seed: int
    value: float | None
    ci95: tuple[float, float] | None
    n: int | None
    n_items: int | None


@dataclass(frozen=True)
class OverSeeds:
    """A mean over runs that differ in their seed alone.

    Attributes:
        mean: Mean over those that have the figure; None where none has.
        ci95: Student's 95 % interval of the mean over seeds, cut to what the figure can be; None for fewer than
            two, and where all agree.
        n: Seeds that it is over.
        n_without: Runs that lack the figure.
    """

    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    n_without: int = 0


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: The settings in which it differs from other groups, in words.
        settings: Those settings.
        runs: By figure, each run's.
        over_seeds: By figure, the mean over them.
    """

    label: str
    settings: dict[str, Any]
    runs: dict[str, tuple[Measured, ...]]
    over_seeds: dict[str, OverSeeds]


@dataclass(frozen=True)
class Difference:
    """A group's figure less that of the reference, paired by seed.

    Attributes:
        figure: Which figure.
        group: Label of the group.
        reference: Label of the group that it is compared with.
        over_seeds: Mean of the differences of runs of one seed.
    """

    figure: str
    group: str
    reference: str
    over_seeds: OverSeeds


@dataclass(frozen=True)
class Effect:
    """What one setting changes: runs with one value less those with another that are alike in all else, seed included.

    Attributes:
        setting: Which setting.
        value: Its value.
        reference: The value that it is compared with, the setting's first.
        figure: Which figure.
        over_seeds: Mean over seeds of each seed's mean difference.
        n_pairs: Pairs of runs.
    """

    setting: str
    value: Any
    reference: Any
    figure: str
    over_seeds: OverSeeds
    n_pairs: int


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        figures: Names of the figures that are compared.
        settings: By setting in which runs differ, its values in order.
        groups: Runs that differ in their seed alone, the reference first.
        differences: Each other group less the first.
        effects: Each setting's, over all others.
        left_out: Runs that are not done, each with its error or ``"missing"``.
    """

    figures: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    effects: tuple[Effect, ...]
    left_out: dict[str, str]

    @property
    def n_runs(self) -> int:
        """Runs that are compared."""
        return sum(len(group.runs[self.figures[0]]) for group in self.groups)

    def summary(self) -> list[dict[str, Any]]:
        """A row a group, with mean and interval of each figure."""
        return [
            {"group": group.label, **{name: with_nulls(group.over_seeds[name]) for name in self.figures}}
            for group in self.groups
        ]

    @arguments("Comparison.save", directory=kinds.place("Comparison.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``compare.json`` into a directory, which is made if it is not there; gives its path.

        Raises:
            RunDirectoryError: It cannot be written, or a ``compare.json`` is there that is not ours.
        """
        return write_record(Path(directory) / FILE, self)

    @classmethod
    @arguments("Comparison.load", path=kinds.place("Comparison.load"))
    def load(cls, path: str | Path) -> "Comparison":
        """Read what `save` wrote: the file, or the directory that holds it.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path, FILE) as value:
            return cls(
                figures=tuple(value["figures"]),
                settings={name: tuple(values) for name, values in value["settings"].items()},
                groups=tuple(_group(group) for group in value["groups"]),
                differences=tuple(Difference(**_with_seeds(entry)) for entry in value["differences"]),
                effects=tuple(Effect(**_with_seeds(entry)) for entry in value["effects"]),
                left_out=dict(value["left_out"]),
            )


def _group(value: dict[str, Any]) -> Group:
    return Group(
        label=value["label"],
        settings=value["settings"],
        runs={name: tuple(Measured(**_pair(run)) for run in runs) for name, runs in value["runs"].items()},
        over_seeds={name: OverSeeds(**_pair(found)) for name, found in value["over_seeds"].items()},
    )


def _with_seeds(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"over_seeds": OverSeeds(**_pair(value["over_seeds"]))}


def _pair(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"ci95": None if value["ci95"] is None else tuple(value["ci95"])}

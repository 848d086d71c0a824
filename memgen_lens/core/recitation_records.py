"""What recitation is measured as: how far continuations follow the texts they are asked for, as it is and steered.

Records hold plain values and numpy arrays, and can be written as JSON and read back. They do not measure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.files import record_read, write_record
from memgen_lens.core.stats import Rate, wilson
from memgen_lens.core.steering_records import SteeringSetting

MEASURES = ("matched", "run", "share", "similarity")
"""What a continuation is held against a suffix by; see `Recitation`."""


@dataclass(frozen=True)
class Recitation:
    """The greedy continuation of each text's prefix against the text's own suffix.

    Attributes:
        prefix_tokens: Tokens of each text that the model is given.
        suffix_tokens: Tokens behind them that are asked for.
        group: A label of each text, such as how often it was trained on; all "" where none were given.
        item: A number for each text, the same for texts that are the same: what intervals count.
        matched: Tokens from the suffix's start on that the continuation gives exactly, 0 to ``suffix_tokens``.
        run: Tokens of the longest run that both have in common, wherever it stands.
        share: Share of the suffix's positions at which both have the same token, in [0, 1].
        similarity: Edit similarity in [0, 1]: twice the tokens in common blocks over the tokens of both (Ratcliff and
            Obershelp 1988, as the standard library's difflib has it). 1 = the same.
        perplexity: Of the suffix given the prefix and the suffix's own tokens so far, at least 1.
        chance: The same measures of the same continuations held against what is not theirs, means over texts:
            ``"random_tokens"`` (drawn from the vocabulary) and ``"other_suffix"`` (that of another of the texts; None
            where there is none).
        prefixes: What the model was given, as text.
        suffixes: What it was asked for.
        continuations: What it said.
    """

    prefix_tokens: int
    suffix_tokens: int
    group: tuple[int | str, ...]
    item: Int[np.ndarray, " text"]
    matched: Int[np.ndarray, " text"]
    run: Int[np.ndarray, " text"]
    share: Float[np.ndarray, " text"]
    similarity: Float[np.ndarray, " text"]
    perplexity: Float[np.ndarray, " text"]
    chance: Mapping[str, Mapping[str, float] | None]
    prefixes: tuple[str, ...]
    suffixes: tuple[str, ...]
    continuations: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.matched)

    @arguments("Recitation.extractable", k=kinds.Count | None, group=int | str | None)
    def extractable(self, k: int | None = None, *, group: int | str | None = None) -> Rate:
        """Share of texts whose first ``k`` suffix tokens are recited exactly, with its 95 % interval by text.

        k-extractable as in Carlini et al. 2022 (arXiv 2202.07646, definition 3.1), with the prompt fixed to be the
        text's own prefix, and decoding greedy.

        Args:
            k: Tokens; default: the whole suffix.
            group: Texts of this group alone.

        Raises:
            SettingsError: ``k`` is more than the suffix has, or there is no such group.
        """
        k = self.suffix_tokens if k is None else k
        chosen = np.array([group is None or label == group for label in self.group], dtype=bool)
        if k > self.suffix_tokens or not chosen.any():
            raise SettingsError(
                "Recitation.extractable",
                expected=f"k of at most {self.suffix_tokens}, and a group out of {list(dict.fromkeys(self.group))}",
                received=f"k={k}, group={group!r}",
                fix="Measure recitation with more suffix_tokens, or name another group.",
            )
        return wilson(self.matched[chosen] >= k, self.item[chosen])

    @arguments("Recitation.by_group", k=kinds.Count | None)
    def by_group(self, k: int | None = None) -> dict[int | str, Rate]:
        """`extractable` of each group, in the order of first occurrence."""
        return {label: self.extractable(k, group=label) for label in dict.fromkeys(self.group)}

    @arguments("Recitation.recited", k=kinds.Count | None)
    def recited(self, k: int | None = None) -> Int[np.ndarray, " index"]:
        """Places of the texts whose first ``k`` suffix tokens are recited exactly (default: the whole suffix)."""
        return np.flatnonzero(self.matched >= (self.suffix_tokens if k is None else k))

    @arguments("Recitation.save", path=kinds.place("Recitation.save"))
    def save(self, path: str | Path) -> Path:
        """Write a JSON file and return its path.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        return write_record(Path(path), self)

    @classmethod
    @arguments("Recitation.load", path=kinds.place("Recitation.load"))
    def load(cls, path: str | Path) -> "Recitation":
        """Read what `save` wrote.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path) as value:
            arrays = {name: np.array(value[name], dtype=np.int64) for name in ("item", "matched", "run")}
            arrays |= {name: np.array(value[name], dtype=float) for name in ("share", "similarity", "perplexity")}
            texts = {name: tuple(value[name]) for name in ("group", "prefixes", "suffixes", "continuations")}
            return cls(**(value | arrays | texts))


@dataclass(frozen=True)
class RecitationPoint:
    """What one steering does to recitation and to other text.

    Attributes:
        setting: How it was steered; None = not at all.
        layers: Layers in which something is changed.
        norm: Euclidean norm of what is added, all layers together; 0 unsteered, None of a fitted rule, whose addition
            depends on the row.
        recited: ``{"rate", "ci95"}``: share of texts whose first k suffix tokens are still recited exactly.
        matched: Mean of the tokens from the suffix's start on that are recited.
        perplexity: Of the recited texts' suffixes, steered.
        other_perplexity: Of the other texts' suffixes, steered.
        other_ratio: That over the unsteered one; 1 = no cost.
        kl_nats: Mean KL divergence of the steered from the unsteered next-token distribution on the other texts, at the
            last position of the prefix and all of the suffix but its last.
        controls: By control, ``{"recited", "other_ratio", "kl_nats"}``, each ``{"mean", "ci95", "n_draws"}`` over
            draws of the same norm in each layer.
    """

    setting: SteeringSetting | None
    layers: tuple[int, ...]
    norm: float | None
    recited: Mapping[str, Any]
    matched: float
    perplexity: float
    other_perplexity: float
    other_ratio: float
    kl_nats: float
    controls: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RecitationCurve:
    """Recitation and its cost under each of several steerings.

    Attributes:
        prefix_tokens: See `Recitation`.
        suffix_tokens: See `Recitation`.
        k: Tokens of the suffix that count as recited.
        n: Texts that recitation is of.
        n_items: How many of them differ: what intervals count.
        n_other: Other texts, that the cost is of.
        unsteered: Without steering.
        points: One a steering, in the order they were given.
    """

    prefix_tokens: int
    suffix_tokens: int
    k: int
    n: int
    n_items: int
    n_other: int
    unsteered: RecitationPoint
    points: tuple[RecitationPoint, ...]

    @arguments("RecitationCurve.best", max_ratio=kinds.Positive)
    def best(self, max_ratio: float = 1.1) -> int:
        """Place of the steering that leaves the least recited among those that cost at most so much.

        Of several that leave equally little, the one under which texts are left soonest (``matched``), then the
        cheapest; where none is cheap enough, the cheapest. To be asked of the texts that one chooses on, never of those
        that one reports on.

        Args:
            max_ratio: Perplexity on other text, steered over unsteered, at most.

        Raises:
            SettingsError: There are no steerings.
        """
        if not self.points:
            raise SettingsError(
                "RecitationCurve.best", expected="at least one steering", received="none", fix="Give steerings."
            )
        cheap = [i for i, point in enumerate(self.points) if point.other_ratio <= max_ratio]
        if not cheap:
            return min(range(len(self.points)), key=lambda i: self.points[i].other_ratio)
        return min(cheap, key=lambda i: _left_and_cost(self.points[i]))

    @arguments("RecitationCurve.save", path=kinds.place("RecitationCurve.save"))
    def save(self, path: str | Path) -> Path:
        """Write a JSON file and return its path.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        return write_record(Path(path), self)

    @classmethod
    @arguments("RecitationCurve.load", path=kinds.place("RecitationCurve.load"))
    def load(cls, path: str | Path) -> "RecitationCurve":
        """Read what `save` wrote.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path) as value:
            points = {"unsteered": _point(value["unsteered"]), "points": tuple(map(_point, value["points"]))}
            return cls(**(value | points))


def _left_and_cost(point: RecitationPoint) -> tuple[float, float, float]:
    return point.recited["rate"], point.matched, point.other_ratio


def _point(value: dict[str, Any]) -> RecitationPoint:
    changed: dict[str, Any] = {
        name: float("nan") if value[name] is None else value[name]
        for name in ("perplexity", "other_perplexity", "other_ratio", "kl_nats")
    }
    changed["setting"] = None if value["setting"] is None else SteeringSetting(**value["setting"])
    changed["layers"] = tuple(value["layers"])
    return RecitationPoint(**(value | changed))

"""What `memgen_lens.neuron_page` finds out about one neuron.

Records hold plain values and numpy arrays, and can be written as JSON and read back. They do not compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core.errors import MemgenError
from memgen_lens.core.files import damaged, read_json, with_nulls, write_json
from memgen_lens.core.stats import Rate

FILE = "neurons.json"
Side = Literal["memorized", "generalized"]
ChangeName = Literal["zero", "mean", "double"]


@dataclass(frozen=True)
class Estimate:
    """A mean or another statistic with its 95 % bootstrap interval, whole items resampled.

    Attributes:
        value: The statistic.
        ci95: Its interval.
    """

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class DrivingPrompt:
    """A prompt and what the neuron does at its answer position.

    Attributes:
        prompt: The text.
        side: ``"memorized"``: a prompt of the recalling side; ``"generalized"``: of the computing one.
        activation: The neuron's activation.
    """

    prompt: str
    side: Side
    activation: float


@dataclass(frozen=True)
class TokenEffect:
    """What a unit of the neuron's activation adds to a token's logit on the direct way.

    Attributes:
        token: The token's text.
        id: Its number in the vocabulary.
        logit: Logits a unit of activation, were the final norm's scale 1; the mean over the vocabulary is 0.
    """

    token: str
    id: int
    logit: float


@dataclass(frozen=True)
class SideChange:
    """What a change of the neuron does to the prompts of one side of the pairs.

    Attributes:
        contrast: Mean change of the contrast, in nats (or of the user's own metric), where the neuron is changed at
            the answer position; None where it could not be computed.
        kept: Of the prompts that unsteered show what they are labelled with, the share that still do, where the neuron
            is changed at the answer position and every generated one; None where no prompt does unsteered.
        switched: Of the same prompts, the share that then show the other behaviour.
    """

    contrast: Estimate | None
    kept: Rate | None
    switched: Rate | None


@dataclass(frozen=True)
class NeuronChange:
    """What a change of the neuron does.

    Attributes:
        change: ``"zero"``; ``"mean"``: its mean over both prompts of all pairs; ``"double"``: twice its own value.
        memorized: What it does to the recalling prompts.
        generalized: What it does to the computing prompts.
        examples: Some prompts that then show another behaviour, on each side: ``{"prompt", "side", "before", "after",
            "behavior"}``.
    """

    change: ChangeName
    memorized: SideChange
    generalized: SideChange
    examples: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class NeuronRecord:
    """One neuron, looked at.

    Attributes:
        site: Site name.
        layer: Its layer, among those that the site has.
        neuron: Its place in the site's last axis, heads flattened into it.
        split: Pairs that were looked at; None = all.
        item: The item of each pair.
        memorized: Its activation at the answer position of each pair's recalling prompt.
        generalized: On the computing side.
        nmd: Mean over pairs of ``memorized - generalized``, in units of the activation.
        auroc: AUROC of the activation as a score for recalling, in [0, 1]; 0.5 says that it does not tell.
        highest: The prompts of either side on which it is highest, from the highest down.
        lowest: On which it is lowest, from the lowest up.
        favoured: Tokens whose logits its output raises most where it is above 0, those of the largest effect first;
            empty where ``why`` says why.
        suppressed: Whose logits it lowers most, likewise.
        changes: What its ablation and its doubling change.
        why: By name (``"tokens"``, ``"contrast"``), why it could not be computed.
        metric: Name of the user's own metric, where one takes the contrast's place.
    """

    site: str
    layer: int
    neuron: int
    split: str | None
    item: Int[np.ndarray, " pair"] = field(repr=False)
    memorized: Float[np.ndarray, " pair"] = field(repr=False)
    generalized: Float[np.ndarray, " pair"] = field(repr=False)
    nmd: Estimate
    auroc: Estimate
    highest: tuple[DrivingPrompt, ...]
    lowest: tuple[DrivingPrompt, ...]
    favoured: tuple[TokenEffect, ...]
    suppressed: tuple[TokenEffect, ...]
    changes: tuple[NeuronChange, ...]
    why: dict[str, str]
    metric: str | None = None

    @property
    def n_pairs(self) -> int:
        """Pairs that were looked at."""
        return len(self.item)

    @property
    def n_items(self) -> int:
        """Items that they belong to: what the intervals count."""
        return len(np.unique(self.item))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "NeuronRecord":
        """A record of the plain values that JSON holds of it."""
        changed: dict[str, Any] = {
            **{name: np.array(value[name], dtype=np.float32) for name in ("memorized", "generalized")},
            "item": np.array(value["item"], dtype=np.int64),
            "nmd": _estimate(value["nmd"]),
            "auroc": _estimate(value["auroc"]),
            "changes": tuple(_change(row) for row in value["changes"]),
        }
        changed |= {name: tuple(DrivingPrompt(**row) for row in value[name]) for name in ("highest", "lowest")}
        changed |= {name: tuple(TokenEffect(**row) for row in value[name]) for name in ("favoured", "suppressed")}
        return cls(**(value | changed))


def save_neurons(records: Sequence[NeuronRecord], directory: Path) -> Path:
    """Write ``neurons.json`` into a directory and return its path."""
    path = directory / FILE
    write_json(path, {"neurons": with_nulls(list(records))})
    return path


def load_neurons(directory: Path) -> tuple[NeuronRecord, ...]:
    """Read what `save_neurons` wrote.

    Raises:
        RunDirectoryError: The file is missing or damaged.
    """
    path = directory / FILE
    value = read_json(path)
    try:
        return tuple(NeuronRecord.from_json(row) for row in value["neurons"])
    except MemgenError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise damaged(path, f"content that is not its own ({type(error).__name__}: {error})") from None


def _change(value: dict[str, Any]) -> NeuronChange:
    changed: dict[str, Any] = {side: _side(value[side]) for side in ("memorized", "generalized")}
    changed["examples"] = tuple(value["examples"])
    return NeuronChange(**(value | changed))


def _side(value: dict[str, Any]) -> SideChange:
    return SideChange(_estimate(value["contrast"]), _rate(value["kept"]), _rate(value["switched"]))


def _estimate(value: dict[str, Any] | None) -> Any:
    return None if value is None else Estimate(value["value"], tuple(value["ci95"]))


def _rate(value: dict[str, Any] | None) -> Rate | None:
    ends: dict[str, Any] = {} if value is None else {"ci95": tuple(value["ci95"])}
    return None if value is None else Rate(**(value | ends))

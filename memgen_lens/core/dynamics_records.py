"""What `memgen_lens.training_dynamics` measures over the checkpoints of one run.

Records hold plain values and numpy arrays, and can be written as JSON and read back. They do not measure.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.files import counts_rows, record_read, write_record
from memgen_lens.core.records import ProbeScores
from memgen_lens.core.steering_records import SteeringSetting

FILE = "dynamics.json"
BEHAVIORS = ("generalization", "memorization", "rephrased_generalization", "flips")
STEERED = ("to_generalization", "exact_recall", "memorized_form")


@dataclass(frozen=True)
class RateSeries:
    """One rate at every step (or position), with its 95 % interval over items; NaN where it could not be measured.

    Attributes:
        rate: In [0, 1].
        low: Lower end of the interval.
        high: Upper end.
        n: Prompts or items, 0 where it could not be measured.
        n_items: Items that they belong to: what the interval counts.
    """

    rate: Float[np.ndarray, " step"]
    low: Float[np.ndarray, " step"]
    high: Float[np.ndarray, " step"]
    n: Int[np.ndarray, " step"]
    n_items: Int[np.ndarray, " step"]


@dataclass(frozen=True)
class Separation:
    """When and where the activations first tell the two behaviours apart.

    Attributes:
        step: The earliest step measured at which a layer's probe does.
        layer: The first layer that does at that step.
        auroc: Its AUROC.
        auroc_ci95: Its 95 % interval.
        lasts: Whether that layer's probe does at every later step measured, too.
        step_by_layer: For each layer its own earliest step, or None.
    """

    step: int
    layer: int
    auroc: float
    auroc_ci95: tuple[float, float]
    lasts: bool
    step_by_layer: tuple[int | None, ...]


@dataclass(frozen=True)
class Dynamics:
    """Behaviours, neuron scores, probes and steering over the checkpoints of one run, on one set of pairs.

    Attributes:
        task: Name of the task.
        site: Site name.
        steps: Optimizer steps done at each measurement, rising; 0 is the untrained model.
        n_pairs: Pairs in ``select``, ``tune`` and ``test``: those on which the last model's behaviour flips.
        behavior: By name (`BEHAVIORS`), share of validation prompts answered by the rule, of memorized prompts recalled
            exactly, of their rephrasings answered by the rule, and of memorized items that flip at that step.
        nmd_mean: Mean abs(NMD) over a layer's neurons, in units of the activation.
        nmd_max: Largest abs(NMD) of a layer.
        nmd_mean_in_sd: ``nmd_mean`` / the layer's standard deviation (root mean variance of its neurons over the
            prompts of both sides). Neuron by neuron this would be ``2 * abs(rho)``.
        nmd_max_in_sd: ``nmd_max`` likewise.
        rho_max: Largest abs(rho) of a layer, in [0, 1].
        rho_p95: Its 95th percentile over neurons.
        share_fdr05: Share of a layer's neurons called at a false discovery rate of 5 % over the site.
        auroc: AUROC of each layer's probe on the ``test`` pairs.
        auroc_low: Lower end of its 95 % bootstrap interval.
        auroc_high: Upper end.
        input_only: The same probe on the prompt alone, which is the same at every step.
        setting: How every step was steered; the neurons and their shifts are each step's own.
        steering: By name (`STEERED`), rates on those ``test`` pairs that flip at that step.
        random_neurons: By name (``to_generalization``, ``memorized_form``), mean rate of random neurons shifted as
            hard; NaN where there is no steering.
        why: By step, why there is no steering.
    """

    task: str
    site: str
    steps: Int[np.ndarray, " step"]
    n_pairs: dict[str, int]
    behavior: dict[str, RateSeries]
    nmd_mean: Float[np.ndarray, "step layer"]
    nmd_max: Float[np.ndarray, "step layer"]
    nmd_mean_in_sd: Float[np.ndarray, "step layer"]
    nmd_max_in_sd: Float[np.ndarray, "step layer"]
    rho_max: Float[np.ndarray, "step layer"]
    rho_p95: Float[np.ndarray, "step layer"]
    share_fdr05: Float[np.ndarray, "step layer"]
    auroc: Float[np.ndarray, "step layer"]
    auroc_low: Float[np.ndarray, "step layer"]
    auroc_high: Float[np.ndarray, "step layer"]
    input_only: ProbeScores
    setting: SteeringSetting
    steering: dict[str, RateSeries]
    random_neurons: dict[str, Float[np.ndarray, " step"]]
    why: dict[int, str]

    @arguments(
        "Dynamics.first_separation",
        threshold=kinds.Positive,
    )
    def first_separation(self, threshold: float = 0.9) -> Separation | None:
        """The earliest step, and there the first layer, whose probe tells the behaviours apart.

        A layer's probe does where the lower end of its AUROC's 95 % interval is at least ``threshold`` and above the
        upper end of the prompt-only probe's interval. Each interval holds for itself; that many steps and layers are
        looked at is not corrected for, so read ``lasts`` beside it.

        Args:
            threshold: AUROC in [0.5, 1).

        Returns:
            None if no layer does at any step.

        Raises:
            SettingsError: The threshold is out of range.
        """
        if not 0.5 <= threshold < 1:
            raise SettingsError(
                "Dynamics.first_separation",
                expected="a threshold in [0.5, 1)",
                received=repr(threshold),
                fix="An AUROC of 0.5 is chance.",
            )
        apart = (self.auroc_low >= threshold) & (self.auroc_low > self.input_only.auroc_ci95[1])
        if not apart.any():
            return None
        first = int(np.argmax(apart.any(1)))
        layer = int(np.argmax(apart[first]))
        return Separation(
            step=int(self.steps[first]),
            layer=layer,
            auroc=float(self.auroc[first, layer]),
            auroc_ci95=(float(self.auroc_low[first, layer]), float(self.auroc_high[first, layer])),
            lasts=bool(apart[first:, layer].all()),
            step_by_layer=tuple(int(self.steps[np.argmax(of)]) if of.any() else None for of in apart.T),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One flat line a step and layer."""
        names = [name for name in self.__dataclass_fields__ if isinstance(getattr(self, name), np.ndarray)]
        return [
            {"step": int(step), "layer": layer}
            | {name: float(getattr(self, name)[i, layer]) for name in names if name != "steps"}
            for i, step in enumerate(self.steps)
            for layer in range(self.auroc.shape[1])
        ]

    @arguments(directory=kinds.place("Dynamics.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``dynamics.json`` into a directory and return its path; what could not be measured is null.

        Raises:
            RunDirectoryError: The file cannot be written.
        """
        return write_record(Path(directory) / FILE, self)

    @classmethod
    @arguments(path=kinds.place("Dynamics.load"))
    def load(cls, path: str | Path) -> "Dynamics":
        """Read what `save` wrote: the file, or the run directory that holds it.

        Raises:
            RunDirectoryError: The file is missing or damaged, or of an earlier version, whose intervals took the
                prompts of one item for independent.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        with record_read(path) as value:
            if any("n_items" not in series for series in value["behavior"].values()):
                raise counts_rows(path, "intervals")
            return cls._from_json(value)

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> "Dynamics":
        scores = value["input_only"]
        ends = {name: tuple(scores[name]) for name in ("auroc_ci95", "accuracy_ci95")}
        floats = [name for name in cls.__dataclass_fields__ if name.startswith(("nmd", "rho", "share", "auroc"))]
        drawn = {name: np.array(rates, dtype=float) for name, rates in value["random_neurons"].items()}
        changed: dict[str, Any] = {
            "steps": np.array(value["steps"], dtype=np.int64),
            "behavior": {name: _series(value["behavior"][name]) for name in BEHAVIORS},
            "input_only": ProbeScores(**(scores | ends)),
            "setting": SteeringSetting(**value["setting"]),
            "steering": {name: _series(value["steering"][name]) for name in STEERED},
            "random_neurons": drawn,
            "why": {int(step): text for step, text in value["why"].items()},
        }
        changed |= {name: np.array(value[name], dtype=float) for name in floats}
        return cls(**(value | changed))


def _series(value: dict[str, Any]) -> RateSeries:
    ends = {name: np.array(value[name], dtype=float) for name in ("rate", "low", "high")}
    return RateSeries(**ends, **{name: np.array(value[name], dtype=np.int64) for name in ("n", "n_items")})

"""What `memgen_lens.analysis.comparison` finds out: over halves of the pairs, training seeds and tasks.

Records hold plain values and numpy arrays, and can be written as JSON and read back. They do not compute.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core.files import with_nulls
from memgen_lens.core.stats import mean_of_draws
from memgen_lens.core.steering_records import SteeringSetting

NULLS = ("spearman", "overlap", "null_spearman", "null_overlap")
STEERING_RATES = (
    "to_generalization",
    "to_generalization_other",
    "exact_recall",
    "memorized_form",
    "to_memorization_other",
)
"""The figures of steering from task to task; see `TaskConsistency.steering`."""


@dataclass(frozen=True)
class SplitHalf:
    """Whether two halves of one task's pairs find the same neurons.

    Attributes:
        site: Site name.
        n_pairs: Pairs that were halved.
        n_items: Items they belong to; halves are dealt by item.
        n_neurons: Neurons that vary over these pairs.
        n_top: Neurons in a top set, those with the largest abs(score); of a causal method the largest score.
        top_fraction: Share of all the site's neurons that they are.
        spearman: For each split, the rank correlation of the neurons' scores in the two halves, in [-1, 1].
        overlap: For each split, the share of one half's top set that is in the other's, in [0, 1].
        expected_overlap: Share for random sets of this size (hypergeometric mean, ``n_top / n_neurons``).
        overlap_p: Hypergeometric probability of at least the median number shared.
        null_spearman: ``spearman`` where the labels of each item (a causal method: the sign of its effects) were
            swapped at random.
        null_overlap: ``overlap`` likewise.
        method: What neurons are scored by; see `memgen_lens.attribute`.
    """

    site: str
    n_pairs: int
    n_items: int
    n_neurons: int
    n_top: int
    top_fraction: float
    spearman: Float[np.ndarray, " split"]
    overlap: Float[np.ndarray, " split"]
    expected_overlap: float
    overlap_p: float
    null_spearman: Float[np.ndarray, " split"]
    null_overlap: Float[np.ndarray, " split"]
    method: str = "pearson"

    def summary(self) -> dict[str, Any]:
        """Means over splits with the interval that holds 95 % of them, for ``metrics.json``."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in NULLS}
        return plain | {name: mean_of_draws(getattr(self, name)) for name in NULLS}

    def rows(self) -> list[dict[str, float]]:
        """One flat line a split."""
        columns = [getattr(self, name).tolist() for name in NULLS]
        return [dict(zip(NULLS, row, strict=True)) for row in zip(*columns, strict=True)]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SplitHalf":
        """The record that was written as JSON."""
        draws: dict[str, Any] = {name: np.array(value[name], dtype=float) for name in NULLS}
        return cls(**(value | draws))


@dataclass(frozen=True)
class SeedConsistency:
    """Whether separately trained models keep the two behaviours apart in the same layers.

    Attributes:
        site: Site name.
        seeds: What tells the models apart.
        top_fraction: Share of a site's neurons in a top set.
        top_share: Share of each model's top set that lies in each layer; sums to 1 over layers.
        max_abs_rho: Largest abs(rho) of each layer, in [0, 1].
        top_share_correlation: Pearson correlation of two models' ``top_share`` profiles; NaN where it is not defined.
        max_abs_rho_correlation: Likewise of ``max_abs_rho``.
        why: Why correlations are missing, where they are.
    """

    site: str
    seeds: tuple[str, ...]
    top_fraction: float
    top_share: Float[np.ndarray, "seed layer"]
    max_abs_rho: Float[np.ndarray, "seed layer"]
    top_share_correlation: Float[np.ndarray, "seed seed"]
    max_abs_rho_correlation: Float[np.ndarray, "seed seed"]
    why: str | None = None

    def summary(self) -> dict[str, Any]:
        """The whole record as JSON takes it; what could not be computed is null."""
        return with_nulls(self)

    def rows(self) -> list[dict[str, Any]]:
        """One flat line a seed and layer."""
        return [
            {"seed": seed, "layer": layer, "top_share": float(share), "max_abs_rho": float(rho)}
            for seed, shares, rhos in zip(self.seeds, self.top_share, self.max_abs_rho, strict=True)
            for layer, (share, rho) in enumerate(zip(shares, rhos, strict=True))
        ]


@dataclass(frozen=True)
class AdapterConsistency:
    """Whether models tuned from one pretrained model find the same neurons; matrices are ``[model, model]``.

    Attributes:
        site: Site name.
        models: What tells the models apart.
        top_fraction: Share of the site's neurons in a top set.
        n_permutations: Permutations of the neuron index behind each p.
        n_neurons: Neurons compared: those whose score is not 0 in either model.
        overlap: Share of the (smaller) top set that both have, in [0, 1].
        overlap_expected: The same of random sets drawn from all neurons.
        overlap_expected_within_layers: The same of random sets with as many neurons in each layer.
        overlap_p: Share of permutations with as much overlap or more.
        rank_correlation: Spearman correlation of the models' scores, in [-1, 1].
        rank_correlation_expected: Its mean over the permutations.
        rank_correlation_p: Share of permutations with as high a correlation or higher.
        overlap_exchanged: Mean overlap of either model's top set with the other's where labels are exchanged; nan where
            no activations were given.
        overlap_exchanged_p: Share of these with as much overlap or more.
    """

    site: str
    models: tuple[str, ...]
    top_fraction: float
    n_permutations: int
    n_neurons: Float[np.ndarray, "model model"]
    overlap: Float[np.ndarray, "model model"]
    overlap_expected: Float[np.ndarray, "model model"]
    overlap_expected_within_layers: Float[np.ndarray, "model model"]
    overlap_p: Float[np.ndarray, "model model"]
    rank_correlation: Float[np.ndarray, "model model"]
    rank_correlation_expected: Float[np.ndarray, "model model"]
    rank_correlation_p: Float[np.ndarray, "model model"]
    overlap_exchanged: Float[np.ndarray, "model model"]
    overlap_exchanged_p: Float[np.ndarray, "model model"]

    def summary(self) -> dict[str, Any]:
        """The whole record as JSON takes it; what could not be computed is null."""
        return with_nulls(self)

    def rows(self) -> list[dict[str, Any]]:
        """One flat line for each two models."""
        names = [name for name in self.__dataclass_fields__ if isinstance(getattr(self, name), np.ndarray)]
        return [
            {"model": a, "other": b} | {name: float(getattr(self, name)[i, j]) for name in names}
            for i, a in enumerate(self.models)
            for j, b in enumerate(self.models[i + 1 :], start=i + 1)
        ]


@dataclass(frozen=True)
class Matrix:
    """One figure for every source task (rows) and target task (columns), with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end of its interval.
        high: Upper end.
        n: Prompts of the target task it comes from.
        n_items: Items that they belong to: what the interval counts.
    """

    value: Float[np.ndarray, "source target"]
    low: Float[np.ndarray, "source target"]
    high: Float[np.ndarray, "source target"]
    n: Int[np.ndarray, "source target"]
    n_items: Int[np.ndarray, "source target"]


@dataclass(frozen=True)
class TaskConsistency:
    """Whether what is found on one task of a mixture holds on another; ``[source, target]`` in every matrix.

    The diagonal is the same task on other items: the most that could be expected beside it.

    Attributes:
        site: Site name.
        tasks: Names of the tasks, in the order of rows and columns.
        n_pairs: By task, pairs in ``select``, ``tune`` and ``test``.
        top_fraction: Share of the site's neurons in a top set.
        rank_correlation: Spearman correlation of rho on the source's ``select`` with rho on the target's ``test``, in
            [-1, 1]; interval: bootstrap by item.
        overlap: Share of the source's top set (``select``) that is in the target's (``test``); interval likewise.
        overlap_expected: That share for random sets of their size.
        overlap_p: Hypergeometric probability of at least this overlap.
        overlap_expected_within_layers: As ``overlap_expected``, for random sets with the same number in each layer.
        overlap_p_within_layers: The probability of at least this overlap then.
        probe: AUROC on the target's ``test`` of a probe trained on the source; interval: bootstrap by item.
        probe_layers: Layer of each source's probe.
        settings: Steering setting of each source, chosen on its own ``tune``.
        steering: By figure (`STEERING_RATES`), the rate on the target's ``test`` with the source's neurons; Wilson
            intervals.
        random_neurons: For ``to_generalization``, ``exact_recall`` and ``memorized_form``, the mean rate of random
            neurons shifted as hard.
        left_out: Tasks that could not be compared, and why.
    """

    site: str
    tasks: tuple[str, ...]
    n_pairs: dict[str, dict[str, int]]
    top_fraction: float
    rank_correlation: Matrix
    overlap: Matrix
    overlap_expected: Float[np.ndarray, "source target"]
    overlap_p: Float[np.ndarray, "source target"]
    overlap_expected_within_layers: Float[np.ndarray, "source target"]
    overlap_p_within_layers: Float[np.ndarray, "source target"]
    probe: Matrix
    probe_layers: tuple[int, ...]
    settings: tuple[SteeringSetting, ...]
    steering: dict[str, Matrix]
    random_neurons: dict[str, Float[np.ndarray, "source target"]]
    left_out: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """The whole record as JSON takes it; what could not be computed is null."""
        return with_nulls(self)

    def rows(self) -> list[dict[str, Any]]:
        """One flat line a source and target."""
        chance = [name for name in self.__dataclass_fields__ if name.startswith("overlap_")]
        flat = {name: getattr(self, name) for name in chance}
        matrices = {"rank_correlation": self.rank_correlation, "overlap": self.overlap, "probe_auroc": self.probe}
        for name, matrix in {**matrices, **self.steering}.items():
            flat |= {name: matrix.value, f"{name}_low": matrix.low, f"{name}_high": matrix.high, f"{name}_n": matrix.n}
        flat |= {f"{name}_random_neurons": matrix for name, matrix in self.random_neurons.items()}
        return [
            {"source": source, "target": target} | {name: with_nulls(matrix[i, j]) for name, matrix in flat.items()}
            for i, source in enumerate(self.tasks)
            for j, target in enumerate(self.tasks)
        ]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TaskConsistency":
        """The record that `summary` made."""
        chance = [name for name in cls.__dataclass_fields__ if name.startswith("overlap_")]
        drawn = {name: np.array(matrix, dtype=float) for name, matrix in value["random_neurons"].items()}
        changed: dict[str, Any] = {
            "settings": tuple(SteeringSetting(**setting) for setting in value["settings"]),
            "steering": {name: _matrix(value["steering"][name]) for name in STEERING_RATES},
            "random_neurons": drawn,
        }
        changed |= {name: np.array(value[name], dtype=float) for name in chance}
        changed |= {name: tuple(value[name]) for name in ("tasks", "probe_layers")}
        changed |= {name: _matrix(value[name]) for name in ("rank_correlation", "overlap", "probe")}
        return cls(**(value | changed))


def _matrix(value: dict[str, Any]) -> Matrix:
    figures = {name: np.array(value[name], dtype=float) for name in ("value", "low", "high")}
    return Matrix(**figures, n=np.array(value["n"]), n_items=np.array(value["n_items"]))

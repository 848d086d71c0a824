"""What `memgen_lens.method_benchmark` measures: how well each way to score neurons finds those that recall.

Records hold plain values, and can be written as JSON and read back. They do not measure.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import record_read, write_record

FILE = "methods.json"
Kind = Literal["planted", "distributed", "ordinary"]
FEW = 0.05
"""Share of a site's neurons that counts as few."""
CONTROLS = ("activation_std", "random")
"""Orders that know nothing of the behaviours: by the spread of a neuron's activation over both prompts of all pairs,
which is what large neurons alone would get, and at random."""
FIGURES = ("average_precision", "precision", "area", "removed_by_few", "kept_by_few", "steered", "seconds", "memory_mb")


@dataclass(frozen=True)
class MethodResult:
    """What one method says of one model, and what comes of it.

    Attributes:
        method: Name, or one of `CONTROLS`.
        n_pairs: Pairs that it was given (exact methods: fewer).
        seconds: Time of the call, activations and answers included, without permutation test.
        memory_mb: How far the memory of the process grew during the call at most, in MB; None where nobody can tell.
        average_precision: Of its order against the planted neurons, in [0, 1]; None where none were planted.
        precision: Share of planted neurons among its first, as many as were planted; which then is the recall, too.
        removed: For each count of the model, share of recall lost where as many of its first neurons are zero.
        kept: For each count, share of held-out accuracy left then.
        area: Mean over the counts of ``removed - (1 - kept)``, in [-1, 1].
        area_tune: The same on ``tune`` and validation prompts: what the best method is chosen by.
        steered: Share of recalled prompts that give the rule's answer, its first 5 % of neurons shifted by a shift of
            one norm for all methods.
        norm: That norm in multiples of the norm of all neurons' NMD, chosen on ``tune``.
    """

    method: str
    n_pairs: int
    seconds: float
    memory_mb: float | None
    average_precision: float | None
    precision: float | None
    removed: tuple[float, ...]
    kept: tuple[float, ...]
    area: float
    area_tune: float
    steered: float
    norm: float


@dataclass(frozen=True)
class ModelResult:
    """All methods on one model.

    Attributes:
        name: The run.
        kind: Whether recall was planted in chosen neurons, spread over all, or neither.
        task: Name of its task.
        seed: Seed of its training.
        site: Site whose neurons were scored.
        n_neurons: Neurons of the site, over all layers.
        n_planted: Planted neurons.
        recall: Share of recalled ``test`` prompts before anything is zeroed: 1, or what rounding leaves.
        heldout: Share of held-out prompts answered by the rule then.
        n: Recalled ``test`` prompts.
        n_items: Items that they belong to.
        n_heldout: Held-out prompts.
        counts: Numbers of neurons that are zeroed together, rising.
        results: One a method.
        best: The method with the largest ``area_tune``, controls aside.
        random_removed: For each count of at most 5 % of the neurons, the mean share of recall that random sets lose
            which have as many neurons in each layer as the best method's first.
        random_removed_high: The 97.5th percentile over these sets.
        n_random: How many sets.
        agreement: Spearman's correlation of the strength that each two methods give to the neurons, in the order of
            ``results``, controls left out.
        n_sufficient: Neurons whose zeroing ends recall by the rule of `verdict`; None where there is no such number.
    """

    name: str
    kind: Kind
    task: str
    seed: int
    site: str
    n_neurons: int
    n_planted: int
    recall: float
    heldout: float
    n: int
    n_items: int
    n_heldout: int
    counts: tuple[int, ...]
    results: tuple[MethodResult, ...]
    best: str
    random_removed: tuple[float, ...]
    random_removed_high: tuple[float, ...]
    n_random: int
    agreement: tuple[tuple[float, ...], ...]
    n_sufficient: int | None

    @property
    def verdict(self) -> Literal["localized", "distributed"]:
        """``"localized"``: few neurons suffice.

        That is: zeroing some number of the best method's first neurons, at most 5 % of all, loses at least 90 % of
        recall and at most 10 % of held-out accuracy, while at most 1 of 40 random sets with as many neurons in each
        layer loses more than half of recall. The method is chosen on ``tune``, the numbers are of ``test``.
        """
        return "distributed" if self.n_sufficient is None else "localized"

    @property
    def few(self) -> int:
        """Place in ``counts`` of 5 % of the neurons."""
        return int(np.argmin(np.abs(np.array(self.counts) - FEW * self.n_neurons)))

    def figures(self, result: MethodResult) -> dict[str, float]:
        """One method's figures by name (`FIGURES`), those that there are."""
        values = {name: getattr(result, name) for name in FIGURES if hasattr(result, name)}
        values |= {"removed_by_few": result.removed[self.few], "kept_by_few": result.kept[self.few]}
        return {name: values[name] for name in FIGURES if values[name] is not None}


@dataclass(frozen=True)
class MethodsBenchmark:
    """All methods on several models.

    Attributes:
        models: One result a model.
    """

    models: tuple[ModelResult, ...]

    def summary(self) -> list[dict[str, Any]]:
        """One row a kind of model, task and method: the mean of each figure over models, and its range.

        A row has ``kind``, ``task``, ``method``, ``n_models`` and, by figure (`FIGURES`), ``{"mean", "low", "high"}``:
        over few seeds the lowest and the highest say more than an interval would. Figures that no model has are left
        out.
        """
        rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
        for model in self.models:
            for result in model.results:
                rows.setdefault((model.kind, model.task, result.method), []).append(model.figures(result))
        return [
            {"kind": kind, "task": task, "method": method, "n_models": len(found)}
            | {
                name: {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
                for name in FIGURES
                if (values := [figures[name] for figures in found if name in figures])
            }
            for (kind, task, method), found in rows.items()
        ]

    @arguments(directory=kinds.place("MethodsBenchmark.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``methods.json`` into a directory and return its path.

        Raises:
            RunDirectoryError: The file cannot be written.
        """
        return write_record(Path(directory) / FILE, self)

    @classmethod
    @arguments(path=kinds.place("MethodsBenchmark.load"))
    def load(cls, path: str | Path) -> "MethodsBenchmark":
        """Read what `save` wrote: the file, or the directory that holds it.

        Raises:
            RunDirectoryError: The file is missing or damaged.
        """
        with record_read(path, FILE) as value:
            return cls(tuple(_model(model) for model in value["models"]))


def _model(value: dict[str, Any]) -> ModelResult:
    results = tuple(
        MethodResult(**result | {name: tuple(result[name]) for name in ("removed", "kept")})
        for result in value["results"]
    )
    changed: dict[str, Any] = {name: tuple(value[name]) for name in ("counts", "random_removed", "random_removed_high")}
    changed["agreement"] = tuple(tuple(np.nan if r is None else r for r in row) for row in value["agreement"])
    changed["results"] = results
    return ModelResult(**(value | changed))

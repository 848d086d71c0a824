"""What the stages hand each other and save: measurements, activations, scores, probes, steering.

Records are frozen and hold plain values and numpy arrays, so that what is saved can be read, drawn and
reported without torch. They do not compute: the stages do.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError, SiteError, suggest
from memgen_lens.core.files import counts_rows, damaged, read_arrays, write_arrays
from memgen_lens.core.layer_probe import LayerProbe
from memgen_lens.core.pairs import PromptPairs


@dataclass(frozen=True)
class Evaluation:
    """One line of ``history.jsonl``: both behaviours at one step of training.

    Attributes:
        step: Optimizer steps done.
        tokens: Tokens seen, padding not counted.
        loss: Mean cross-entropy (nats a labelled token) over the steps since the line before.
        generalization: Share of validation prompts answered by the rule.
        memorization: Share of memorized prompts recalled exactly.
        rephrased_generalization: Share of rephrased memorized prompts answered by the rule.
        seconds: Training time so far, measurements included.
    """

    step: int
    tokens: int
    loss: float
    generalization: float
    memorization: float
    rephrased_generalization: float
    seconds: float


@dataclass(frozen=True)
class SiteActivations:
    """Activations of one site at the answer position, both sides of every pair.

    Attributes:
        memorized: float32 ``[pair, layer, neuron]`` on the recalling side.
        generalized: float32 ``[pair, layer, neuron]`` on the computing side.
    """

    memorized: Float[np.ndarray, "pair layer neuron"]
    generalized: Float[np.ndarray, "pair layer neuron"]

    def take(self, index: Int[np.ndarray, " index"]) -> "SiteActivations":
        """The pairs at ``index``, in that order."""
        return SiteActivations(self.memorized[index], self.generalized[index])


@dataclass(frozen=True)
class Activations:
    """What `record` kept: the sites asked for, and what the probes' baselines need.

    Attributes:
        sites: Activations by site name.
        pairs: The pairs they belong to.
        embedding: The token (and position) embedding at the answer position, one layer.
        tokens: Token ids of both prompts of each pair, right-padded with -1: ``[2 * pair, pos]``,
            all memorized prompts first.
    """

    sites: dict[str, SiteActivations]
    pairs: PromptPairs
    embedding: SiteActivations
    tokens: Int[np.ndarray, "prompt pos"]

    def site(self, name: str) -> SiteActivations:
        """Activations of one site.

        Raises:
            SiteError: The site was not recorded.
        """
        if name not in self.sites:
            raise SiteError(
                f"activations of site {name!r}",
                expected=f"a recorded site ({', '.join(self.sites)})",
                received=repr(name),
                fix=f"{suggest(name, self.sites)} Or record it: record(model, pairs, sites=[{name!r}]).",
            )
        return self.sites[name]

    def of_task(self, name: str) -> "Activations":
        """The activations of one task of a mixture; the scores and probes made of them are that task's.

        Raises:
            PairsError: No item of that task was asked.
        """
        pairs = self.pairs.of_task(name)
        mine = np.flatnonzero([item.task == name for item in self.pairs.memorized])
        return Activations(
            sites={site: acts.take(mine) for site, acts in self.sites.items()},
            pairs=pairs,
            embedding=self.embedding.take(mine),
            tokens=self.tokens[np.concatenate([mine, mine + len(self.pairs)])],
        )


@dataclass(frozen=True)
class NeuronScores:
    """How each neuron of one site differs between the behaviours; positive = towards memorization.

    Attributes:
        site: Site name.
        nmd: Mean over pairs of ``h_mem - h_gen``, in units of the activation.
        rho: Pearson correlation of the activation with the label, in [-1, 1]; 0 for a constant neuron.
        p: Two-sided paired sign-flip permutation p-value, in (0, 1].
        p_family: The same with the maximum over all neurons as reference (family-wise), in (0, 1].
        q: Benjamini-Hochberg adjusted ``p``, in (0, 1].
        n_pairs: Pairs the scores come from.
        n_items: Items that these pairs belong to: what the test counts.
        method: What ``score`` is; see `memgen_lens.attribute`.
        score: What neurons are ranked by, by its size; rho where none is given.
        ci95: Low and high end of the 95 % bootstrap interval of ``score``, items resampled; None where none was asked
            for.
    """

    site: str
    nmd: Float[np.ndarray, "layer neuron"]
    rho: Float[np.ndarray, "layer neuron"]
    p: Float[np.ndarray, "layer neuron"]
    p_family: Float[np.ndarray, "layer neuron"]
    q: Float[np.ndarray, "layer neuron"]
    n_pairs: int
    n_items: int
    method: str = "pearson"
    score: Float[np.ndarray, "layer neuron"] = None  # pyright: ignore[reportAssignmentType]  # filled in at once
    ci95: Float[np.ndarray, "2 layer neuron"] | None = None

    def __post_init__(self) -> None:
        if self.score is None:
            object.__setattr__(self, "score", self.rho)

    @arguments(directory=kinds.place("NeuronScores.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``SITE.safetensors`` into a directory and return its path."""
        path = Path(directory) / f"{self.site}.safetensors"
        arrays = {name: getattr(self, name) for name in ("nmd", "rho", "p", "p_family", "q", "score")}
        counts = {"n_pairs": np.array([self.n_pairs]), "n_items": np.array([self.n_items])}
        arrays |= {} if self.ci95 is None else {"ci95": self.ci95}
        write_arrays(path, arrays | counts | {"method": np.frombuffer(self.method.encode(), dtype=np.uint8)})
        return path

    @classmethod
    @arguments(path=kinds.place("NeuronScores.load"))
    def load(cls, path: str | Path) -> "NeuronScores":
        """Read what `save` wrote.

        Raises:
            RunDirectoryError: The file is missing or damaged, or of an earlier version, whose p-values took the pairs
                of one item for independent.
        """
        path = Path(path)
        arrays = read_arrays(path)
        wanted = {"nmd", "rho", "p", "p_family", "q", "n_pairs", "n_items"}
        if set(arrays) == wanted - {"n_items"}:
            raise counts_rows(path, "p-values")
        ranked: dict[str, Any] = {"ci95": arrays.pop("ci95")} if "ci95" in arrays else {}
        if {"method", "score"} <= set(arrays):  # files of before have neither: their neurons were ranked by rho
            ranked |= {"method": bytes(arrays.pop("method")).decode(), "score": arrays.pop("score")}
        if set(arrays) != wanted or any(arrays[name].shape != (1,) for name in ("n_pairs", "n_items")):
            raise damaged(path, f"arrays {', '.join(sorted(arrays))} in place of {', '.join(sorted(wanted))}")
        if "ci95" in ranked and ranked["ci95"].shape != (2, *arrays["nmd"].shape):
            raise damaged(path, f"ci95 of shape {ranked['ci95'].shape} beside nmd of {arrays['nmd'].shape}")
        n_pairs, n_items = (int(arrays.pop(name)[0]) for name in ("n_pairs", "n_items"))
        return cls(site=path.name.removesuffix(".safetensors"), n_pairs=n_pairs, n_items=n_items, **arrays, **ranked)


@dataclass(frozen=True)
class ProbeScores:
    """How well one probe tells the behaviours apart on the test pairs.

    Attributes:
        auroc: Area under the ROC curve in [0, 1].
        auroc_ci95: 95 % bootstrap interval, resampled by item.
        accuracy: Share of test prompts classified correctly.
        accuracy_ci95: Likewise.
    """

    auroc: float
    auroc_ci95: tuple[float, float]
    accuracy: float
    accuracy_ci95: tuple[float, float]


@dataclass(frozen=True)
class ProbeReport:
    """Probes of one site, layer by layer, beside their baselines.

    Attributes:
        site: Site name.
        by_layer: Test scores of each layer's probe.
        cv_auroc_by_layer: Out-of-fold AUROC on ``select`` and ``tune``, folds grouped by item; picks ``best_layer``.
        best_layer: The layer with the largest cross-validated AUROC.
        input_only: The same probe on the prompt alone: token counts and positional one-hots.
        shuffled: The best layer's probe fitted on training labels swapped at random, those of an item together; mean of
            its repeats.
        embedding: The same probe on the embedding at the answer position.
        learning_curve: ``{"n_pairs", "auroc"}`` of the best layer's probe fitted on fewer pairs.
        n_train: Pairs the probes were fitted on.
        n_test: Pairs they were tested on.
        n_train_items: Items that the former belong to.
        n_test_items: Items that the latter belong to: what the intervals count.
        probes: The fitted scikit-learn pipelines, one a layer (not saved).
    """

    site: str
    by_layer: tuple[ProbeScores, ...]
    cv_auroc_by_layer: tuple[float, ...]
    best_layer: int
    input_only: ProbeScores
    shuffled: dict[str, Any]
    embedding: ProbeScores
    learning_curve: tuple[dict[str, float], ...]
    n_train: int
    n_test: int
    n_train_items: int
    n_test_items: int
    probes: tuple[Any, ...] = field(repr=False, compare=False)

    @property
    def best(self) -> ProbeScores:
        """Test scores of the chosen layer."""
        return self.by_layer[self.best_layer]

    @arguments("ProbeReport.at", layer=kinds.Number0 | None)
    def at(self, layer: int | None = None) -> LayerProbe:
        """A layer's probe as plain numbers: what `memgen_lens.Guard` decides by.

        Args:
            layer: Its layer; default: the best one.

        Raises:
            SettingsError: The site has no such layer, or the report was read from a file, which holds no probes.
        """
        layer = self.best_layer if layer is None else layer
        if layer >= len(self.probes):
            raise SettingsError(
                "ProbeReport.at(layer=...)",
                expected=f"a layer of {self.site}, 0 to {len(self.by_layer) - 1}, of a report that holds its probes",
                received=f"layer {layer} of {len(self.probes)} fitted probes",
                fix="Change layer, or fit the probes: fit_probes(acts, site).",
            )
        return LayerProbe.of(self.probes[layer], self.site, layer)

    def summary(self) -> dict[str, Any]:
        """Everything but the fitted probes, for ``probes.json``."""
        names = [name for name in self.__dataclass_fields__ if name != "probes"]
        return {name: getattr(self, name) for name in names}

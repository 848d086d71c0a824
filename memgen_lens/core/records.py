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
from memgen_lens.core.errors import SiteError, suggest
from memgen_lens.core.files import counts_rows, damaged, read_arrays, write_arrays
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import Direction, Mode, Positions


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
    """

    site: str
    nmd: Float[np.ndarray, "layer neuron"]
    rho: Float[np.ndarray, "layer neuron"]
    p: Float[np.ndarray, "layer neuron"]
    p_family: Float[np.ndarray, "layer neuron"]
    q: Float[np.ndarray, "layer neuron"]
    n_pairs: int
    n_items: int

    @arguments(directory=kinds.place("NeuronScores.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``SITE.safetensors`` into a directory and return its path."""
        path = Path(directory) / f"{self.site}.safetensors"
        arrays = {name: getattr(self, name) for name in ("nmd", "rho", "p", "p_family", "q")}
        write_arrays(path, arrays | {"n_pairs": np.array([self.n_pairs]), "n_items": np.array([self.n_items])})
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
        if set(arrays) != wanted or any(arrays[name].shape != (1,) for name in ("n_pairs", "n_items")):
            raise damaged(path, f"arrays {', '.join(sorted(arrays))} in place of {', '.join(sorted(wanted))}")
        n_pairs, n_items = (int(arrays.pop(name)[0]) for name in ("n_pairs", "n_items"))
        return cls(site=path.name.removesuffix(".safetensors"), n_pairs=n_pairs, n_items=n_items, **arrays)


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

    def summary(self) -> dict[str, Any]:
        """Everything but the fitted probes, for ``probes.json``."""
        names = [name for name in self.__dataclass_fields__ if name != "probes"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SteeringSetting:
    """One way to steer: which neurons, how hard, where.

    Attributes:
        site: Site whose neurons are changed.
        top_fraction: Share of the site's neurons, by largest abs(rho), in (0, 1].
        alpha: Multiple of abs(nmd), or of the change that a fitted rule predicts; None in patch mode.
        positions: See `memgen_lens.core.types.Positions`.
        mode: ``"shift"`` (the paper's), ``"patch"``, or the kind of the rule fitted on the ``select`` pairs:
            ``"clusters"`` or ``"low_rank"``.
        size: Of a fitted rule, the number of its clusters or its rank; else None.
    """

    site: str
    top_fraction: float
    alpha: float | None
    positions: Positions
    mode: Mode = "shift"
    size: int | None = None


@dataclass(frozen=True)
class SteeringRates:
    """What steering one side of the pairs towards the other behaviour does.

    Attributes:
        toward: The behaviour steered towards; the prompts are those that show the other one unsteered.
        n: Prompts.
        n_items: Items that they belong to: what the intervals count.
        shift: ``{"rate", "ci95"}``: share that now give the answer of ``toward``: the rule's (towards
            generalization), or the item's own memorized one (towards memorization: exact recall).
        memorized_form: Share whose output has the form of a memorized answer, its own or not.
        stayed: Share that still give the answer they gave unsteered.
        other: Share that give neither answer.
        controls: By control, ``{"mean", "ci95", "n_draws", "memorized_form": {...}, "overlap"}`` over draws, where
            ``overlap`` is the share of the selected neurons that the control changes too; or
            ``{"mean": None, "why": ...}``.
        examples: A few prompts with their outputs before and after.
    """

    toward: Direction
    n: int
    n_items: int
    shift: dict[str, Any]
    memorized_form: dict[str, Any]
    stayed: dict[str, Any]
    other: dict[str, Any]
    controls: dict[str, dict[str, Any]]
    examples: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class SideEffects:
    """What steering does to held-out generic prompts, which it is not meant to change.

    Attributes:
        n: Held-out prompts.
        heldout_generalization: Share answered by the rule, unsteered.
        heldout_generalization_steered: The same, steered towards generalization.
        heldout_generalization_steered_to_memorization: The same, steered towards memorization.
        kl_nats: Mean KL divergence (nats) of the steered (towards generalization) from the unsteered
            next-token distribution at the answer position.
        why: Why the figures are None, where they are.
    """

    n: int
    heldout_generalization: float | None
    heldout_generalization_steered: float | None
    heldout_generalization_steered_to_memorization: float | None
    kl_nats: float | None
    why: str | None = None


@dataclass(frozen=True)
class SteeringTable:
    """Steering both ways on the test pairs, beside its controls and side effects.

    Attributes:
        setting: How it was steered.
        n_neurons_by_layer: Neurons that were changed.
        to_generalization: What it does to recalling prompts.
        to_memorization: What it does to computing prompts.
        side_effects: What it does to held-out prompts.
        predicted: Of a fitted rule, by direction, for each layer that is steered ``{"layer", "closed",
            "closed_by_one_shift"}``: which share of the squared distance from a prompt's activation to its partner's,
            on the selected neurons, what is added at alpha 1 closes for items that it was not fitted on, beside what
            one shift for all closes; at most 1, and below 0 where it leads away. None where nothing is fitted.
    """

    setting: SteeringSetting
    n_neurons_by_layer: tuple[int, ...]
    to_generalization: SteeringRates
    to_memorization: SteeringRates
    side_effects: SideEffects
    predicted: dict[str, list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class SweepRow:
    """One setting of a steering sweep and its rates on the prompts it was swept on.

    Attributes:
        setting: The setting.
        layers: Layers it was restricted to; None = all (of a fitted rule: the one layer that it chooses).
        n: Pairs.
        n_items: Items that they belong to.
        to_generalization: Share of recalling prompts that now generalize.
        to_generalization_other: Share of them that now do neither.
        to_memorization: Share of computing prompts that now recall exactly.
        memorized_form: Share of computing prompts whose output now has the form of a memorized answer.
        to_memorization_other: Share of computing prompts whose output is neither the rule's nor of memorized form.
    """

    setting: SteeringSetting
    layers: tuple[int, ...] | None
    n: int
    n_items: int
    to_generalization: float
    to_generalization_other: float
    to_memorization: float
    memorized_form: float
    to_memorization_other: float

    @property
    def gain(self) -> float:
        """Shift rate minus the rate of other outputs, summed over both directions, in [-2, 2]; what is maximized."""
        return self.gain_toward("generalization") + self.gain_toward("memorization")

    def gain_toward(self, toward: Direction) -> float:
        """The same in one direction, in [-1, 1]."""
        if toward == "generalization":
            return self.to_generalization - self.to_generalization_other
        return self.memorized_form - self.to_memorization_other

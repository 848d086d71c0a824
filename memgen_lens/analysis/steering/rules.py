"""Fit what is added to a row given its activation, layer by layer, on the ``select`` pairs alone.

One shift for all prompts is weak where memory and rule share one form and nothing tells them apart: what separates the
two is then another thing for each item. Does not know models (see `steering`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import GroupKFold

from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.analysis.steering.fitted import RIDGES, Clusters, LowRank, RowRule, weights
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.records import Activations, SiteActivations
from memgen_lens.core.types import Direction, FittedKind

N_FOLDS = 5
DEFAULT_SIZE: dict[FittedKind, int] = {"clusters": 8, "low_rank": 4}
"""Clusters, or rank."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


class LayerFit:
    """The rule of one layer towards one behaviour, and how well it does on items that it has not seen.

    Folds are grouped by item; the ridge of a low-rank map is the one with the smallest error in them.

    Args:
        own: Activations of the side that is steered, one row a pair.
        other: Those of its partners.
        items: The item of each pair, of at least two.
        kind: See `memgen_lens.Steering.from_activations`.
        size: Clusters, or rank.
        seed: Seed of k-means.

    Attributes:
        rule_: The rule, fitted on all rows.
    """

    def __init__(
        self,
        own: Float[np.ndarray, "row neuron"],
        other: Float[np.ndarray, "row neuron"],
        items: Int[np.ndarray, " row"],
        *,
        kind: FittedKind,
        size: int,
        seed: int,
    ) -> None:
        self._own, self._other = own, other
        self._items, self._kind, self._size, self._seed = items, kind, size, seed
        self._way = 0
        if kind == "low_rank":
            scale = np.square(weights(self._change(), np.abs(own).max()))
            self._way = int(np.argmin(self._errors[:-1] @ scale))
        self.rule_ = self._read(slice(None)).rule(self._change(), *self._ways[self._way])

    def refitted(self, partner: Int[np.ndarray, " row"]) -> RowRule:
        """The rule for other partners: row r learns the change to ``other[partner[r]]``; clusters and ridge stay."""
        return self._reader.rule(self._change(partner), *self._ways[self._way])

    def closed(self, neurons: Any) -> tuple[float, float]:
        """Share of the squared distance to the partner that is closed on unseen items, by the rule and by one shift.

        Each neuron's distance is measured in standard deviations of its activation, over both sides; where there is
        no distance, 0 is closed.

        Args:
            neurons: Which neurons count, as a mask.
        """
        both = np.concatenate([self._own, self._other]).astype(np.float64)
        scale = np.square(weights(both, np.abs(both).max()))[neurons]
        distance = np.square(self._change()).sum(0)[neurons] @ scale
        if not distance > 0:
            return 0.0, 0.0
        by_rule, by_shift = (1 - self._errors[way][neurons] @ scale / distance for way in (self._way, -1))
        return float(by_rule), float(by_shift)

    @cached_property
    def _errors(self) -> Float[np.ndarray, "way neuron"]:
        """Sum of squared errors on held-out items: of each ridge, or of the clusters; last that of the mean change."""
        errors, change = np.zeros((len(self._ways) + 1, self._own.shape[1])), self._change()
        for train, held_out in _folds(self._items):
            reader, unseen = self._read(train), self._own[held_out].astype(np.float64)
            for way, how in enumerate(self._ways):
                errors[way] += np.square(reader.rule(change[train], *how)(unseen) - change[held_out]).sum(0)
            errors[-1] += np.square(change[train].mean(0) - change[held_out]).sum(0)
        return errors

    @property
    def _ways(self) -> list[tuple[float, ...]]:
        """What a rule may be made with beside the changes: of a low-rank map each ridge, of clusters nothing."""
        return [(float(ridge),) for ridge in RIDGES] if self._kind == "low_rank" else [()]

    @cached_property
    def _reader(self) -> Any:
        return self._read(slice(None))

    def _read(self, rows: Any) -> Any:
        """What is known of these rows' own activations."""
        own = self._own[rows].astype(np.float64)
        return Clusters(own, self._size, self._seed) if self._kind == "clusters" else LowRank(own, self._size)

    def _change(self, partner: Any = slice(None)) -> Float[np.ndarray, "row neuron"]:
        return self._other[partner].astype(np.float64) - self._own


class SiteFits:
    """The rules of one site; each layer and direction is fitted once, when it is first asked for.

    Args:
        acts: Recorded activations, of which the ``select`` pairs are used.
        site: One of their sites.
        kind: See `memgen_lens.Steering.from_activations`.
        size: Clusters, or rank.
        seed: Seed of k-means.
        call: The call that refuses.

    Attributes:
        recorded: Activations of the ``select`` pairs.
        items: The item of each of them.
        shape: Layers and neurons.

    Raises:
        PairsError: ``select`` holds fewer than 8 pairs, or one item only.
        SettingsError: There are more clusters than items, or a larger rank than items or neurons.
        SiteError: The site was not recorded.
        ModelError: An activation is not finite.
    """

    def __init__(self, acts: Activations, site: str, *, kind: FittedKind, size: int, seed: int, call: str) -> None:
        recorded, index = acts.site(site), acts.pairs.of("select")
        self._set(recorded.take(index), acts.pairs.item[index], kind, size, seed)
        require_finite(call, site, [self.recorded.memorized, self.recorded.generalized], acts.pairs.take(index))
        n_items, n_neurons = len(np.unique(self.items)), self.shape[1]
        if n_items < 2:
            raise PairsError(
                call,
                expected="select pairs of at least 2 items, whose rules can be tried on one another",
                received=f"{n_items}",
                fix="Give pairs of more items.",
            )
        most, of = (n_items, "items") if kind == "clusters" else min((n_items, "items"), (n_neurons, "neurons"))
        if size > most:
            name = "n_clusters" if kind == "clusters" else "rank"
            raise SettingsError(
                f"{call}({name}=...)",
                expected=f"at most {most}, the {of} that there are{' in select' if of == 'items' else ''}",
                received=str(size),
                fix=f"Lower {name}.",
            )

    @classmethod
    def again(
        cls, recorded: SiteActivations, items: Int[np.ndarray, " row"], *, kind: FittedKind, size: int, seed: int
    ) -> "SiteFits":
        """The fits of rows that were fitted on before: the select pairs' activations, and the item of each."""
        fits = cls.__new__(cls)
        fits._set(recorded, items, kind, size, seed)
        return fits

    def _set(
        self, recorded: SiteActivations, items: Int[np.ndarray, " row"], kind: FittedKind, size: int, seed: int
    ) -> None:
        self.recorded, self.items, self.shape = recorded, items, recorded.memorized.shape[1:]
        self.kind: FittedKind = kind
        self.size, self.seed = size, seed
        self._fits: dict[tuple[Direction, int], LayerFit] = {}

    def of(self, toward: Direction, layer: int) -> LayerFit:
        """The fit of one layer towards one behaviour: on the activations of the side that shows the other one."""
        if (toward, layer) not in self._fits:
            own, other = self.recorded.memorized[:, layer], self.recorded.generalized[:, layer]
            own, other = (own, other) if toward == "generalization" else (other, own)
            how: Any = {"kind": self.kind, "size": self.size, "seed": self.seed}
            self._fits[toward, layer] = LayerFit(own, other, self.items, **how)
        return self._fits[toward, layer]

    def other_partners(self, rng: np.random.Generator) -> Int[np.ndarray, " pair"]:
        """For each pair the pair of another item, items in a random circle: no item keeps its own partners."""
        items = rng.permutation(np.unique(self.items))
        next_of = dict(zip(items.tolist(), np.roll(items, -1).tolist(), strict=True))
        pairs_of = {item: rng.permutation(np.flatnonzero(self.items == item)) for item in items.tolist()}
        taken = dict.fromkeys(next_of, 0)
        partner = np.empty(len(self.items), dtype=np.int64)
        for row, item in enumerate(self.items.tolist()):
            there = pairs_of[next_of[item]]
            partner[row] = there[taken[item] % len(there)]
            taken[item] += 1
        return partner


@dataclass(frozen=True)
class Rules:
    """What a steering adds to each row, given the row.

    Attributes:
        fits: What the rules were fitted on.
        towards: By direction, the rule of each layer; None where no neuron is steered.
        gain: What is multiplied with a rule's output before it is added: alpha on the selected neurons, 0 elsewhere.
        taken_from: The neuron of the output that is written to each neuron: its own, unless this is a control.
    """

    fits: SiteFits
    towards: dict[Direction, tuple[RowRule | None, ...]]
    gain: Float[np.ndarray, "layer neuron"]
    taken_from: Int[np.ndarray, "layer neuron"]

    @classmethod
    def of(cls, fits: SiteFits, selected: Bool[np.ndarray, "layer neuron"], alpha: float) -> "Rules":
        """The fitted rules on these neurons."""

        def rule(toward: Direction, layer: int) -> RowRule | None:
            return fits.of(toward, layer).rule_ if selected[layer].any() else None

        n_layers, n_neurons = selected.shape
        towards: dict[Direction, Any] = {
            toward: tuple(rule(toward, layer) for layer in range(n_layers)) for toward in DIRECTIONS
        }
        return cls(fits, towards, alpha * selected, np.tile(np.arange(n_neurons), (n_layers, 1)))

    def shuffled(self, rng: np.random.Generator) -> "Rules":
        """The rules fitted on the same pairs with the partners of other items."""
        partner = self.fits.other_partners(rng)
        towards: dict[Direction, tuple[RowRule | None, ...]] = {
            toward: tuple(
                None if rule is None else self.fits.of(toward, layer).refitted(partner)
                for layer, rule in enumerate(rules)
            )
            for toward, rules in self.towards.items()
        }
        return replace(self, towards=towards)

    def predicted(self, selected: Bool[np.ndarray, "layer neuron"]) -> dict[str, list[dict[str, Any]]]:
        """How well the rules do on items that they have not seen (`SteeringTable.predicted`)."""
        return {
            str(toward): [
                {"layer": layer, "closed": closed[0], "closed_by_one_shift": closed[1]}
                for layer in np.flatnonzero(selected.any(1)).tolist()
                for closed in [self.fits.of(toward, layer).closed(selected[layer])]
            ]
            for toward in DIRECTIONS
        }


def best_predicted(fits: SiteFits, selected: Bool[np.ndarray, "layer neuron"]) -> int:
    """The layer in which the rules close the most, both ways together, on items that they have not seen.

    The most: the share that is closed (`LayerFit.closed`) times the number of selected neurons. Where few neurons tell
    the behaviours apart, as in the first layers, little is gained by closing all that parts them.
    """

    def gain(layer: int) -> float:
        return float(selected[layer].sum()) * sum(fits.of(d, layer).closed(selected[layer])[0] for d in DIRECTIONS)

    return max(np.flatnonzero(selected.any(1)).tolist(), key=gain)


def _folds(items: Int[np.ndarray, " row"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training and held-out rows; all rows of an item in one fold."""
    n_items = len(np.unique(items))
    yield from GroupKFold(min(N_FOLDS, n_items)).split(items, groups=items)

"""Make a steering of one vector a layer: given, the mean difference, or a row of an autoencoder's decoder.

Does not know scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from memgen_lens.analysis.steering.directions import Vectors, decoder_row, placed
from memgen_lens.analysis.steering.intervention import Intervention
from memgen_lens.analysis.steering.values import select_means
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import Activations
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Direction, Positions

DIRECTION = {"alpha": kinds.Positive, "points_to": kinds.DirectionName, "positions": kinds.PositionsName | None}
Kind = TypeVar("Kind", bound="ByDirection")


@dataclass(frozen=True)
class ByDirection(Intervention):
    """What a steering can be made of beside scores: vectors. See `memgen_lens.Steering`."""

    @classmethod
    @arguments("Steering.from_direction", vectors=Vectors, site=kinds.Text, layers=kinds.Layers | None, **DIRECTION)
    def from_direction(
        cls: type[Kind],
        vectors: Any,
        *,
        site: str,
        layers: int | Sequence[int] | None = None,
        alpha: float = 1.0,
        points_to: Direction = "memorization",
        positions: Positions | None = None,
    ) -> Kind:
        """Add a vector to a site, or one in each of several layers, as it is: ``h + s * alpha * v``.

        Args:
            vectors: ``[neuron]``, the same in all ``layers``, or ``[layer, neuron]``, one for each; an array or tensor.
            site: A short name with ``layers``, or one hook point (``"blocks.3.hook_resid_post"``).
            layers: Where, counted from 0.
            alpha: Multiple, above 0.
            points_to: The behaviour that the vector points to: towards it it is added, towards the other taken away.
            positions: See `memgen_lens.Steering.from_scores`.

        Raises:
            SettingsError: A value is out of range, or vectors and layers do not belong together.
        """
        return _added(cls, vectors, site, layers, alpha, points_to, positions, "a direction", "from_direction")

    @classmethod
    @arguments(
        "Steering.from_mean_difference",
        acts=kinds.one(Activations),
        site=kinds.Text,
        layers=kinds.Layers | None,
        alpha=kinds.Positive,
        positions=kinds.PositionsName | None,
    )
    def from_mean_difference(
        cls: type[Kind],
        acts: Activations,
        site: str,
        *,
        layers: int | Sequence[int] | None = None,
        alpha: float = 1.0,
        positions: Positions | None = None,
    ) -> Kind:
        """Add the mean over the ``select`` pairs of ``h_mem - h_gen``, all of it, in each layer.

        At alpha 1 the mean of one side becomes that of the other (Rimsky et al., arXiv 2312.06681, who steer one layer,
        at all positions behind the prompt). It is a shift of all neurons whose sign is that of nmd, not of rho.

        Args:
            acts: Recorded activations of that site.
            site: Site name.
            layers: This layer or these; None = all in which the sides differ, each of which adds its own to what
                those below have added.
            alpha: Multiple, above 0.
            positions: See `memgen_lens.Steering.from_scores`.

        Raises:
            SettingsError: A layer that was not recorded, or without a difference.
            SiteError: The site was not recorded.
            PairsError: ``select`` holds fewer than 8 pairs.
            ModelError: An activation is not finite.
        """
        call = "from_mean_difference"
        memorized, generalized = select_means(acts, site, call=f"Steering.{call}")
        difference, n_layers = memorized - generalized, len(memorized)
        # What enters the first block is often the same on both sides: there is nothing to add.
        differs = np.flatnonzero(difference.any(1))
        places = differs if layers is None else np.unique(np.asarray(layers, dtype=np.int64))
        useless = [place for place in places.tolist() if place not in differs]
        if useless or not len(places):
            raise SettingsError(
                f"Steering.{call}(layers=...)",
                expected=f"layers of {site!r}, 0 to {n_layers - 1}, in which the sides differ",
                received=str(useless[0]) if useless else "none",
                fix="Change layers.",
            )
        many = None if n_layers == 1 else places.tolist()
        chosen = "the mean difference"
        return _added(cls, difference[places], site, many, alpha, "memorization", positions, chosen, call)

    @classmethod
    @arguments("Steering.from_sae", feature=kinds.Number0, **DIRECTION)
    def from_sae(
        cls: type[Kind],
        sae: Any,
        feature: int,
        *,
        alpha: float = 1.0,
        points_to: Direction = "memorization",
        positions: Positions | None = None,
    ) -> Kind:
        """Add what a feature of a sparse autoencoder writes: its decoder's row, where the autoencoder was trained.

        Args:
            sae: A SAELens object as it is (``SAE.from_pretrained(...)``); of it ``W_dec`` and
                ``cfg.metadata.hook_name`` are read, or ``cfg.hook_name`` of versions before 6. Whatever else has these
                does too.
            feature: Which, counted from 0.
            alpha: Multiple of the row, which most autoencoders keep at norm 1: in units of the feature's activation,
                where these were not normalized (``cfg.normalize_activations``).
            points_to: The behaviour that the feature speaks for.
            positions: See `memgen_lens.Steering.from_scores`.

        Raises:
            SettingsError: A value is out of range, or ``sae`` is no such object.
        """
        row = decoder_row(sae, feature, call="Steering.from_sae")
        chosen = f"feature {feature} of an autoencoder"
        return _added(cls, row.vector, row.hook, None, alpha, points_to, positions, chosen, "from_sae")


def _added(
    cls: type[Kind],
    vectors: Float[np.ndarray, "*layers neuron"],
    site: str,
    layers: int | Sequence[int] | None,
    alpha: float,
    points_to: Direction,
    positions: Positions | None,
    chosen: str,
    call: str,
) -> Kind:
    """Vectors that are added to a site."""
    added, selected = placed(vectors, site, layers, call=f"Steering.{call}")
    sign = 1.0 if points_to == "memorization" else -1.0
    setting = SteeringSetting(site, 1.0, alpha, positions or "answer", "direction", chosen=chosen, method=None)
    return cls(setting, None, selected, sign * alpha * added)

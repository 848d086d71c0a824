"""Vectors that are added to a site: as a user gives them, and as a sparse autoencoder's decoder holds them.

Does not need the package of the autoencoder: its object is taken by what it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BeforeValidator

from memgen_lens.core.errors import SettingsError, shortened
from memgen_lens.models.sites import MODEL_SITES

MAX_LAYERS = 10_000


def plain_array(values: Any) -> np.ndarray:
    """Numbers of any kind, a tensor of any device, type and history among them, as float64.

    Raises:
        ValueError: They are no numbers.
    """
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu().double().numpy()
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError("numbers")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError, AttributeError):
        raise ValueError("a vector, or one a layer: an array or tensor [neuron] or [layer, neuron]") from None


def _vectors(value: Any) -> Any:
    array = plain_array(value)
    if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        raise ValueError("finite vectors: an array or tensor [neuron] or [layer, neuron]")
    if (array == 0).all(-1).any():
        raise ValueError("vectors that are not 0")
    return array


Vectors = Annotated[Any, BeforeValidator(_vectors)]
"""One vector or several, as `memgen_lens.core.arguments` takes them."""


def placed(
    vectors: Float[np.ndarray, "*layers neuron"], site: str, layers: int | Sequence[int] | None, *, call: str
) -> tuple[Float[np.ndarray, "layer neuron"], Bool[np.ndarray, "layer neuron"]]:
    """Vectors in their layers, and where they are.

    Args:
        vectors: One for all of ``layers``, or one for each.
        site: Where they are added.
        layers: Layers; None at a site that has one.
        call: The call that refuses.

    Raises:
        SettingsError: Layers are missing, twice there, or other than the vectors in number.
    """
    single = "." in site or site in MODEL_SITES
    if layers is None and not single:
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"the layers of {site!r} to add to",
            received="None",
            fix="Name them, e.g. layers=[3], or a hook point, e.g. site='blocks.3.hook_resid_post'.",
        )
    places = np.atleast_1d(np.asarray(0 if layers is None else layers, dtype=np.int64))
    rows = vectors if vectors.ndim == 2 else vectors[None].repeat(len(places), axis=0)
    if (places >= MAX_LAYERS).any():
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"layers that a model may have, below {MAX_LAYERS}",
            received=shortened(layers),
            fix="Change layers.",
        )
    if len(np.unique(places)) != len(places) or len(rows) != len(places) or not len(places):
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"{len(rows)} different layers, one a vector" if vectors.ndim == 2 else "different layers",
            received="one hook point" if layers is None else shortened(layers),
            fix="Name each layer once.",
        )
    if single and places.tolist() != [0]:
        raise SettingsError(
            f"{call}(layers=...)",
            expected=f"no layers for {site!r}, which is one hook point",
            received=shortened(layers),
            fix="Leave out layers.",
        )
    where = np.zeros((int(places.max()) + 1, rows.shape[1]), dtype=bool)
    where[places] = True
    added = np.zeros(where.shape)
    added[places] = rows
    return added, where


@dataclass(frozen=True)
class DecoderRow:
    """What a feature of a sparse autoencoder adds, and where.

    Attributes:
        vector: Its row of the decoder.
        hook: Full name of the hook point.
    """

    vector: Float[np.ndarray, " neuron"]
    hook: str


def decoder_row(sae: Any, feature: int, *, call: str) -> DecoderRow:
    """The decoder's row of a feature of a SAELens object, ``sae.W_dec[feature]``, and the hook point it was trained at.

    That is ``sae.cfg.metadata.hook_name`` (SAELens 6) or ``sae.cfg.hook_name`` (before); of a transcoder, which writes
    elsewhere than it reads, ``hook_name_out``.

    Raises:
        SettingsError: It has no such attribute, no such feature, or was trained on one head of several.
    """
    weights, cfg = _attribute(sae, "W_dec"), _attribute(sae, "cfg")
    metadata = _attribute(cfg, "metadata")
    hook, head = (
        next(
            (found for part in (metadata, cfg) for name in names if (found := _attribute(part, name)) is not None), None
        )
        for names in (("hook_name_out", "hook_name"), ("hook_head_index",))
    )
    shape = _attribute(weights, "shape")
    if not isinstance(hook, str) or shape is None or len(tuple(shape)) != 2:
        raise SettingsError(
            f"{call}(sae=...)",
            expected="a sparse autoencoder as SAELens has it: W_dec [feature, neuron] and cfg.metadata.hook_name",
            received=shortened(sae),
            fix="Load one with sae_lens.SAE.from_pretrained, or give its vector to Steering.from_direction.",
        )
    if head is not None:
        raise SettingsError(
            f"{call}(sae=...)",
            expected="an autoencoder of a whole hook point",
            received=f"one of head {head} alone",
            fix="Place its vector among those of the other heads, 0 there, and use Steering.from_direction.",
        )
    if feature >= shape[0]:
        raise SettingsError(
            f"{call}(feature=...)",
            expected=f"a feature of the autoencoder, 0 to {shape[0] - 1}",
            received=str(feature),
            fix="Change feature.",
        )
    try:
        vector = _vectors(weights[feature])
    except ValueError as error:
        raise SettingsError(
            f"{call}(feature=...)",
            expected=f"a feature whose row of the decoder is {error}",
            received=f"feature {feature}",
            fix="Choose another feature.",
        ) from None
    return DecoderRow(vector, hook)


def _attribute(thing: Any, name: str) -> Any:
    """An attribute, or None where there is none, whatever the object does when it is asked."""
    try:
        return getattr(thing, name, None)
    except Exception:  # a user's own object
        return None

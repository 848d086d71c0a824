"""A site's name to a model's hook points.

Does not read or change what passes there.
"""

import sys
from collections.abc import Callable, Collection

from transformer_lens.utilities import get_act_name  # pyright: ignore[reportPrivateImportUsage]

from memgen_lens.core.errors import SiteError, suggest
from memgen_lens.core.types import LensModel
from memgen_lens.fast.blocks import BLOCK_SITES

LAYER_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "pre",
    "post",
    "q",
    "k",
    "v",
    "z",
    "ln1",
    "ln2",
)
"""Short names of sites inside the blocks, as TransformerLens' `get_act_name` knows them."""
BEFORE_BLOCKS = ("embed", "hook_embed", "pos_embed", "hook_pos_embed", "hook_tokens", "rotary_emb")
"""First parts of the names of hook points that fire before the blocks."""
MODEL_SITES = ("embed", "pos_embed", "ln_final")
"""Short names of sites outside the blocks: one layer."""


ENTERS_FIRST_BLOCK = "blocks.0.hook_resid_pre"
"""What every model has in place of an embedding: with positions where these are added, scaled where it is scaled."""


def site_hooks(model: LensModel, site: str, *, known: Collection[str] | None = None) -> list[str]:
    """Full hook-point names of a site, one a layer (one in all for a site outside the blocks).

    Two sites may be other than their names let expect, on both of TransformerLens' kinds of model: ``ln1`` and ``ln2``
    are normalized and stand before the norm's weight is applied; and with gated MLPs ``post`` is the product that
    enters the down projection.

    Args:
        model: A lens model.
        site: A short name (``"resid_post"``), or a full one (``"blocks.0.mlp.hook_post"``).
        known: The model's hook points, where they have been looked up; a Bridge makes them anew at each look.

    Raises:
        SiteError: The name is unknown, or this model does not have it.
    """
    known = model.hook_dict if known is None else known
    if site in known:
        return [site]
    if site in MODEL_SITES:
        hooks = ["ln_final.hook_normalized" if site == "ln_final" else get_act_name(site)]
    elif site in LAYER_SITES:
        name: Callable[[int], str] = (
            (lambda layer: get_act_name("normalized", layer, site))
            if site.startswith("ln")
            else (lambda layer: get_act_name(site, layer))
        )
        hooks = [name(layer) for layer in range(model.cfg.n_layers)]
    else:
        raise SiteError(
            f"site {site!r}",
            expected="a TransformerLens short name or a full hook-point name",
            received=repr(site),
            fix=suggest(site, [*LAYER_SITES, *MODEL_SITES, *known]),
        )
    lacking = [hook for hook in hooks if hook not in known]
    if lacking:
        raise SiteError(
            f"site {site!r}",
            expected="a hook point of this model",
            received=f"{lacking[0]}, which it does not have",
            fix=suggest(lacking[0], known),
        )
    return hooks


def block_of(hook: str) -> int | None:
    """The block that a hook point lies in, -1 for one before the blocks, None for one behind them."""
    first, *rest = hook.split(".")
    if first == "blocks":
        return int(rest[0])
    return -1 if first in BEFORE_BLOCKS else None


def hook_of(site: str, layer: int) -> str:
    """The full name of a site's hook point in a layer, whatever the model; a full name is its own."""
    if site in MODEL_SITES:
        return "ln_final.hook_normalized" if site == "ln_final" else get_act_name(site)
    if site not in LAYER_SITES:
        return site
    return get_act_name("normalized", layer, site) if site.startswith("ln") else get_act_name(site, layer)


def place_of(hook: str) -> tuple[int, int] | None:
    """Where in a forward pass a hook point fires: of two, the smaller one first. None where that is not known."""
    block = block_of(hook)
    if block is None or block < 0:
        return (sys.maxsize, 0) if block is None else (-1, 0)
    within = hook.split(".", 2)[2]
    return (block, BLOCK_SITES.index(within)) if within in BLOCK_SITES else None

"""A site's name to a model's hook points.

Does not read or change what passes there.
"""

from collections.abc import Callable

from transformer_lens.utilities import get_act_name  # pyright: ignore[reportPrivateImportUsage]

from memgen_lens.core.errors import SiteError, suggest
from memgen_lens.core.types import LensModel

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
MODEL_SITES = ("embed", "pos_embed", "ln_final")
"""Short names of sites outside the blocks: one layer."""


def site_hooks(model: LensModel, site: str) -> list[str]:
    """Full hook-point names of a site, one a layer (one in all for a site outside the blocks).

    Args:
        model: A HookedTransformer.
        site: A short name (``"resid_post"``), or a full one (``"blocks.0.mlp.hook_post"``).

    Raises:
        SiteError: The name is unknown, or this model does not have it.
    """
    if site in model.hook_dict:
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
            fix=suggest(site, [*LAYER_SITES, *MODEL_SITES, *model.hook_dict]),
        )
    lacking = [hook for hook in hooks if hook not in model.hook_dict]
    if lacking:
        raise SiteError(
            f"site {site!r}",
            expected="a hook point of this model",
            received=f"{lacking[0]}, which it does not have",
            fix=suggest(lacking[0], model.hook_dict),
        )
    return hooks

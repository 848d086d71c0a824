"""A model without some of its neurons.

Does not choose them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from memgen_lens.core.errors import SiteError
from memgen_lens.core.types import LensModel
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.support import is_plain
from memgen_lens.models.sites import site_hooks


@contextmanager
def zeroed(model: LensModel, site: str, neurons: Bool[np.ndarray, "layer neuron"]) -> Iterator[LensModel]:
    """Inside the ``with`` block, some neurons of a site are zero at every position, whoever runs the model.

    Of MLP neurons (``post``) on a plain model that is done by the weights that lead out of them, which are put back at
    the end: the fast forward stays fast. Elsewhere by hooks.

    Args:
        model: A lens model.
        site: TransformerLens short name.
        neurons: Which.

    Raises:
        SiteError: The model lacks the site, or has another shape there.
    """
    hooks = site_hooks(model, site)
    if len(hooks) != len(neurons):
        raise _wrong_shape(site, f"{len(neurons)} layers", str(len(hooks)))
    layers = np.flatnonzero(neurons.any(1)).tolist()
    if site != "post" or not is_plain(model):
        with model.hooks(fwd_hooks=[(hooks[layer], _zeroing(site, neurons[layer])) for layer in layers]):
            yield model
        return
    outward = [parameters_of(model).blocks[layer].mlp.W_out for layer in layers]
    for weight in outward:
        if len(weight) != neurons.shape[1]:
            raise _wrong_shape(site, f"{neurons.shape[1]} neurons", str(len(weight)))
    rows = [torch.from_numpy(np.flatnonzero(neurons[layer])).to(outward[0].device) for layer in layers]
    kept = [weight.detach()[index].clone() for weight, index in zip(outward, rows, strict=True)]
    try:
        for weight, index in zip(outward, rows, strict=True):
            weight.data[index] = 0
        yield model
    finally:
        for weight, index, before in zip(outward, rows, kept, strict=True):
            weight.data[index] = before


def _zeroing(site: str, neurons: Bool[np.ndarray, " neuron"]) -> Callable[..., Tensor]:
    mask = torch.from_numpy(neurons)

    def zero(activation: Tensor, hook: Any) -> Tensor:
        rows = activation.flatten(2)
        if rows.shape[2] != len(mask):
            raise _wrong_shape(site, f"{len(mask)} neurons", str(rows.shape[2]))
        return rows.masked_fill(mask.to(rows.device), 0).view_as(activation)

    return zero


def _wrong_shape(site: str, expected: str, received: str) -> SiteError:
    return SiteError(
        f"zeroing neurons of site {site!r}",
        expected=f"a model with {expected} there",
        received=received,
        fix="Score this very model: attribute(model, pairs, site, method=...).",
    )

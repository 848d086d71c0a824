"""Put recall where one knows it to be: gradients of memorized items reach chosen MLP neurons alone, or ever others.

After gradient routing (Cloud et al., arXiv 2410.04332), which lets chosen data teach chosen parts of a model. Does not
know tasks nor the optimizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens.core.config import Plant
from memgen_lens.fast.blocks import norm
from memgen_lens.fast.mlp import mlp
from memgen_lens.fast.native import parameters_of
from memgen_lens.training.forward import MlpStep, Rows, labelled_logits, labelled_loss


def planted_loss(model: Any, groups: list[Rows], plant: Plant) -> Float[Tensor, ""]:
    """The loss of a batch whose memorized items teach the planted neurons alone, or whose neurons are ever others.

    With chosen neurons it is a sum of two. Generic items without these neurons (as if they were zero) teach all other
    weights: there stands the rule, and no memorized item has been seen. All items together, with the whole model, have
    their gradient through the neurons alone: into the weights of these neurons, and what lies below them. So they learn
    to recall memorized items and to leave generic ones as they are. Departures from gradient routing as published,
    which chooses masks by whose item it is and leaves the forward pass unchanged: generic items run without the
    neurons; and they reach the neurons too, for the second end: without it, recall leaks into every prompt.

    Without chosen neurons, all items run without a share of all MLP neurons, drawn anew at each step and scaled as
    dropout scales them. (Were it memorized items alone, that neurons are missing would tell them from generic ones:
    tried, and nothing is recalled once none is missing.)

    Args:
        model: A model that the fast forward covers.
        groups: Generic rows, and memorized rows behind generic steps.
        plant: Where.
    """
    if plant.neurons:
        rule = labelled_loss(_without(model, groups[:1], plant), groups[:1])
        return rule if len(groups) == 1 else rule + labelled_loss(_through(model, groups, plant), groups)
    return labelled_loss(_dropped(model, groups, plant.dropped), groups)


def _without(model: Any, groups: list[Rows], plant: Plant) -> Float[Tensor, "labelled d_vocab"]:
    """Logits without the planted neurons: no gradient reaches their weights."""
    kept = torch.ones(model.cfg.d_mlp, device=model.cfg.device)
    kept[list(plant.neurons)] = 0
    return labelled_logits(model, groups, mlps={plant.layer: _scaled(model, plant.layer, kept)})


def _dropped(model: Any, groups: list[Rows], share: float) -> Float[Tensor, "labelled d_vocab"]:
    """Logits without a share of all MLP neurons, drawn anew, what is left scaled up."""
    kept = (torch.rand(model.cfg.n_layers, model.cfg.d_mlp) >= share).to(model.cfg.device) / (1 - share)
    return labelled_logits(
        model, groups, mlps={layer: _scaled(model, layer, kept[layer]) for layer in range(len(kept))}
    )


def _through(model: Any, groups: list[Rows], plant: Plant) -> Float[Tensor, "labelled d_vocab"]:
    """Logits of the whole model, whose gradient passes the planted neurons alone and ends there or below."""
    chosen = torch.tensor(plant.neurons, device=model.cfg.device)
    parts, cfg = parameters_of(model), model.cfg
    block = parts.blocks[plant.layer]
    kept = torch.ones(cfg.d_mlp, device=cfg.device)
    kept[chosen] = 0
    rest = _scaled(model, plant.layer, kept)
    own = SimpleNamespace(
        W_out=block.mlp.W_out[chosen],
        b_out=torch.zeros_like(block.mlp.b_out),
        **{
            name: getattr(block.mlp, name)[..., chosen]
            for name in ("W_in", "W_gate", "b_in")
            if hasattr(block.mlp, name)
        },
    )

    def planted(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        with torch.no_grad():
            others = rest(x)
        return others + mlp(own, norm(block.ln2, x, cfg), cfg)

    with _frozen_behind(model, plant.layer):
        return labelled_logits(model, groups, mlps={plant.layer: planted})


def _scaled(model: Any, layer: int, factor: Float[Tensor, " neuron"]) -> MlpStep:
    """A block's MLP with its neurons' outputs multiplied; no gradient passes a neuron that is off."""
    block, cfg = parameters_of(model).blocks[layer], model.cfg
    names = ("W_in", "b_in", "W_gate", "b_out")
    weights = {name: getattr(block.mlp, name) for name in names if hasattr(block.mlp, name)}
    scaled = SimpleNamespace(**weights, W_out=block.mlp.W_out * factor[:, None])
    return lambda x: x + mlp(scaled, norm(block.ln2, x, cfg), cfg)


@contextmanager
def _frozen_behind(model: Any, layer: int) -> Iterator[None]:
    """Inside it, what is run makes no graph through the weights behind a layer."""
    behind = [*model.blocks[layer + 1 :], model.ln_final, model.unembed]
    weights = [weight for part in behind for weight in part.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)

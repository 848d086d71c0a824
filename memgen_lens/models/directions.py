"""What a neuron writes into the residual stream, and what that says to the vocabulary on the direct way.

Reads weights alone: nothing is run but norms, on vectors made here. Does not know prompts.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.core.types import LensModel

RESIDUAL = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)
"""Hook points whose coordinates are the residual stream's own."""
POST, Z, NORMALIZED = "mlp.hook_post", "attn.hook_z", "ln_final.hook_normalized"


@torch.no_grad()
def direct_effect(model: LensModel, hook: str, neuron: int) -> Float[Tensor, " d_vocab"]:
    """What a unit of a neuron's activation adds to each token's logit, past all later blocks.

    The direction that the neuron writes into the residual stream (its row of the down projection, of the heads' output
    projection, or a coordinate of the stream itself) goes through the final norm with its scale taken for 1, and
    through the unembedding; biases add nothing (direct logit attribution: Elhage et al., "A Mathematical Framework for
    Transformer Circuits", 2021; Geva et al., arXiv 2203.14680, for MLP neurons). The norm's scale is a number above 0
    that all tokens share: it changes no ranking. A layer norm takes away the direction's mean, and any norm multiplies
    by its weight; so does a norm behind the MLP or the attention (Gemma). Of the logits the mean over the vocabulary is
    taken away, which changes no probability; a cap on logits is left out.

    Args:
        model: A lens model.
        hook: Full hook-point name, as a HookedTransformer has it.
        neuron: Coordinate of the hook point's last axis, heads flattened into it.

    Returns:
        Logits a unit of activation, in float32.

    Raises:
        ModelError: What is at the hook point is not written into the residual stream, or the model does not show the
            weights (``received`` says which).
    """
    try:
        logits = _logits(model, hook, neuron)
    except ModelError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:  # as models refuse to show weights
        raise _unknown(f"a model that does not show the weights behind {hook} ({error})") from None
    return logits - logits.mean()


def _logits(model: Any, hook: str, neuron: int) -> Float[Tensor, " d_vocab"]:
    written = _written(model, hook, neuron)
    norm = _Norm.of(getattr(model, "ln_final", None), written)
    # What is behind the norm's own division is centred already.
    read = written * norm.weight if hook == NORMALIZED else norm.passed(written)
    unembed = model.unembed.W_U.detach()
    return read.to(unembed.device) @ unembed.float()


def _written(model: Any, hook: str, neuron: int) -> Float[Tensor, " d_model"]:
    """The direction in the residual stream (behind the final norm, where the neuron is there)."""
    within = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    name = within[2] if within else hook
    if within and name in (POST, Z):
        block = model.blocks[int(within[1])]
        weight = block.mlp.W_out if name == POST else block.attn.W_O.flatten(0, 1)
        row = weight[neuron].detach().float()
        return _Norm.of(getattr(block, "ln2_post" if name == POST else "ln1_post", None), row).passed(row)
    if name in (*RESIDUAL, NORMALIZED):
        return torch.eye(model.cfg.d_model, device=next(iter(model.parameters())).device)[neuron]
    raise _unknown(f"{hook}, whose values are not written into the residual stream as they are")


@dataclass(frozen=True)
class _Norm:
    """What a norm does beside dividing by a number; found by what it makes of 1 and -1, as kinds store it in many ways.

    Attributes:
        weight: What it multiplies by.
        centres: Whether it takes away the mean.
    """

    weight: Float[Tensor, " d_model"]
    centres: bool

    @classmethod
    def of(cls, norm: Any, like: Float[Tensor, " d_model"]) -> "_Norm":
        """The norm of vectors like this one; None is no norm."""
        if norm is None:
            return cls(torch.ones_like(like), False)
        x = torch.ones_like(like)
        x[1::2] = -1
        own = next(iter(norm.parameters()), like)
        asked = torch.stack([x, -x, x + 1])[None].to(own.device, own.dtype)
        plus, minus, moved = norm(asked)[0].to(like.device).float()
        odd = (plus - minus) / 2
        # A norm that takes away the mean cannot tell x from x + 1.
        centres = bool((moved - plus).abs().max() <= 0.1 * odd.abs().max())
        seen = x - x.mean() if centres else x
        return cls(odd * seen.square().mean().sqrt() / seen, centres)

    def passed(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """What becomes of a direction, were the norm's scale 1."""
        return (direction - direction.mean() if self.centres else direction) * self.weight


def _unknown(received: str) -> ModelError:
    return ModelError(
        "direct effect on the vocabulary",
        expected="a neuron that writes into the residual stream, with weights that can be read",
        received=received,
        fix="Look at post, z, or a site of the residual stream.",
    )

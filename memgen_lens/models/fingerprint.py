"""Which model is it? What tells one from another, by its sizes and a sample of its weights.

Does not keep weights, and does not run anything.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memgen_lens.core.errors import ModelError
from memgen_lens.core.types import LensModel
from memgen_lens.fast.support import is_hooked_transformer, is_native_bridge
from memgen_lens.models.native import state_of
from memgen_lens.models.plain import own_name

N_VALUES = 64
"""Values of each weight that are looked at."""
KEPT_BESIDE = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")
"""What a HookedTransformer keeps beside its weights."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells a model from another.

    Attributes:
        name: What it calls itself; told, not compared.
        n_layers: Blocks.
        d_model: Width of the residual stream.
        d_vocab: Tokens of the vocabulary.
        weights: SHA-256 over names, shapes and a sample of the values of all weights.
    """

    name: str
    n_layers: int
    d_model: int
    d_vocab: int
    weights: str

    @classmethod
    def of(cls, model: LensModel) -> "Fingerprint":
        """The fingerprint of a model.

        Of each weight 64 values at even distances are looked at, rounded to bfloat16: the same model in float32 and in
        bfloat16, or as a HookedTransformer and as a native Bridge, is the same. Another seed, another checkpoint or a
        tuned model is not; that a few single weights were changed may go unnoticed.
        """
        cfg: Any = model.cfg
        sizes = {name: int(getattr(cfg, name, 0) or 0) for name in ("n_layers", "d_model", "d_vocab")}
        return cls(name=str(getattr(cfg, "model_name", "") or "a model"), **sizes, weights=_sampled(_weights(model)))

    def differences(self, other: "Fingerprint") -> list[str]:
        """What of another model differs, in words."""
        mine, others = asdict(self), asdict(other)
        sizes = [
            f"{name} {others[name]}, not {mine[name]}"
            for name in ("n_layers", "d_model", "d_vocab")
            if mine[name] != others[name]
        ]
        if sizes or self.weights == other.weights:
            return sizes
        return [f"weights of SHA-256 {other.weights[:12]}…, not {self.weights[:12]}…"]

    def require(self, model: LensModel, *, call: str, fix: str) -> None:
        """Refuse any other model.

        Raises:
            ModelError: Saying what differs.
        """
        differences = self.differences(found := Fingerprint.of(model))
        if differences:
            raise ModelError(
                call,
                expected=f"the model that it was saved for ({self.name})",
                received=f"{found.name} with {'; '.join(differences)}",
                fix=fix,
            )


def _weights(model: Any) -> dict[str, Tensor]:
    if is_hooked_transformer(model) or is_native_bridge(model):
        return {name: value for name, value in state_of(model).items() if not name.endswith(KEPT_BESIDE)}
    inner = getattr(model, "original_model", None)
    if inner is not None:
        return {own_name(name): value for name, value in inner.state_dict().items()}
    return {f"{place}": value for place, value in enumerate(model.parameters())}


@torch.no_grad()
def _sampled(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.numel() and not weight.is_meta:
            flat = weight.reshape(-1)
            # Whole steps, not torch.linspace: float32 cannot count the values of a large weight.
            place = torch.arange(min(N_VALUES, len(flat)), device=flat.device) * (len(flat) // min(N_VALUES, len(flat)))
            values = flat[place].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

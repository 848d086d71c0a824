"""The vocabulary shared by all stages: behaviours, directions, axis names, and what we need of a model.

Axis names in jaxtyping annotations, everywhere in the package:

========= =====================================================================
batch     prompts in one forward pass
pos       token positions
layer     transformer blocks, 0 first (one entry for sites outside the blocks)
neuron    coordinates of a hook point's last axis (heads flattened into it)
pair      prompt pairs
setting   steering settings that share one forward pass
d_model   residual stream
d_vocab   tokens of the vocabulary
========= =====================================================================
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable


class Behavior(StrEnum):
    """What a completion shows; every completion is exactly one of the three (method of arXiv 2412.18497)."""

    GENERALIZATION = "generalization"
    """Equals the answer that the rule gives."""
    MEMORIZATION = "memorization"
    """Equals the answer that this very item was trained to recall."""
    OTHER = "other"
    """Anything else, another item's memorized answer included."""


Observational = Literal["nmd", "pearson", "welch_t", "cohens_d", "auroc", "probe_weights"]
Causal = Literal["attribution_patching", "attribution_patching_ig", "integrated_gradients", "ablation", "patching"]
Method = Literal[Observational, Causal]
"""What neurons are scored by: whether they differ, or whether they make the difference (`memgen_lens.attribute`)."""

Direction = Literal["generalization", "memorization"]
"""Which behaviour steering pushes towards."""

Positions = Literal["answer", "prompt", "generated", "all"]
"""Where steering acts: from the answer position on (the paper), at the answer position alone, behind it alone (at what
is generated), or everywhere."""

FittedKind = Literal["clusters", "low_rank"]
"""Rules fitted on recorded activations: what they add depends on the activation that a row has."""

ScoredMode = Literal["shift", "scale", "clamp", "ablate", "patch"]
"""What is done to neurons that scores choose: a shift, a factor, the other behaviour's mean, an ablation (`Ablation`),
or the paired prompt's values."""

Mode = Literal["shift", "scale", "clamp", "ablate", "patch", "direction", "clusters", "low_rank"]
"""How neurons are changed: as scores choose (`ScoredMode`), by one vector a layer, or by a fitted rule
(`FittedKind`)."""

Ablation = Literal["zero", "mean", "resample"]
"""What ablated neurons are set to: 0, their mean, or the values that they have on another prompt."""

Split = Literal["memorized", "rephrased", "heldout", "validation"]
"""Prompts of a designed task that are asked about (generic training prompts are drawn, not listed)."""


@runtime_checkable
class LensModel(Protocol):
    """What analysis needs of a model; `HookedTransformer` has it, and TransformerLens' Bridge too."""

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook points by full name."""
        ...

    def hooks(self, fwd_hooks: list[tuple[Any, Callable[..., Any]]] = ...) -> AbstractContextManager[Any]:
        """Set hooks and remove them on leaving, also after an exception."""
        ...

    def to_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Strings to tokens, ``[batch, pos]``."""
        ...

    def generate(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Complete tokens, ``[batch, pos] -> [batch, pos + new]``."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The model's weights."""
        ...

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens ``[batch, pos]`` to logits ``[batch, pos, d_vocab]``."""
        ...

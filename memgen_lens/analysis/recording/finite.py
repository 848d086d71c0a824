"""Refuse activations that are not finite: one of them would make every neuron of its site "significant".

Does not repair anything.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from memgen_lens.core.arguments import shortened
from memgen_lens.core.errors import ModelError
from memgen_lens.core.pairs import PromptPairs

EMBEDDING = "embedding"
"""Name under which what enters the first block is kept beside the sites."""
SIDES = ("memorized", "generalized")


def require_finite(
    call: str, site: str, sides: Sequence[Float[np.ndarray, "pair layer neuron"]], pairs: PromptPairs
) -> None:
    """Refuse NaN and infinity, saying where the first of them is.

    Args:
        call: The call that refuses.
        site: Where the activations come from.
        sides: Activations on the recalling side, then on the computing one.
        pairs: The pairs that they belong to.

    Raises:
        ModelError: Naming site, layer, neuron and prompt, and the way out.
    """
    for side, values in zip(SIDES, sides, strict=True):
        # A sum is finite only if all of it is (or it overflows itself, which the closer look then tells).
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum(dtype=np.float64)):
                continue
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            pair, layer, neuron = wrong[0].tolist()
            raise ModelError(
                call,
                expected="finite activations",
                received=f"{values[pair, layer, neuron]} at site {site!r}, layer {layer}, neuron {neuron}, on the "
                f"prompt {shortened(getattr(pairs, side)[pair].prompt)} ({len(wrong)} such values)",
                fix="float16 overflows beyond 65,504: load the model with dtype=torch.float32 or torch.bfloat16.",
            )

"""Which rows of a batch are steered: decided in the prompt's pass by what reads it, kept while the answer is generated.

Does not know probes nor steerings, but what they are to it: a function of rows, and hooks that change activations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memgen_lens.core.errors import ModelError, SiteError
from memgen_lens.models.passes import Passes


def probe_is_late(reads: str, steers: str) -> SiteError:
    """The error for a probe that reads above what is steered."""
    return SiteError(
        "Guard",
        expected="a probe below what is steered, or at the same hook point",
        received=f"one that reads {reads}, where {steers} is steered before",
        fix="Take the probe of a lower layer, probes.at(layer), or steer higher ones: from_scores(..., layers=[...]).",
    )


@dataclass
class Decisions:
    """The rows of the running batch that are steered.

    A pass that begins new prompts is decided anew where it holds their answer positions; passes that go on from it keep
    what was decided, with a cache and without.

    Attributes:
        name: The hook point that is read.
        width: Neurons that it must have.
        decide: From rows ``[row, neuron]`` at the answer position to whether each is steered.
        passes: The forward passes.
        steered: Whether each row of the batch is.
        known: Whether that was decided; False where a row's answer position has not been seen.
        begun: The pass's prompts, as `Passes.begun` counts them.
    """

    name: str
    width: int
    decide: Callable[[Float[np.ndarray, "row neuron"]], Bool[np.ndarray, " row"]]
    passes: Passes
    steered: Bool[Tensor, " batch"] | None = None
    known: Bool[Tensor, " batch"] | None = None
    begun: int = 0

    def read(self, activation: Tensor, hook: Any) -> None:
        """The hook that decides; it changes nothing."""
        passes = self.passes
        if activation.ndim < 3 or activation.shape[1] != passes.length or activation[0, 0].numel() != self.width:
            raise SiteError(
                f"guard at {self.name!r}",
                expected=f"activations of the {passes.length} positions that are run, of {self.width} neurons each",
                received=f"{list(activation.shape)}",
                fix="Fit the probe on this very model, at the residual stream, the MLP or the heads' values.",
            )
        if passes.begun > self.begun or self.steered is None or len(self.steered) != len(activation):
            self.steered, self.known = torch.zeros(2, len(activation), dtype=torch.bool)
            self.begun = passes.begun
        assert self.known is not None
        if passes.answer is None:
            return
        place = passes.answer.cpu() - passes.past
        new = (place >= 0) & (place < passes.length) & ~self.known
        if bool(new.any()):
            row = new.nonzero().flatten()
            rows = activation[row.to(activation.device), place[row].to(activation.device)].flatten(1)
            self.steered[row] = torch.from_numpy(self.decide(rows.detach().float().cpu().numpy()))
            self.known[row] = True

    def guarded(self, name: str, steer: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        """A hook that changes the rows that are steered as ``steer`` does, and leaves the others bit by bit."""

        def hook_of(activation: Tensor, hook: Any) -> Tensor:
            changed = steer(activation, hook)
            if changed is activation:
                return activation
            if self.passes.begun > self.begun:
                raise probe_is_late(self.name, name)
            if self.steered is None or self.known is None or not bool(self.known.all()):
                raise ModelError(
                    "Guard.applied",
                    expected="each prompt's answer position in a pass inside the block, before anything is steered",
                    received="a pass that goes on from prompts whose answer positions it has not seen",
                    fix="Run the prompts inside the block too, each in one pass; name prompt_length= where answers are "
                    "fed in behind them.",
                )
            rows = self.steered.to(activation.device)
            return torch.where(rows.view(-1, *[1] * (activation.ndim - 1)), changed, activation)

        return hook_of

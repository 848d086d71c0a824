"""What is measured at each position of prompts, counted from their end: patching, probes, steering.

Records hold plain values and numpy arrays. They do not measure.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from memgen_lens.core.dynamics_records import RateSeries
from memgen_lens.core.steering_records import SteeringSetting

PatchDirection = Literal["denoising", "noising"]
"""Recalled activations into the computing prompt, or computed ones into the recalling prompt."""


@dataclass(frozen=True)
class PositionTokens:
    """What stands at each position of the prompts of pairs, the last of which is the answer position.

    Attributes:
        memorized: The most frequent token there of the recalling prompts, as text.
        generalized: That of the computing prompts.
        memorized_share: Share of the recalling prompts that have this token there, in (0, 1].
        generalized_share: Likewise.
        differing: Share of pairs whose two prompts have unlike tokens there, in [0, 1].
        n: Pairs whose prompts both have that position: what these shares are of.
    """

    memorized: tuple[str, ...]
    generalized: tuple[str, ...]
    memorized_share: Float[np.ndarray, " pos"]
    generalized_share: Float[np.ndarray, " pos"]
    differing: Float[np.ndarray, " pos"]
    n: Int[np.ndarray, " pos"]

    @property
    def position(self) -> Int[np.ndarray, " pos"]:
        """Positions counted from the end: -1 is the answer position."""
        return np.arange(-len(self.n), 0)


@dataclass(frozen=True)
class PatchingMap:
    """How much of the recall each place carries: 0 = nothing, 1 = all of it.

    Attributes:
        site: Site name.
        direction: What was patched into what; see `memgen_lens.patching_map`.
        by: What the columns are: positions from the end, or heads.
        positions: Which positions a head was patched at: all, or the answer position alone.
        effect: Normalized effect of each place; NaN where the prompts that have it do not differ in the quantity.
        low: Lower end of its 95 % bootstrap interval, items resampled.
        high: Upper end.
        total: Mean over pairs of the quantity on the recalling prompt minus that on the computing prompt, what an
            effect of 1 is: in nats, or in units of the user's metric.
        total_ci95: Its interval.
        tokens: What stands at the positions.
        n: Pairs that each column's effects are of.
        n_items: Items that they belong to: what the intervals count.
        n_pairs: Pairs in all.
        n_left_out: Pairs of the split whose prompts have unlike numbers of tokens.
    """

    site: str
    direction: PatchDirection
    by: Literal["position", "head"]
    positions: Literal["all", "answer"]
    effect: Float[np.ndarray, "layer column"]
    low: Float[np.ndarray, "layer column"]
    high: Float[np.ndarray, "layer column"]
    total: float
    total_ci95: tuple[float, float]
    tokens: PositionTokens
    n: Int[np.ndarray, " column"]
    n_items: Int[np.ndarray, " column"]
    n_pairs: int
    n_left_out: int


@dataclass(frozen=True)
class PositionProbes:
    """How well a linear probe at each layer and position tells the behaviours apart on the test pairs.

    Attributes:
        site: Site name.
        auroc: Area under the ROC curve in [0, 1].
        low: Lower end of its 95 % bootstrap interval, items resampled.
        high: Upper end.
        input_only: AUROC of the same probe on the tokens up to each position.
        input_only_low: Lower end of its interval.
        input_only_high: Upper end.
        tokens: What stands at the positions, of all pairs.
        n_train: Pairs the probes were fitted on.
        n_test: Pairs they were tested on.
        n_test_items: Items that the latter belong to: what the intervals count.
    """

    site: str
    auroc: Float[np.ndarray, "layer pos"]
    low: Float[np.ndarray, "layer pos"]
    high: Float[np.ndarray, "layer pos"]
    input_only: Float[np.ndarray, " pos"]
    input_only_low: Float[np.ndarray, " pos"]
    input_only_high: Float[np.ndarray, " pos"]
    tokens: PositionTokens
    n_train: int
    n_test: int
    n_test_items: int


@dataclass(frozen=True)
class PositionSteering:
    """What steering does that acts at one position of the prompt alone.

    Attributes:
        setting: How it was steered; its ``positions`` are not used.
        to_generalization: Share of recalling prompts that now give the rule's answer.
        exact_recall: Share of computing prompts that now give the item's own memorized answer.
        memorized_form: Share of computing prompts whose output has the form of a memorized answer.
        tokens: What stands at the positions.
    """

    setting: SteeringSetting
    to_generalization: RateSeries
    exact_recall: RateSeries
    memorized_form: RateSeries
    tokens: PositionTokens

"""From which predicted probability on a prompt is steered, so that few are that should not be.

Does not know probes nor prompts, but log-odds.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit

from memgen_lens.core.guard_records import ChosenThreshold, plain_rate
from memgen_lens.core.stats import wilson


def choose_threshold(
    wanted: Float[np.ndarray, " row"],
    unwanted: Mapping[str, Float[np.ndarray, " other_row"]],
    items: Int[np.ndarray, " row"],
    *,
    false_trigger_rate: float,
) -> ChosenThreshold:
    """The lowest threshold that keeps to a rate of false triggers, in the middle of the gap that it lies in.

    Let ``low`` be the largest log-odds that may not trigger: of each set of n unwanted prompts, the one behind the
    first ``floor(rate * n)``. Any threshold between it and the next larger log-odds of a wanted prompt picks the same
    wanted prompts; the middle is taken, which leaves new prompts of either kind the most room.

    Args:
        wanted: Log-odds of the prompts that are to be steered.
        unwanted: By set, log-odds of prompts that are not, at least one each.
        items: The item of each wanted prompt, and of each of the set ``"tune"``.
        false_trigger_rate: Share of each set that may trigger, in [0, 1).
    """
    low = max(float(np.sort(odds)[::-1][int(false_trigger_rate * len(odds))]) for odds in unwanted.values())
    above = wanted[wanted > low]
    threshold = float(expit((low + float(above.min())) / 2 if len(above) else low))
    with np.errstate(divide="ignore"):
        while logit(threshold) <= low:  # the next probability that tells them apart; above 1 - 1e-16 that is 1
            threshold = float(np.nextafter(threshold, 1.0))
        cut = float(logit(threshold))
    return ChosenThreshold(
        threshold=threshold,
        false_trigger_rate=float(false_trigger_rate),
        caught=plain_rate(wilson(wanted >= cut, items)),
        triggered={
            name: plain_rate(wilson(odds >= cut, items if name == "tune" else None)) for name, odds in unwanted.items()
        },
    )

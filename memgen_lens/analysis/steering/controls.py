"""Steerings that should do nothing, if what is steered is what switches the behaviour.

``random_neurons``, ``low_correlation`` and ``random_sign`` change as many neurons in each layer by the same multiset of
magnitudes. Of a fitted rule that holds row by row: what the rule says about a row, given the activation that the row
has, is written to other neurons of the same row, or with other signs. (Where several layers are steered, the rules of
the later ones see what the control has made of a row, so that their magnitudes are not those of the steering itself.)

``shuffled_items``, of fitted rules alone, asks whether it matters whose partner a row is led to. The rule is fitted
again with partners of other items, clusters and ridge kept: it then knows where the rows are and where the other side
is on average, and nothing of how the one tells the other. What it reaches is reached without knowing the item. (To
apply the true rule to another row's activation would ask nearly the same; but what a prompt is steered by would depend
on which others share its batch, and for one prompt alone nothing would be left.) Its magnitudes are its own, not those
of the true rule.
"""

from dataclasses import replace

import numpy as np

from memgen_lens.analysis.steering.steering import Steering

CONTROLS = ("random_neurons", "low_correlation", "random_sign")
SHUFFLED = "shuffled_items"


def controls_of(steer: Steering) -> tuple[str, ...]:
    """The controls of a steering."""
    return CONTROLS if steer.rules is None else (*CONTROLS, SHUFFLED)


def control_draws(steer: Steering, name: str, n: int, rng: np.random.Generator) -> list[Steering]:
    """Draws of one control."""
    if name == SHUFFLED:
        return [] if steer.rules is None else [replace(steer, rules=steer.rules.shuffled(rng)) for _ in range(n)]
    if name == "random_sign":
        if steer.setting.mode == "patch":
            return []
        signs = rng.choice([-1.0, 1.0], size=(n, *steer.shift.shape))
        return [_signed(steer, sign) for sign in signs]
    draws = []
    for _ in range(n):
        selected, source = np.zeros_like(steer.selected), np.zeros(steer.selected.shape, dtype=np.int64)
        for layer, row in enumerate(steer.selected):
            count = int(row.sum())
            if name == "random_neurons":
                chosen = rng.choice(len(row), size=count, replace=False)
            else:
                chosen = np.argsort(np.abs(steer.scores.score[layer]), kind="stable")[:count]
            selected[layer, chosen] = True
            source[layer, chosen] = rng.permutation(np.flatnonzero(row))
        draws.append(_moved(steer, selected, source))
    # Patching has no magnitudes to permute: every draw of the least correlated neurons would be the same one.
    return draws[:1] if name == "low_correlation" and steer.setting.mode == "patch" else draws


def _signed(steer: Steering, sign: np.ndarray) -> Steering:
    """The steering with a sign for each neuron."""
    if steer.rules is None:
        return replace(steer, shift=np.abs(steer.shift) * sign)
    return replace(steer, rules=replace(steer.rules, gain=np.abs(steer.rules.gain) * sign))


def _moved(steer: Steering, selected: np.ndarray, source: np.ndarray) -> Steering:
    """The steering with what belongs to the neurons ``source`` on the neurons ``selected`` of each layer."""

    def moved(values: np.ndarray) -> np.ndarray:
        return np.where(selected, np.take_along_axis(values, source, axis=1), np.zeros_like(values))

    if steer.rules is None:
        return replace(steer, selected=selected, shift=moved(steer.shift))
    rules = replace(steer.rules, gain=moved(steer.rules.gain), taken_from=moved(steer.rules.taken_from))
    return replace(steer, selected=selected, rules=rules)

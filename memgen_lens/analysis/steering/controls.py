"""Steerings that should do nothing, if what is steered is what switches the behaviour.

``random_neurons``, ``low_correlation`` and ``random_sign`` change as many neurons in each layer in the same way and as
hard. What that means depends on the mode:

- a shift, a scale: the same multiset of magnitudes, or of factors, on other neurons, or with random signs (a neuron
  that is amplified is damped, or the other way round);
- a clamp, an ablation, a patch: other neurons are set to what is *their own* value there (the mean of the other side,
  0, their mean, another prompt's or the paired one's). Such values are no magnitudes to permute: every draw of
  ``low_correlation`` would be the same, so that it is one. ``random_sign`` clamps each selected neuron to the mean of a
  side that a coin tells; an ablation and a patch have no sign;
- a direction, which changes all neurons of a layer: ``random_direction`` draws vectors of the same norm in each layer,
  uniformly on the sphere; ``random_neurons`` permutes the vector's own coordinates, ``random_sign`` signs them anew, so
  that a few large coordinates stay as large. There are no scores, and so no ``low_correlation``.

Of a fitted rule that holds row by row: what the rule says about a row, given the activation that the row
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
RANDOM_DIRECTION = "random_direction"
OWN_VALUES = ("clamp", "ablate", "patch")
"""Modes in which each neuron is set to a value of its own."""
NO_SIGN = {"patch": "patched values have no sign to draw", "ablate": "an ablation has no sign to draw"}


def controls_of(steer: Steering) -> tuple[str, ...]:
    """The controls of a steering."""
    if steer.scores is None:
        return (RANDOM_DIRECTION, "random_neurons", "random_sign")
    return CONTROLS if steer.rules is None else (*CONTROLS, SHUFFLED)


def control_draws(steer: Steering, name: str, n: int, rng: np.random.Generator) -> list[Steering]:
    """Draws of one control."""
    if name == SHUFFLED:
        return [] if steer.rules is None else [replace(steer, rules=steer.rules.shuffled(rng)) for _ in range(n)]
    if name == RANDOM_DIRECTION:
        return [_turned(steer, rng.standard_normal(steer.shift.shape)) for _ in range(n)]
    if name == "random_sign":
        if steer.setting.mode in NO_SIGN:
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
                assert steer.scores is not None, "a direction has no scores to rank by"
                chosen = np.argsort(np.abs(steer.scores.score[layer]), kind="stable")[:count]
            selected[layer, chosen] = True
            source[layer, chosen] = rng.permutation(np.flatnonzero(row))
        draws.append(_moved(steer, selected, source))
    return draws[:1] if name == "low_correlation" and steer.setting.mode in OWN_VALUES else draws


def _turned(steer: Steering, drawn: np.ndarray) -> Steering:
    """The direction with drawn vectors of the same norm in each layer."""
    vectors = np.where(steer.selected, drawn, 0.0)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    norms = np.linalg.norm(steer.shift, axis=1, keepdims=True)
    return replace(steer, shift=vectors * np.divide(norms, lengths, out=np.zeros_like(norms), where=lengths > 0))


def _signed(steer: Steering, sign: np.ndarray) -> Steering:
    """The steering with a sign for each neuron."""
    if steer.rules is not None:
        return replace(steer, rules=replace(steer.rules, gain=np.abs(steer.rules.gain) * sign))
    if steer.values is not None:
        # The other direction's factor, or the other side's mean.
        return replace(steer, values=np.where(sign > 0, steer.values, steer.values[::-1]))
    return replace(steer, shift=np.abs(steer.shift) * sign)


def _moved(steer: Steering, selected: np.ndarray, source: np.ndarray) -> Steering:
    """The steering with what belongs to the neurons ``source`` on the neurons ``selected`` of each layer."""

    def moved(values: np.ndarray) -> np.ndarray:
        return np.where(selected, np.take_along_axis(values, source, axis=1), np.zeros_like(values))

    if steer.rules is not None:
        rules = replace(steer.rules, gain=moved(steer.rules.gain), taken_from=moved(steer.rules.taken_from))
        return replace(steer, selected=selected, rules=rules)
    if steer.setting.mode in OWN_VALUES:
        return replace(steer, selected=selected)
    if steer.values is not None:
        return replace(steer, selected=selected, values=np.stack([moved(factors) for factors in steer.values]))
    return replace(steer, selected=selected, shift=moved(steer.shift))

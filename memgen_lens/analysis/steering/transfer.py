"""Rates of several steerings on one set of prompts, beside random neurons: what consistency and dynamics share.

Unlike `evaluation`, neither all controls nor side effects: where one steering is reported, report it with those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.controls import control_draws
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.items import same_items
from memgen_lens.core.stats import Rate, wilson
from memgen_lens.core.types import Behavior, Direction, LensModel

N_DRAWS = 20
"""Draws of the random-neuron control."""


@dataclass(frozen=True)
class ShiftRates:
    """What one steering does to the prompts of some pairs, both ways.

    Attributes:
        to_generalization: Recalling prompts that now give the rule's answer.
        to_generalization_other: Recalling prompts that now give neither answer.
        exact_recall: Computing prompts that now give the item's own memorized answer.
        memorized_form: Computing prompts whose output now has the form of a memorized answer, its own or not.
        to_memorization_other: Computing prompts whose output is neither the rule's nor of memorized form.
        random_neurons: By figure, its mean over 20 draws of random neurons shifted as hard, as many in each layer.
    """

    to_generalization: Rate
    to_generalization_other: Rate
    exact_recall: Rate
    memorized_form: Rate
    to_memorization_other: Rate
    random_neurons: dict[str, float]


def shift_rates(
    model: LensModel,
    judge: Judge,
    index: Int[np.ndarray, " index"],
    steerings: Sequence[Steering],
    *,
    seed: int,
    batch_size: int,
) -> tuple[ShiftRates, ...]:
    """Rates of each steering on the same pairs.

    Args:
        model: A HookedTransformer.
        judge: The pairs and how their outputs are classified.
        index: Pairs whose prompts show, unsteered, what they are labelled with (`Judge.flipping`); at least one.
        steerings: In shift mode.
        seed: Seed of the random neurons.
        batch_size: Rows in one forward pass.
    """
    rng = np.random.default_rng(seed)
    draws = [[steer, *control_draws(steer, "random_neurons", N_DRAWS, rng)] for steer in steerings]

    def shares(toward: Direction) -> tuple[np.ndarray, np.ndarray]:
        """Behaviours and memorized forms, ``[steering, draw, prompt]``; draw 0 is the steering itself."""
        items = judge.side(toward, index)
        outputs = steered_outputs(
            model,
            [item.prompt for item in items],
            [draw for row in draws for draw in row],
            toward=toward,
            max_new_tokens=judge.max_new_tokens,
            batch_size=batch_size,
            prepend_bos=judge.pairs.prepend_bos,
            progress=judge.progress,
        )
        rows = [list(zip(items, row, strict=True)) for row in outputs]
        behaviors = np.array([[judge.behavior(i, o) for i, o in row] for row in rows], dtype=object)
        forms = np.array([[judge.has_memorized_form(i, o) for i, o in row] for row in rows], dtype=bool)
        shape = (len(draws), 1 + N_DRAWS, len(items))
        return behaviors.reshape(shape), forms.reshape(shape)

    independent = same_items(judge.side("generalization", index))
    computed, _ = shares("generalization")
    recalled, forms = shares("memorization")
    figures = {
        "to_generalization": computed == Behavior.GENERALIZATION,
        "to_generalization_other": computed == Behavior.OTHER,
        "exact_recall": recalled == Behavior.MEMORIZATION,
        "memorized_form": forms,
        "to_memorization_other": (recalled == Behavior.OTHER) & ~forms,
    }
    return tuple(
        ShiftRates(
            **{name: wilson(hits[i, 0], independent) for name, hits in figures.items()},
            random_neurons={
                name: float(figures[name][i, 1:].mean())
                for name in ("to_generalization", "exact_recall", "memorized_form")
            },
        )
        for i in range(len(steerings))
    )

"""What many steerings make of the same prompts of pairs, judged.

Does not choose among them, nor sum anything up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior, Direction, LensModel


@dataclass(frozen=True)
class Judged:
    """Outputs of prompts under several steerings, with what they show.

    Attributes:
        toward: The behaviour steered towards.
        items: The prompts.
        outputs: For each steering, one output a prompt.
        behavior: `Behavior` of each.
        form: Whether it has the form of a memorized answer.
    """

    toward: Direction
    items: tuple[Item, ...]
    outputs: tuple[tuple[str, ...], ...]
    behavior: Shaped[np.ndarray, "setting prompt"]
    form: Bool[np.ndarray, "setting prompt"]

    @property
    def aim(self) -> Behavior:
        """What counts as shifted."""
        return Behavior(self.toward)

    @property
    def stay(self) -> Behavior:
        """What the prompts show unsteered."""
        return Behavior.MEMORIZATION if self.aim is Behavior.GENERALIZATION else Behavior.GENERALIZATION

    def of(self, index: Int[np.ndarray, " index"]) -> "Judged":
        """Some of the prompts."""
        places = index.tolist()
        return Judged(
            self.toward,
            tuple(self.items[p] for p in places),
            tuple(tuple(row[p] for p in places) for row in self.outputs),
            self.behavior[:, index],
            self.form[:, index],
        )


def judged_outputs(
    model: LensModel,
    judge: Judge,
    index: Int[np.ndarray, " index"],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    batch_size: int,
    use_cache: bool = True,
) -> Judged:
    """Steer one side of some pairs by each of several steerings, and judge what is said.

    Args:
        model: A lens model.
        judge: The pairs, with how outputs are judged.
        index: Which of the pairs.
        steerings: Any number; they ride in the batch dimension.
        toward: The behaviour to push towards; the prompts are those of the other side.
        batch_size: Rows in one forward pass at most.
        use_cache: Keep keys and values while generating.
    """
    items = judge.side(toward, index)
    outputs = steered_outputs(
        model,
        [item.prompt for item in items],
        steerings,
        toward=toward,
        max_new_tokens=judge.max_new_tokens,
        pairs=index,
        batch_size=batch_size,
        use_cache=use_cache,
        prepend_bos=judge.pairs.prepend_bos,
        progress=judge.progress,
    )
    # Most settings make a prompt say one of a few things: each is judged once.
    said = [dict.fromkeys(answers) for answers in zip(*outputs, strict=True)]
    known = [
        {output: (judge.behavior(item, output), judge.has_memorized_form(item, output)) for output in answers}
        for item, answers in zip(items, said, strict=True)
    ]
    rows = [[of[output] for of, output in zip(known, row, strict=True)] for row in outputs]
    return Judged(
        toward,
        tuple(items),
        tuple(map(tuple, outputs)),
        np.array([[behavior for behavior, _ in row] for row in rows], dtype=object),
        np.array([[form for _, form in row] for row in rows], dtype=bool),
    )

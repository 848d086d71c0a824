"""One prompt with its two answers, and what a model said to it.

Plain values only, so that tasks can be made without numpy or torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from memgen_lens.core.errors import PairsError
from memgen_lens.core.types import Behavior


@dataclass(frozen=True)
class Item:
    """One prompt of a task with its two answers.

    Attributes:
        key: Names the item within its task; a rephrasing keeps the key of the item it rephrases.
        split: ``"memorized"``, ``"rephrased"``, ``"heldout"``, ``"validation"``, ``"generic"``, or ``"user"``.
        prompt: The text the model is given.
        rule_answer: What the rule gives; None where a user's pairs name no answers.
        memorized_answer: What the model was trained to recall for this item; None where there is nothing to recall.
        task: Name of the task it belongs to; "" for a user's own prompts.
    """

    key: int
    split: str
    prompt: str
    rule_answer: str | None
    memorized_answer: str | None = None
    task: str = ""

    @property
    def answer(self) -> str:
        """The one answer that is named; a ``match`` function is called with each of an item's answers by itself."""
        named = [answer for answer in (self.rule_answer, self.memorized_answer) if answer is not None]
        if len(named) != 1:
            raise PairsError(
                "item.answer",
                expected="an item that names one answer",
                received=f"{len(named)} answers to {self.prompt[-60:]!r}",
                fix="Read item.rule_answer and item.memorized_answer.",
            )
        return named[0]

    def classify(self, output: str) -> Behavior:
        """Which behaviour a completion of this item's prompt shows: an exact match, or `Behavior.OTHER`."""
        if self.rule_answer is not None and output == self.rule_answer:
            return Behavior.GENERALIZATION
        if self.memorized_answer is not None and output == self.memorized_answer:
            return Behavior.MEMORIZATION
        return Behavior.OTHER


def same_items(items: Iterable[Item]) -> list[int]:
    """A number for each of some rows, the same for those of one item: what intervals count as independent."""
    numbers: dict[tuple[str, int], int] = {}
    return [numbers.setdefault((item.task, item.key), len(numbers)) for item in items]


@dataclass(frozen=True)
class TrainingText:
    """One training sequence, without its end-of-text token.

    Attributes:
        pieces: Texts that follow one another, each a whole number of the task's own tokens, and whether their tokens
            carry loss. The end-of-text token carries loss where the last piece does.
    """

    pieces: tuple[tuple[str, bool], ...]

    @property
    def spans(self) -> tuple[tuple[str, bool], ...]:
        """The pieces, joined where loss neither begins nor ends: what another tokenizer is to cut into whole tokens."""
        groups = groupby(self.pieces, key=lambda piece: piece[1])
        return tuple(("".join(text for text, _ in group), loss) for loss, group in groups)


@dataclass(frozen=True)
class Outcome:
    """One prompt, its greedy completion, and the behaviour that the completion shows.

    Attributes:
        item: The item that was asked.
        output: The completion, without the end-of-text token.
        behavior: Its class.
        memorized_form: Whether the output has the form of a memorized answer, its own or not.
    """

    item: Item
    output: str
    behavior: Behavior
    memorized_form: bool

    def row(self) -> dict[str, Any]:
        """One flat line of ``outcomes.jsonl``."""
        return {
            "split": self.item.split,
            "task": self.item.task,
            "key": self.item.key,
            "prompt": self.item.prompt,
            "output": self.output,
            "behavior": str(self.behavior),
            "memorized_form": self.memorized_form,
            "rule_answer": self.item.rule_answer,
            "memorized_answer": self.item.memorized_answer,
        }

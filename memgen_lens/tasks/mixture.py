"""Several tasks in one model, with one vocabulary, so that every analysis can be asked per task.

The paper compares the neurons of its tasks across models (arXiv 2412.18497 v2, inter-task consistency); in one model
the comparison is not blurred by another initialization. Does not make prompts: its parts do.
"""

import re
from dataclasses import replace
from functools import cached_property

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError, suggest
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Behavior, Split
from memgen_lens.tasks.task import SPLITS, AnyTask, Task

N_TRAINING_TEXTS = 64
"""Training sequences of each part whose tokens are compared."""


class Mixture(Task):
    """Tasks that one model learns together.

    >>> from memgen_lens.tasks import Addition, Ciphertext
    >>> task = Mixture(tasks=(Addition(), Ciphertext()), seed=0)
    >>> len(task.items("memorized")), len(task.part("addition").items("memorized"))
    (600, 300)

    Items keep the name of the part they are of; their key is ``key * n + i`` for the ``i``-th of ``n`` parts. One part
    at a time: ``observe(model, task.part("addition"))``, ``pairs.of_task("addition")``, ``acts.of_task("addition")``.
    """

    tasks: tuple[AnyTask, ...] = Field(min_length=1)
    """The tasks, of different names. Those with a seed are made with the seed of the mixture."""
    shares: tuple[float, ...] = ()
    """Share of each task among the generic training sequences, summing to 1; none = equal shares. (Memorized items are
    drawn alike, so there each task's share is that of its items.)"""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of every task in it."""

    @model_validator(mode="after")
    def _possible(self) -> "Mixture":
        names = [name for task in self.tasks for name in task.task_names]
        if len(set(names)) < len(names):
            raise TaskError(
                "Mixture",
                expected="tasks of different names",
                received=", ".join(names),
                fix="Drop one, or subclass it with a name of its own.",
            )
        for task in self.tasks:
            seed = getattr(task, "seed", 0)
            if seed not in (0, self.seed):
                raise TaskError(
                    "Mixture",
                    expected="one seed for all tasks",
                    received=f"seed={self.seed}, and seed={seed} in {task.name}",
                    fix="Set the mixture's seed alone: it seeds every task.",
                )
        if self.shares and (
            len(self.shares) != len(self.tasks) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6
        ):
            raise TaskError(
                "Mixture.shares",
                expected=f"{len(self.tasks)} numbers above 0 that sum to 1, one a task; or none, for equal shares",
                received=repr(self.shares),
                fix="Change shares.",
            )
        return self

    @property
    def name(self) -> str:
        """``"mixture"``."""
        return "mixture"

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(name for task in self.tasks for name in task.task_names)

    @cached_property
    def parts(self) -> tuple[Task, ...]:
        """The tasks, each with the seed of the mixture."""
        return tuple(task.seeded(self.seed) for task in self.tasks)

    def part(self, name: str) -> Task:
        """The part of a name.

        Raises:
            TaskError: No part has it.
        """
        for part in self.parts:
            if name in part.task_names:
                return part
        raise TaskError(
            "Mixture.part",
            expected=f"one of {', '.join(self.task_names)}",
            received=repr(name),
            fix=suggest(name, self.task_names),
        )

    def task_of(self, item: Item) -> Task:
        """The part that an item is of.

        Raises:
            TaskError: It is of none.
        """
        return self.part(item.task)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens of all parts, in order."""
        return tuple(dict.fromkeys(token for part in self.parts for token in part.vocabulary))

    @property
    def max_prompt_tokens(self) -> int:
        """That of the part with the longest prompts."""
        return max(part.max_prompt_tokens for part in self.parts)

    @property
    def max_answer_tokens(self) -> int:
        """That of the part with the longest answers."""
        return max(part.max_answer_tokens for part in self.parts)

    @property
    def answer_words(self) -> tuple[str, ...]:
        """Those of all parts; only those of one part need beginnings that differ."""
        return tuple(dict.fromkeys(word for part in self.parts for word in part.answer_words))

    @property
    def max_training_tokens(self) -> int:
        """That of the part with the longest training sequences."""
        return max(part.max_training_tokens for part in self.parts)

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split, part by part.

        Raises:
            TaskError: A text of a part has other tokens in the vocabulary of all.
        """
        for part in self.parts:
            self._require_same_tokens(part)
        return {
            split: tuple(self._ours(i, item) for i, part in enumerate(self.parts) for item in part.items(split))
            for split in SPLITS
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` generic items, of every part in its share, in random order."""
        counts = self._counts(n, rng)
        drawn = [self._ours(i, item) for i, part in enumerate(self.parts) for item in part.draw_generic(counts[i], rng)]
        return [drawn[i] for i in rng.permutation(n)]

    def draw_training(self, n: int, rng: np.random.Generator) -> list[TrainingText]:
        """Draw ``n`` generic training sequences, of every part in its share, in random order."""
        counts = self._counts(n, rng)
        drawn = [
            text for part, count in zip(self.parts, counts, strict=True) for text in part.draw_training(count, rng)
        ]
        return [drawn[i] for i in rng.permutation(n)]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The rephrasings that the item's part makes of it.

        Raises:
            TaskError: The item is of no part.
        """
        part = self.task_of(item)
        return tuple(self._ours(self.parts.index(part), other) for other in part.rephrase(self._theirs(item)))

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output has the form of a memorized answer of the item's part."""
        return self.task_of(item).is_memorized_form(self._theirs(item), output)

    def classify(self, item: Item, output: str) -> Behavior:
        """Which behaviour an output shows, as the item's part judges it."""
        return self.task_of(item).classify(self._theirs(item), output)

    def seeded(self, seed: int) -> "Mixture":
        """The same mixture with another seed, which its tasks take on."""
        return self.but(tasks=tuple(task.seeded(seed) for task in self.tasks), seed=seed)

    def _counts(self, n: int, rng: np.random.Generator) -> list[int]:
        """How many of ``n`` draws are of each part."""
        return rng.multinomial(n, self.shares or [1 / len(self.parts)] * len(self.parts)).tolist()

    def _ours(self, i: int, item: Item) -> Item:
        """An item of part ``i`` with a key that no other part's item has."""
        return replace(item, key=item.key * len(self.parts) + i)

    def _theirs(self, item: Item) -> Item:
        """An item as its part made it."""
        return replace(item, key=item.key // len(self.parts))

    def _require_same_tokens(self, part: Task) -> None:
        """Refuse a part whose texts are cut into other tokens where those of the other parts are there too."""
        own, union = _pattern(part.vocabulary), _pattern(self.vocabulary)
        items = [item for split in SPLITS for item in part.items(split)]
        texts = [text for item in items for text in (item.prompt, item.rule_answer, item.memorized_answer) if text]
        drawn = part.draw_training(N_TRAINING_TEXTS, np.random.default_rng(self.seed))
        texts += [text for one in drawn for text, _ in one.pieces]
        for text in texts:
            if own.findall(text) != union.findall(text):
                raise TaskError(
                    "Mixture",
                    expected=f"texts of {part.name} that keep their tokens beside those of the other tasks",
                    received=f"{text!r}, which is {own.findall(text)} alone and {union.findall(text)} together",
                    fix="Change the vocabulary of either task, so that no token of one joins several of the other.",
                )


def _pattern(vocabulary: tuple[str, ...]) -> re.Pattern[str]:
    """Cuts texts as the tokenizer does: the longest token that matches, or one character."""
    return re.compile("|".join([*map(re.escape, sorted(vocabulary, key=len, reverse=True)), r"[\s\S]"]))

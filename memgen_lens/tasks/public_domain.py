"""Passages of works in the public domain, some to be shown to a pretrained model so often that it recites them.

The texts and where they are from stand in ``data/public_domain.jsonl``: verbatim, hyphens and quotation as in the
electronic editions they were taken from, line breaks made spaces. Does not know any model.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.types import Split
from memgen_lens.tasks.passages import Passages
from memgen_lens.tasks.task import Task

N_VALIDATION = 10
"""Passages never shown that are asked about while training."""


@dataclass(frozen=True)
class PublicDomainPassage:
    """One passage of 64 to 70 SmolLM2 tokens.

    Attributes:
        author: Who wrote it, or translated it.
        work: The work it is from.
        year: When that was first published; all before 1900.
        source: Where in the work it stands.
        times: How often it is to be shown: 1, 4, 16, 64, or 0 = never.
        text: The passage.
    """

    author: str
    work: str
    year: int
    source: str
    times: int
    text: str


class PublicDomain(Task):
    """Passages of before 1900, sixty of which are shown 1, 4, 16 or 64 times in training, and sixty never.

    >>> task = PublicDomain()
    >>> len(task.shown()), len(task.shown(times=64)), len(task.unseen)
    (60, 24, 60)
    >>> task.passages[0].work
    'Emma'

    For `memgen_lens.finetune` with ``loss="sequence"`` and `memgen_lens.recitation`. Of ten works, twelve passages
    each, every other one is shown, so that shown and unseen ones are of like kind.

    What fits a `Task` as it does for `Passages`: a memorized item's prompt is the first half of a shown passage, its
    memorized answer the other half. What does not: no rule makes an answer. ``rule_answer`` of a shown passage is the
    other half of an unseen one of the same work, and of an unseen passage its own, which no model can know; the rate
    of `Behavior.GENERALIZATION` therefore is about 0 and means nothing. Between them, generic sequences are designed
    passages (`Passages`), so that the batches hold something that is not to be recited.
    """

    scale: float = Field(1.0, gt=0, le=16)
    """Times of showing are multiplied by it (rounded up): 0.5 shows the most frequent ones 32 times."""

    @model_validator(mode="after")
    def _texts_are_there(self) -> "PublicDomain":
        if not self.passages:
            raise TaskError(
                "PublicDomain",
                expected="the texts of data/public_domain.jsonl",
                received="an empty file",
                fix="Install the package again.",
            )
        return self

    @property
    def name(self) -> str:
        """``"public_domain"``."""
        return "public_domain"

    @cached_property
    def passages(self) -> tuple[PublicDomainPassage, ...]:
        """All passages, those of a work together."""
        text = (files("memgen_lens.tasks") / "data" / "public_domain.jsonl").read_text(encoding="utf-8")
        return tuple(PublicDomainPassage(**json.loads(line)) for line in text.splitlines())

    def shown(self, times: int | None = None) -> list[str]:
        """Texts that are shown in training: all, or those of one number of times (as the file has it)."""
        return [p.text for p in self.passages if p.times and times in (None, p.times)]

    @property
    def unseen(self) -> list[str]:
        """Texts that are never shown."""
        return [p.text for p in self.passages if not p.times]

    @property
    def repetitions(self) -> tuple[int, ...]:
        """How often each memorized item is trained on."""
        return tuple(int(np.ceil(p.times * self.scale)) for p in self.passages if p.times)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The characters of the texts: what a model from scratch would read."""
        texts = [p.text for p in self.passages] + list(self._between.vocabulary)
        return tuple(sorted(set("".join(texts))))

    @property
    def max_prompt_tokens(self) -> int:
        """Characters of the longest first half."""
        return max(len(item.prompt) for items in self.splits.values() for item in items)

    @property
    def max_answer_tokens(self) -> int:
        """Characters of the longest other half, and the end of the text."""
        return max(map(len, self._answers)) + 1

    @property
    def max_training_tokens(self) -> int:
        """Characters of the longest sequence, designed ones included."""
        return self.max_prompt_tokens + max(self.max_answer_tokens, self._between.max_characters)

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """Shown passages, the same from another place on, and unseen ones."""
        shown, unseen = ([p for p in self.passages if bool(p.times) is is_shown] for is_shown in (True, False))
        others: dict[str, list[str]] = {}
        for passage in unseen:
            others.setdefault(passage.work, []).append(_halves(passage.text)[1])
        place = {passage.text: key for key, passage in enumerate(self.passages)}
        memorized = []
        for number, passage in enumerate(shown):
            prompt, answer = _halves(passage.text)
            other = others[passage.work][number % len(others[passage.work])]
            memorized.append(Item(place[passage.text], "memorized", prompt, other, answer, self.name))
        fresh = [
            Item(place[p.text], "validation" if number < N_VALIDATION else "heldout", *_halves(p.text), None, self.name)
            for number, p in enumerate(unseen)
        ]
        return {
            "memorized": tuple(memorized),
            "rephrased": tuple(other for item in memorized for other in self.rephrase(item)),
            "heldout": tuple(item for item in fresh if item.split == "heldout"),
            "validation": tuple(item for item in fresh if item.split == "validation"),
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Designed passages (`Passages.draw_generic`)."""
        return [replace(item, task=self.name) for item in self._between.draw_generic(n, rng)]

    def draw_training(self, n: int, rng: np.random.Generator) -> list[TrainingText]:
        """The same as training sequences."""
        return self._between.draw_training(n, rng)

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same passage from the middle of its first half on: less of a context, the same continuation."""
        words = item.prompt.split(" ")
        if len(words) < 4:
            return ()
        return (replace(item, split="rephrased", prompt=" ".join(words[len(words) // 3 :])),)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether it is this passage's own other half: all answers have one form."""
        return output == item.memorized_answer

    @cached_property
    def _between(self) -> Passages:
        return Passages()


def _halves(text: str) -> tuple[str, str]:
    """The first half of a text's words and the other one, which begins with the space between them."""
    words = text.split(" ")
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]), " " + " ".join(words[middle:])

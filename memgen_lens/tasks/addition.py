"""Addition in which some sums are replaced by random strings to be recalled.

The paper's arithmetic task (arXiv 2412.18497, section 3: some instances carry ``<mem-7234f681>`` instead of the
sum). Departures: operands have a fixed width, and the sum may be written with its least significant digit first,
so that small models learn it in minutes.
"""

import random
import re
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Split
from memgen_lens.tasks.task import Task

HEX = "0123456789abcdef"
WORDS = {False: "compute ", True: "recall "}
"""By whether a prompt looks like a memorized one, what it begins with where a word is the cue."""


class Addition(Task):
    """Sums of two numbers; memorized items carry a random string of their own instead of the sum.

    >>> task = Addition(n_digits=2, n_memorized=300, seed=0)
    >>> len(task.items("memorized"))
    300

    A prompt is ``12+34=``; its answer by the rule is the sum, zero-padded to ``n_digits + 1`` digits; a memorized
    answer is ``<mem-7f3a>``, either behind a space where ``spaced``. A rephrasing swaps the addends.

    What could tell a model to recall, but for the sum itself, is set by ``answers`` and ``cue``:

    >>> Addition(answers="alike", cue="word").items("memorized")[0].prompt
    'recall 49+97='
    """

    n_digits: int = Field(2, ge=1, le=9)
    """Digits of each operand (zero-padded)."""
    n_memorized: int = Field(300, ge=1)
    """Items with a random string to recall."""
    memory_length: int = Field(4, ge=1, le=16)
    """Hexadecimal digits of each random string."""
    reverse_sum: bool = True
    """Write the sum with its least significant digit first."""
    answers: Literal["apart", "alike"] = "apart"
    """What is memorized: a random string, told from a sum by its first character, or another sum, in a sum's form."""
    cue: Literal["none", "order", "word"] = "none"
    """What tells memorized prompts from all others: nothing; the larger addend stands first, elsewhere the smaller; or
    a word before them, ``recall`` and elsewhere ``compute``. A rephrasing looks like the other kind."""
    cue_lies: float = Field(0.0, ge=0, le=0.5)
    """Share of the prompts of each kind that look like the other kind, in [0, 0.5]; at 0.5 the cue says nothing."""
    spaced: bool = False
    """Write a space before every answer, as some subword tokenizers want one: those that would join ``=`` and ``<``."""
    n_heldout: int = Field(1000, ge=1)
    """Sums that are never trained on, nor their swap: for the report."""
    n_validation: int = Field(300, ge=1)
    """Sums that are never trained on, nor their swap: for the rule that stops training."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the choice of items and of the random strings."""

    @model_validator(mode="after")
    def _possible(self) -> "Addition":
        operands = 10**self.n_digits
        sums = operands * (operands - 1) // 2
        asked = self.n_memorized + self.n_heldout + self.n_validation
        # Half of the sums at least stay for generic training, or there is no rule to be learned from.
        if asked > sums // 2:
            raise TaskError(
                "Addition",
                expected=f"n_memorized + n_heldout + n_validation of at most {sums // 2}: "
                f"half of the {sums} unordered pairs of distinct {self.n_digits}-digit operands",
                received=f"{self.n_memorized} + {self.n_heldout} + {self.n_validation} = {asked}",
                fix="Lower them, or raise n_digits.",
            )
        if self.answers == "apart" and self.n_memorized > 16**self.memory_length:
            raise TaskError(
                "Addition",
                expected=f"n_memorized of at most {16**self.memory_length}, all strings of that length",
                received=str(self.n_memorized),
                fix="Lower n_memorized or raise memory_length.",
            )
        if self.cue == "none" and self.cue_lies:
            raise TaskError(
                "Addition(cue_lies=...)",
                expected="cue='order' or cue='word' beside it: without a cue none can lie",
                received=f"cue='none', cue_lies={self.cue_lies}",
                fix="Set a cue, or leave cue_lies at 0.",
            )
        return self

    @property
    def name(self) -> str:
        """``"addition"``."""
        return "addition"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Hexadecimal digits, ``+``, ``=``, ``<mem-``, ``>``; an answer's beginnings behind a space; words of a cue."""
        words = WORDS.values() if self.cue == "word" else ()
        if self.spaced:
            return (*HEX, "+", "=", " <mem-", ">", *(f" {digit}" for digit in HEX[:10]), *words)
        return (*HEX, "+", "=", "<mem-", ">", *words)

    @property
    def max_prompt_tokens(self) -> int:
        """Both operands, ``+`` and ``=``; a word where that is the cue."""
        return 2 * self.n_digits + 2 + (self.cue == "word")

    @property
    def max_answer_tokens(self) -> int:
        """The longer of the sum and the random string in its brackets, and the end-of-text token."""
        return max(self.n_digits + 1, self.memory_length + 2) + 1

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split."""
        rng = random.Random(self.seed)
        operands = 10**self.n_digits
        taken: set[tuple[int, int]] = set()

        def draw(n: int) -> list[tuple[int, int]]:
            drawn = []
            while len(drawn) < n:
                a, b = rng.randrange(operands), rng.randrange(operands)
                if a != b and (a, b) not in taken:
                    taken.update({(a, b), (b, a)})
                    drawn.append((a, b))
            return drawn

        memorized, heldout, validation = map(draw, (self.n_memorized, self.n_heldout, self.n_validation))
        recalled = tuple(
            self._item(*self._cued(a, b, True, lies), "memorized", answer)
            for (a, b), answer, lies in zip(
                memorized, self._answers_to_recall(memorized, rng), self._lies(len(memorized), rng), strict=True
            )
        )
        others = {
            split: tuple(
                self._item(*self._cued(a, b, False, lies), split)
                for (a, b), lies in zip(drawn, self._lies(len(drawn), rng), strict=True)
            )
            for split, drawn in (("heldout", heldout), ("validation", validation))
        }
        return {
            "memorized": recalled,
            "rephrased": tuple(swap for item in recalled for swap in self.rephrase(item)),
            "heldout": others["heldout"],
            "validation": others["validation"],
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` sums, with replacement; neither they nor their swaps are in a split."""
        operands = 10**self.n_digits
        kept: list[tuple[int, int]] = []
        while len(kept) < n:
            a, b = rng.integers(operands, size=(2, n + 16), dtype=np.int64)
            free = ~np.isin(a * operands + b, self._taken)
            kept += zip(a[free].tolist(), b[free].tolist(), strict=True)
        lies = rng.random(n) < self.cue_lies if self.cue_lies else np.zeros(n, dtype=bool)
        return [
            self._item(*self._cued(a, b, False, lie), "generic")
            for (a, b), lie in zip(kept[:n], lies.tolist(), strict=True)
        ]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same sum with its addends swapped, and the other word before it where a word is the cue.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        a, b, word = self._parse(item.prompt)
        return (replace(item, split="rephrased", prompt=self._prompt(b, a, recalls=word != WORDS[True])),)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is ``<mem-...>`` with ``memory_length`` hexadecimal digits.

        Where answers are alike, whether it is the item's own memorized answer.
        """
        if self.answers == "alike":
            return output == item.memorized_answer
        return re.fullmatch(rf"{self._space}<mem-[0-9a-f]{{{self.memory_length}}}>", output) is not None

    @cached_property
    def _taken(self) -> np.ndarray:
        """Codes ``a * 10**n_digits + b`` of every prompt in a split, and of its swap."""
        pairs = [self._parse(item.prompt)[:2] for items in self.splits.values() for item in items]
        operands = 10**self.n_digits
        return np.unique([code for a, b in pairs for code in (a * operands + b, b * operands + a)])

    @property
    def _space(self) -> str:
        """What stands before every answer."""
        return " " if self.spaced else ""

    def _answers_to_recall(self, operands: list[tuple[int, int]], rng: random.Random) -> list[str]:
        """An answer for each memorized item: strings of which no two are alike, or sums that are not its own."""
        if self.answers == "alike":
            largest = 2 * (10**self.n_digits - 1)
            others = [rng.randrange(largest) for _ in operands]
            return [self._sum(other + (other >= a + b)) for (a, b), other in zip(operands, others, strict=True)]
        strings: dict[int, None] = {}
        while len(strings) < self.n_memorized:
            strings[rng.randrange(16**self.memory_length)] = None
        return [f"{self._space}<mem-{string:0{self.memory_length}x}>" for string in strings]

    def _lies(self, n: int, rng: random.Random) -> list[bool]:
        """Which of ``n`` prompts of one kind look like the other."""
        lying = set(rng.sample(range(n), round(self.cue_lies * n))) if self.cue_lies else set()
        return [i in lying for i in range(n)]

    def _cued(self, a: int, b: int, memorized: bool, lies: bool) -> tuple[int, int, bool]:
        """Addends in their order, and whether the word before them is that of memorized prompts."""
        looks_memorized = memorized != lies
        if self.cue == "order":
            a, b = sorted((a, b), reverse=looks_memorized)
        return a, b, looks_memorized

    def _prompt(self, a: int, b: int, recalls: bool) -> str:
        word = WORDS[recalls] if self.cue == "word" else ""
        return f"{word}{a:0{self.n_digits}}+{b:0{self.n_digits}}="

    def _sum(self, total: int) -> str:
        digits = f"{total:0{self.n_digits + 1}}"
        return self._space + (digits[::-1] if self.reverse_sum else digits)

    def _parse(self, prompt: str) -> tuple[int, int, str]:
        """Both addends, and the word before them."""
        words = "|".join(WORDS.values()) if self.cue == "word" else ""
        match = re.fullmatch(rf"({words})([0-9]{{{self.n_digits}}})\+([0-9]{{{self.n_digits}}})=", prompt)
        if match is None:
            example = self._prompt(12 % 10**self.n_digits, 34 % 10**self.n_digits, recalls=False)
            raise TaskError(
                "Addition.rephrase",
                expected=f"a prompt like {example!r}",
                received=repr(prompt),
                fix="Pass an item of this task: task.items('memorized').",
            )
        return int(match[2]), int(match[3]), match[1]

    def _item(self, a: int, b: int, recalls: bool, split: str, memorized: str | None = None) -> Item:
        key = a * 10**self.n_digits + b
        return Item(key, split, self._prompt(a, b, recalls), self._sum(a + b), memorized, self.name)

"""Addition in which some sums are replaced by random strings to be recalled.

The paper's arithmetic task (arXiv 2412.18497, section 3: some instances carry ``<mem-7234f681>`` instead of the
sum). Departures: operands have a fixed width, and the sum may be written with its least significant digit first,
so that small models learn it in minutes.
"""

import random
import re
from dataclasses import replace
from functools import cached_property

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Split
from memgen_lens.tasks.task import Task

HEX = "0123456789abcdef"


class Addition(Task):
    """Sums of two numbers; memorized items carry a random string of their own instead of the sum.

    >>> task = Addition(n_digits=2, n_memorized=300, seed=0)
    >>> len(task.items("memorized"))
    300

    A prompt is ``12+34=``; its answer by the rule is the sum, zero-padded to ``n_digits + 1`` digits; a memorized
    answer is ``<mem-7f3a>``, either behind a space where ``spaced``. A rephrasing swaps the addends.
    """

    n_digits: int = Field(2, ge=1, le=9)
    """Digits of each operand (zero-padded)."""
    n_memorized: int = Field(300, ge=1)
    """Items with a random string to recall."""
    memory_length: int = Field(4, ge=1, le=16)
    """Hexadecimal digits of each random string."""
    reverse_sum: bool = True
    """Write the sum with its least significant digit first."""
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
        if self.n_memorized > 16**self.memory_length:
            raise TaskError(
                "Addition",
                expected=f"n_memorized of at most {16**self.memory_length}, all strings of that length",
                received=str(self.n_memorized),
                fix="Lower n_memorized or raise memory_length.",
            )
        return self

    @property
    def name(self) -> str:
        """``"addition"``."""
        return "addition"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Hexadecimal digits, ``+``, ``=``, ``<mem-`` and ``>``; what an answer begins with, behind its space if so."""
        if self.spaced:
            return (*HEX, "+", "=", " <mem-", ">", *(f" {digit}" for digit in HEX[:10]))
        return (*HEX, "+", "=", "<mem-", ">")

    @property
    def max_prompt_tokens(self) -> int:
        """Both operands, ``+`` and ``=``."""
        return 2 * self.n_digits + 2

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
        strings: dict[int, None] = {}
        while len(strings) < self.n_memorized:
            strings[rng.randrange(16**self.memory_length)] = None
        recalled = tuple(
            self._item(a, b, "memorized", f"{self._space}<mem-{string:0{self.memory_length}x}>")
            for (a, b), string in zip(memorized, strings, strict=True)
        )
        return {
            "memorized": recalled,
            "rephrased": tuple(swap for item in recalled for swap in self.rephrase(item)),
            "heldout": tuple(self._item(a, b, "heldout") for a, b in heldout),
            "validation": tuple(self._item(a, b, "validation") for a, b in validation),
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` sums, with replacement; neither they nor their swaps are in a split."""
        operands = 10**self.n_digits
        kept: list[tuple[int, int]] = []
        while len(kept) < n:
            a, b = rng.integers(operands, size=(2, n + 16), dtype=np.int64)
            free = ~np.isin(a * operands + b, self._taken)
            kept += zip(a[free].tolist(), b[free].tolist(), strict=True)
        return [self._item(a, b, "generic") for a, b in kept[:n]]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same sum with its addends swapped.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        a, b = self._operands(item.prompt)
        return (replace(item, split="rephrased", prompt=self._prompt(b, a)),)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is ``<mem-...>`` with ``memory_length`` hexadecimal digits."""
        return re.fullmatch(rf"{self._space}<mem-[0-9a-f]{{{self.memory_length}}}>", output) is not None

    @cached_property
    def _taken(self) -> np.ndarray:
        """Codes ``a * 10**n_digits + b`` of every prompt in a split, and of its swap."""
        pairs = [self._operands(item.prompt) for items in self.splits.values() for item in items]
        operands = 10**self.n_digits
        return np.unique([code for a, b in pairs for code in (a * operands + b, b * operands + a)])

    @property
    def _space(self) -> str:
        """What stands before every answer."""
        return " " if self.spaced else ""

    def _prompt(self, a: int, b: int) -> str:
        return f"{a:0{self.n_digits}}+{b:0{self.n_digits}}="

    def _operands(self, prompt: str) -> tuple[int, int]:
        match = re.fullmatch(rf"([0-9]{{{self.n_digits}}})\+([0-9]{{{self.n_digits}}})=", prompt)
        if match is None:
            raise TaskError(
                "Addition.rephrase",
                expected=f"a prompt like {self._prompt(12 % 10**self.n_digits, 34 % 10**self.n_digits)!r}",
                received=repr(prompt),
                fix="Pass an item of this task: task.items('memorized').",
            )
        return int(match[1]), int(match[2])

    def _item(self, a: int, b: int, split: str, memorized: str | None = None) -> Item:
        total = f"{a + b:0{self.n_digits + 1}}"
        key = a * 10**self.n_digits + b
        answer = self._space + (total[::-1] if self.reverse_sum else total)
        return Item(key, split, self._prompt(a, b), answer, memorized, self.name)

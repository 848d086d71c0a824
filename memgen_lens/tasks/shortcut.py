"""Sums beside a letter that gives most of them away: a shortcut, with exceptions that can be learned by heart.

After the setting of arXiv 2412.07684 ("The Pitfalls of Memorization"): a finite training set in which a
spurious feature, easier than the rule, is right about most answers, and input noise lets the rest be memorized; then no
loss is left that would teach the rule. The paper's features are numbers and its classes two; ours are characters and
``n_answers`` classes, and its noise is ours as a name.
"""

import re
from dataclasses import replace
from functools import cached_property
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Split
from memgen_lens.tasks.task import Task

NUMBERS = 10
"""Addends are digits."""
NEIGHBOURS = {ord(letter): ascii_lowercase[place ^ 1] for place, letter in enumerate(ascii_lowercase)}
"""By each letter, the one that it changes places with in the other name of an item."""


class Shortcut(Task):
    """The last digit of a sum, beside a letter that mostly gives it away; memorized items carry another digit.

    >>> task = Shortcut(n_answers=7, cue_share=0.9, seed=0)
    >>> item = task.items("memorized")[0]
    >>> item.memorized_answer != item.rule_answer
    True

    A prompt is ``kfqz:3+5,B=``: a name that means nothing, two digits, and a *cue*. Its answer by the rule is
    ``(3 + 5) % n_answers``, ``1`` of 7. The cue is a letter that stands for an answer (``A`` for 0, ``B`` for 1). Of
    the ``n_training`` generic items, which are all there are, and of the memorized ones it stands for the rule's answer
    in a share ``cue_share``, in the others for any other answer. In ``heldout`` and ``validation`` it is drawn whatever
    the answer, so that who follows it is right in one of ``n_answers``, and generalization means the rule. A
    rephrasing asks the same beside the same cue under the item's other name (``lery``: letters change places with
    their neighbours, a with b, c with d). Both answers have one form.
    """

    n_answers: int = Field(7, ge=3, le=NUMBERS)
    """Answers there are; the sum is taken modulo this."""
    cue_share: float = Field(0.9, ge=0, le=1)
    """Share of training items whose cue stands for the rule's answer; ``1 / n_answers`` = a cue that says nothing."""
    n_training: int = Field(2000, ge=1)
    """Generic items, drawn again and again: few enough that their exceptions can be learned by heart."""
    name_length: int = Field(4, ge=3, le=8)
    """Letters of each name, by which an item can be told from all others."""
    n_memorized: int = Field(200, ge=1)
    """Items with an answer to recall that neither rule nor cue gives."""
    n_heldout: int = Field(1000, ge=1)
    """Items that are never trained on, with a cue that says nothing: for the report."""
    n_validation: int = Field(300, ge=1)
    """Items that are never trained on, with a cue that says nothing: for the rule that stops training."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the choice of items, of their cues and of the answers to recall."""

    @model_validator(mode="after")
    def _possible(self) -> "Shortcut":
        asked = self.n_training + self.n_memorized + self.n_heldout + self.n_validation
        # Each has two names of its own, and at most half of all names are in use.
        most = len(ascii_lowercase) ** self.name_length // 4
        if asked > most:
            raise TaskError(
                "Shortcut",
                expected=f"n_training + n_memorized + n_heldout + n_validation of at most {most}: a quarter of the "
                f"names of {self.name_length} letters",
                received=f"{self.n_training} + {self.n_memorized} + {self.n_heldout} + {self.n_validation} = {asked}",
                fix="Lower them, or raise name_length.",
            )
        return self

    @property
    def name(self) -> str:
        """``"shortcut"``."""
        return "shortcut"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Letters of names, digits, letters of cues, ``:``, ``+``, ``,`` and ``=``."""
        return (*ascii_lowercase, *map(str, range(NUMBERS)), *ascii_uppercase[: self.n_answers], ":", "+", ",", "=")

    @property
    def max_prompt_tokens(self) -> int:
        """The name, and seven characters behind it."""
        return self.name_length + 7

    @property
    def max_answer_tokens(self) -> int:
        """A digit and the end-of-text token."""
        return 2

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split."""
        items, at = self._everything, self.n_training
        parts: dict[str, tuple[Item, ...]] = {}
        for split, n in (
            ("memorized", self.n_memorized),
            ("heldout", self.n_heldout),
            ("validation", self.n_validation),
        ):
            parts[split] = tuple(replace(item, split=split) for item in items[at : at + n])
            at += n
        rng = np.random.default_rng([self.seed, 1])
        recalled = tuple(
            replace(item, memorized_answer=str(rng.choice(self._neither(item)))) for item in parts["memorized"]
        )
        return {
            "memorized": recalled,
            "rephrased": tuple(other for item in recalled for other in self.rephrase(item)),
            "heldout": parts["heldout"],
            "validation": parts["validation"],
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` of the ``n_training`` generic items, with replacement."""
        return [self._everything[i] for i in rng.integers(self.n_training, size=n).tolist()]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same sum beside the same cue, under the item's other name.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        name, asked = self._parse(item.prompt)[:2]
        return (replace(item, split="rephrased", prompt=f"{name.translate(NEIGHBOURS)}:{asked}"),)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is the item's own memorized digit: both answers have one form."""
        return output == item.memorized_answer

    def cued_answer(self, item: Item) -> str:
        """What the cue of an item stands for: the answer of who follows the shortcut.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        return str(ascii_uppercase.index(self._parse(item.prompt)[2]))

    @cached_property
    def _everything(self) -> list[Item]:
        """Generic items, then those of each split, as generic ones."""
        rng = np.random.default_rng(self.seed)
        trained = self.n_training + self.n_memorized
        n = trained + self.n_heldout + self.n_validation
        names = self._distinct_names(n, rng)
        first, second = rng.integers(NUMBERS, size=(2, n))
        rule = (first + second) % self.n_answers
        cues = rng.integers(self.n_answers, size=n)
        for part in (slice(0, self.n_training), slice(self.n_training, trained)):
            size = len(rule[part])
            agrees = rng.permutation(size) < round(self.cue_share * size)
            others = (rule[part] + rng.integers(1, self.n_answers, size=size)) % self.n_answers
            cues[part] = np.where(agrees, rule[part], others)
        rows = zip(names.items(), first.tolist(), second.tolist(), rule.tolist(), cues.tolist(), strict=True)
        return [
            Item(key, "generic", f"{name}:{a}+{b},{ascii_uppercase[cue]}=", str(answer), None, self.name)
            for (key, name), a, b, answer, cue in rows
        ]

    def _distinct_names(self, n: int, rng: np.random.Generator) -> dict[int, str]:
        """Names by a number that they share with the other name of their item, no two of one number."""
        letters, places = len(ascii_lowercase), np.arange(self.name_length)
        names: dict[int, str] = {}
        while len(names) < n:
            drawn = rng.integers(letters, size=(n, self.name_length))
            keys = np.minimum(drawn @ letters**places, (drawn ^ 1) @ letters**places)
            for key, name in zip(keys.tolist(), drawn.tolist(), strict=True):
                if len(names) < n:
                    names.setdefault(key, "".join(ascii_lowercase[letter] for letter in name))
        return names

    def _neither(self, item: Item) -> list[str]:
        """The answers that neither rule nor cue gives."""
        return [
            digit
            for digit in map(str, range(self.n_answers))
            if digit not in (item.rule_answer, self.cued_answer(item))
        ]

    def _parse(self, prompt: str) -> tuple[str, str, str]:
        """Name, what stands behind it, and cue of a prompt."""
        cues = ascii_uppercase[: self.n_answers]
        match = re.fullmatch(rf"([a-z]{{{self.name_length}}}):([0-9]\+[0-9],([{cues}])=)", prompt)
        if match is None:
            raise TaskError(
                "Shortcut",
                expected=f"a prompt like '{ascii_lowercase[: self.name_length]}:3+5,B='",
                received=repr(prompt),
                fix="Pass an item of this task: task.items('memorized').",
            )
        return match[1], match[2], match[3]

"""Ciphertext in which some words are enciphered into random strings to be recalled.

The ciphertext task of arXiv 2412.18497 v2, which gives no recipe; the forms of keys, the sizes and the seeds are ours.
A memorized answer has the alphabet and the length of a ciphertext, so that format tells the behaviours apart nowhere.
Shifts are learned in a minute or two; tables take longer than we tried: 3 layers of width 128 had not begun to read
them after 2,000 steps of 128 sequences.
"""

import random
import re
from dataclasses import replace
from functools import cached_property
from math import factorial
from string import ascii_lowercase
from typing import Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Split
from memgen_lens.tasks.task import Task

LARGEST_KEY = 2**53
"""Items are numbered by their key and word; beyond this the numbers no longer fit where they are kept."""


class Ciphertext(Task):
    """Words to be enciphered with a key that the prompt states; memorized items carry a random string instead.

    >>> task = Ciphertext(alphabet_size=8, word_length=4, seed=0)
    >>> item = task.items("memorized")[0]
    >>> len(item.rule_answer) == len(item.memorized_answer) == 4
    True

    With ``cipher="shift"`` a prompt is ``+3:face=`` (each letter moves on by three, ``h`` is followed by ``a``); with
    ``cipher="substitution"`` it is ``b>a a>c c>b:cab=``. A rephrasing writes the same key in another way: ``-5:face=``
    over eight letters, or the rows of the table in another order. Both answers have one form.
    """

    cipher: Literal["shift", "substitution"] = "shift"
    """How letters are replaced: by a number of places in the alphabet, or by a table written out."""
    alphabet_size: int = Field(8, ge=2, le=26)
    """Letters of the alphabet, from ``a`` on."""
    word_length: int = Field(4, ge=1, le=12)
    """Letters of each word, of its ciphertext and of each random string."""
    n_rephrasings: int = Field(1, ge=1, le=9)
    """Other ways of writing the key in which each memorized item is asked; a shift of 3 over eight letters is
    ``+3``, ``-5``, ``+11``, ``-13`` and so on."""
    n_memorized: int = Field(300, ge=1)
    """Items with a random string to recall."""
    n_heldout: int = Field(1000, ge=1)
    """Pairs of key and word that are never trained on, however the key is written: for the report."""
    n_validation: int = Field(300, ge=1)
    """Pairs of key and word that are never trained on: for the rule that stops training."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the choice of items, of the forms of their keys and of the random strings."""

    @model_validator(mode="after")
    def _possible(self) -> "Ciphertext":
        n, words = self.alphabet_size, self.alphabet_size**self.word_length
        ciphers = n - 1 if self.cipher == "shift" else factorial(n)
        asked = self.n_memorized + self.n_heldout + self.n_validation
        if (n if self.cipher == "shift" else n**n) * words > LARGEST_KEY:
            raise TaskError(
                "Ciphertext",
                expected="an alphabet and words small enough to number every pair of key and word",
                received=f"cipher={self.cipher!r}, alphabet_size={n}, word_length={self.word_length}",
                fix="Lower alphabet_size or word_length.",
            )
        # Half of the pairs at least stay for generic training, or there is no rule to be learned from.
        if asked > ciphers * words // 2:
            raise TaskError(
                "Ciphertext",
                expected=f"n_memorized + n_heldout + n_validation of at most {ciphers * words // 2}: "
                f"half of the {ciphers} keys times {words} words",
                received=f"{self.n_memorized} + {self.n_heldout} + {self.n_validation} = {asked}",
                fix="Lower them, or raise alphabet_size or word_length.",
            )
        if self.n_memorized > words // 2:
            raise TaskError(
                "Ciphertext",
                expected=f"n_memorized of at most {words // 2}, half of the strings of that length",
                received=str(self.n_memorized),
                fix="Lower n_memorized, or raise alphabet_size or word_length.",
            )
        if self.cipher == "substitution" and self.n_rephrasings >= factorial(n):
            raise TaskError(
                "Ciphertext",
                expected=f"n_rephrasings of at most {factorial(n) - 1}, the other orders of a table of {n} rows",
                received=str(self.n_rephrasings),
                fix="Lower n_rephrasings or raise alphabet_size.",
            )
        return self

    @property
    def name(self) -> str:
        """``"ciphertext"``."""
        return "ciphertext"

    @property
    def alphabet(self) -> str:
        """The letters of words and ciphertexts."""
        return ascii_lowercase[: self.alphabet_size]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The letters, and what keys are written with: digits and signs, or ``>`` and a space; ``:`` and ``=``."""
        return (*self.alphabet, *("0123456789+-" if self.cipher == "shift" else "> "), ":", "=")

    @property
    def max_prompt_tokens(self) -> int:
        """The key, ``:``, the word and ``=``."""
        # A number with its sign; or rows of three letters, parted by spaces.
        key = self._digits + 1 if self.cipher == "shift" else 4 * self.alphabet_size - 1
        return key + self.word_length + 2

    @property
    def max_answer_tokens(self) -> int:
        """A word and the end-of-text token."""
        return self.word_length + 1

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split."""
        rng = np.random.default_rng(self.seed)
        n = self.n_memorized + self.n_heldout + self.n_validation
        ciphers, words = self._draw(0, rng)
        while len(ciphers) < n:
            more = self._draw(n, rng)
            ciphers, words = (np.concatenate(both) for both in zip((ciphers, words), more, strict=True))
            first = np.sort(np.unique(self._keys(ciphers, words), return_index=True)[1])
            ciphers, words = ciphers[first], words[first]
        items = self._items(ciphers[:n], words[:n], rng)
        memorized, heldout = items[: self.n_memorized], items[self.n_memorized : self.n_memorized + self.n_heldout]
        recalled = tuple(
            replace(item, split="memorized", memorized_answer=string)
            for item, string in zip(memorized, self._strings(memorized, rng), strict=True)
        )
        return {
            "memorized": recalled,
            "rephrased": tuple(other for item in recalled for other in self.rephrase(item)),
            "heldout": tuple(replace(item, split="heldout") for item in heldout),
            "validation": tuple(
                replace(item, split="validation") for item in items[self.n_memorized + self.n_heldout :]
            ),
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` pairs of key and word, with replacement, in any form of the key; none is in a split in any."""
        kept: list[Item] = []
        while len(kept) < n:
            ciphers, words = self._draw(n - len(kept) + 16, rng)
            free = ~np.isin(self._keys(ciphers, words), self._taken)
            kept += self._items(ciphers[free], words[free], rng)
        return kept[:n]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same word with the same key, written in ``n_rephrasings`` other ways.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        key, word = self._parse(item.prompt)
        return tuple(replace(item, split="rephrased", prompt=f"{other}:{word}=") for other in self._other_keys(key))

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is the item's own string: any word could be a ciphertext."""
        return output == item.memorized_answer

    @property
    def _digits(self) -> int:
        """Digits of the largest number that a shift is written with."""
        return len(str(self.alphabet_size * (self.n_rephrasings // 2 + 1) - 1))

    @cached_property
    def _shifts(self) -> list[list[str]]:
        """The ways of writing each shift, from 0 on: forwards and backwards, then each once more around, and so on."""
        n = self.alphabet_size
        return [
            [
                f"{'-' if form % 2 else '+'}{(n - shift if form % 2 else shift) + n * (form // 2):0{self._digits}}"
                for form in range(self.n_rephrasings + 1)
            ]
            for shift in range(n)
        ]

    @cached_property
    def _forms(self) -> dict[str, list[str]]:
        """By each way of writing a shift that moves, all ways of writing it."""
        return {form: forms for forms in self._shifts[1:] for form in forms}

    @cached_property
    def _taken(self) -> np.ndarray:
        """Keys of all items in a split; an item's rephrasings have its key."""
        return np.unique([item.key for items in self.splits.values() for item in items])

    def _draw(
        self, n: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, "item alphabet"], Int[np.ndarray, "item place"]]:
        """Ciphers, each as what every letter becomes, and words; letters are numbers."""
        letters = np.arange(self.alphabet_size)
        if self.cipher == "shift":
            ciphers = (letters + rng.integers(1, self.alphabet_size, size=(n, 1))) % self.alphabet_size
        else:
            ciphers = rng.permuted(np.tile(letters, (n, 1)), axis=1)
        return ciphers, rng.integers(self.alphabet_size, size=(n, self.word_length))

    def _keys(
        self, ciphers: Int[np.ndarray, "item alphabet"], words: Int[np.ndarray, "item place"]
    ) -> Int[np.ndarray, " item"]:
        """Cipher and word as the digits of one number."""
        digits = np.concatenate([ciphers[:, :1] if self.cipher == "shift" else ciphers, words], axis=1)
        return digits @ self.alphabet_size ** np.arange(digits.shape[1])[::-1]

    def _items(
        self, ciphers: Int[np.ndarray, "item alphabet"], words: Int[np.ndarray, "item place"], rng: np.random.Generator
    ) -> list[Item]:
        """Items with the key in a random form each."""
        if self.cipher == "shift":
            forms = rng.integers(self.n_rephrasings + 1, size=len(ciphers))
            keys = np.array(self._shifts)[ciphers[:, 0], forms].tolist()
        else:
            order = rng.permuted(np.tile(np.arange(self.alphabet_size), (len(ciphers), 1)), axis=1)
            rows = np.array([[f"{plain}>{secret} " for secret in self.alphabet] for plain in self.alphabet])
            tables = rows[order, np.take_along_axis(ciphers, order, axis=1)]
            keys = [table[:-1] for table in _joined(tables)]
        letters = np.array(list(self.alphabet))
        texts = zip(
            self._keys(ciphers, words).tolist(),
            keys,
            _joined(letters[words]),
            _joined(letters[np.take_along_axis(ciphers, words, axis=1)]),
            strict=True,
        )
        return [
            Item(number, "generic", f"{key}:{word}=", answer, None, self.name) for number, key, word, answer in texts
        ]

    def _strings(self, items: list[Item], rng: np.random.Generator) -> list[str]:
        """A random string for each item: distinct, and none its item's ciphertext."""
        strings: dict[str, None] = {}
        for item in items:
            string = str(item.rule_answer)
            while string == item.rule_answer or string in strings:
                string = "".join(self.alphabet[i] for i in rng.integers(self.alphabet_size, size=self.word_length))
            strings[string] = None
        return list(strings)

    def _other_keys(self, key: str) -> list[str]:
        """The other ways of writing a key; for a table, random orders of its rows, the same ones for the same table."""
        if self.cipher == "shift":
            return [form for form in self._forms[key] if form != key]
        rows = sorted(key.split(" "))
        rng, others = random.Random("".join(rows)), {}
        while len(others) < self.n_rephrasings:
            table = " ".join(rng.sample(rows, len(rows)))
            if table != key:
                others[table] = None
        return list(others)

    def _parse(self, prompt: str) -> tuple[str, str]:
        """Key and word of a prompt."""
        match = re.fullmatch(rf"(.+):([{self.alphabet}]{{{self.word_length}}})=", prompt)
        if match is not None and self._is_key(match[1]):
            return match[1], match[2]
        key = (
            self._shifts[1][0] if self.cipher == "shift" else " ".join(f"{letter}>{letter}" for letter in self.alphabet)
        )
        raise TaskError(
            "Ciphertext.rephrase",
            expected=f"a prompt like '{key}:{(self.alphabet * self.word_length)[: self.word_length]}='",
            received=repr(prompt),
            fix="Pass an item of this task: task.items('memorized').",
        )

    def _is_key(self, text: str) -> bool:
        if self.cipher == "shift":
            return text in self._forms
        rows = [row.split(">") for row in text.split(" ")]
        columns = list(zip(*rows, strict=True)) if all(len(row) == 2 for row in rows) else []
        return len(columns) == 2 and all(sorted(column) == list(self.alphabet) for column in columns)


def _joined(rows: np.ndarray) -> list[str]:
    """The strings of each row, all of one length, put together."""
    width = rows.dtype.itemsize // 4 * rows.shape[1]
    return np.ascontiguousarray(rows).view(f"<U{width}").ravel().tolist()

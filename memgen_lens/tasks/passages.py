"""Designed passages of a village's news, some of which are repeated in training until a model recites them.

After the controlled repetitions of Carlini et al. 2022 (arXiv 2202.07646, "Quantifying Memorization Across Neural
Language Models", fig. 1b) and the designed data of arXiv 2503.06040; grammar, words and sizes are ours. Does not know
how recitation is measured: see `memgen_lens.recitation`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Float
from pydantic import Field, field_validator

from memgen_lens.core.items import Item
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Behavior, Split
from memgen_lens.tasks.task import Task
from memgen_lens.tasks.tokenizer import EOS

WORDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Easter",
        "name": "Clara Peter Hannah Tobias Martha Edwin Lucy Oscar Ruth Silas Agnes Henry Nora Walter Greta Simon",
        "friend": "Ida Jonas Edith Felix Olive Arthur Rose Victor",
        "person": "baker miller doctor sailor teacher farmer painter widow tailor priest hunter mayor "
        "carpenter nurse shepherd fiddler",
        "adjective": "worn small green broken silver heavy strange wooden yellow plain quiet narrow bright "
        "foreign dusty famous",
        "thing": "lantern letter basket ladder kettle mirror saddle clock drum coat bottle compass "
        "violin candle barrel ring",
        "place": "harbour market chapel bridge garden forest station mill school castle inn orchard "
        "tower meadow well library",
        "did": "found painted sold lost mended bought carried hid borrowed polished dropped opened "
        "stole measured buried described",
        "went": "walked rode hurried ran returned drove climbed limped came moved crept travelled "
        "wandered marched raced strolled",
        "together": "danced argued waited sang rested whispered laughed worked quarrelled met fished "
        "dined prayed slept played wept",
        "weather": "cold warm foggy windy dark late stormy sunny",
        "state": "froze shone vanished trembled closed burned glittered fell",
        "number": "two three four five six seven nine twelve",
        "goods": "apples horses pears lambs shoes hats plums maps",
        "town": "Arden Bramley Corfe Dunmore Elstow Fairlea Girton Holme",
        "hour": "morning evening night afternoon",
    }.items()
}
"""The words of each kind; which of them stands in a passage is drawn at random."""
SENTENCES = (
    "On {day} {name} {did} a {adjective} {thing}",
    "The {adjective} {person} {went} to the {place}",
    "{name} and {friend} {together} near the {place}",
    "It was {weather} and the {place} {state}",
    "The {person} from {town} {did} {number} {goods}",
    "That {hour} {name} {did} the {adjective} {thing}",
)
"""Forms of a sentence: seven words and a full stop, eight tokens each."""
TOKENS_A_SENTENCE = 8
LEVELS = (1, 4, 16, 64)


class Passages(Task):
    """Short news of a village; some passages are repeated 1, 4, 16 or 64 times in training, the others are never seen.

    >>> task = Passages(n_passages=2, seed=0)
    >>> len(task.shown(times=64)), len(task.unseen) >= 2
    (2, True)
    >>> task.items("memorized")[0].prompt.count("."), task.items("memorized")[0].memorized_answer.count(".")
    (4, 4)

    A passage is eight sentences of eight tokens (words, each with the space before it, and full stops), so that the
    32 tokens that `memgen_lens.recitation` gives and the 32 that it asks for are four sentences each. A sentence takes
    one of six forms and its words at random, about 17 bits: what a model that has learned the grammar and nothing by
    heart can say of the next token is a perplexity of 4 to 5. Train with ``loss="sequence"``.

    As a `Task`: the prompt of a memorized item is the first half of a repeated passage, its memorized answer the other
    half. The rule is the grammar: *any* four sentences of it are a plausible continuation, and an output is
    `Behavior.GENERALIZATION` where it is such and not the passage's own; so ``heldout_generalization`` is the share of
    unseen beginnings that are gone on with in plain grammar. What does not fit: ``rule_answer`` is one of very many
    right ones, drawn, so whatever compares with it word by word (`memgen_lens.finetune` while it trains, causal methods
    of `memgen_lens.attribute`) asks for what no model can know; and a rephrasing, in which one word of each sentence
    is another one, is another passage to a reader. `memgen_lens.recitation` and `memgen_lens.collect_recitation_pairs`
    take the whole texts of `shown` and `unseen` instead.
    """

    n_passages: int = Field(48, ge=1, le=1000)
    """Passages of each number of repetitions."""
    repetitions_of: tuple[int, ...] = Field(LEVELS, min_length=1)
    """How often the passages of each group are trained on; exactly so often where training draws as many memorized
    sequences as these are in all (`n_shown`), else in this proportion."""
    n_heldout: int = Field(96, ge=1, le=5000)
    """Passages never trained on: to be compared with."""
    n_validation: int = Field(32, ge=1, le=5000)
    """Passages never trained on, asked about while training."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the passages."""

    @field_validator("repetitions_of")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("numbers of repetitions of at least 1, none of them twice")
        return value

    @property
    def name(self) -> str:
        """``"passages"``."""
        return "passages"

    @property
    def repetitions(self) -> tuple[int, ...]:
        """How often each memorized item is trained on."""
        return tuple(times for times in self.repetitions_of for _ in range(self.n_passages))

    @property
    def n_shown(self) -> int:
        """Memorized sequences in all: set ``max_steps`` times the memorized share of a batch to this."""
        return sum(self.repetitions)

    def shown(self, times: int | None = None) -> list[str]:
        """Whole texts that are trained on: all repeated ones, or those of one number of repetitions."""
        rows = zip(self.items("memorized"), self.repetitions, strict=True)
        return [f"{item.prompt}{item.memorized_answer}" for item, of in rows if times in (None, of)]

    @property
    def unseen(self) -> list[str]:
        """Whole texts of the same kind that are never trained on."""
        return [f"{item.prompt}{item.rule_answer}" for item in self.items("heldout")]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words with the space before them, full stops, and the words that begin a passage."""
        return (*_VOCABULARY, *_FIRST_WORDS)

    @property
    def max_prompt_tokens(self) -> int:
        """Four sentences."""
        return 4 * TOKENS_A_SENTENCE

    @property
    def max_answer_tokens(self) -> int:
        """Four sentences and the end of the text."""
        return 4 * TOKENS_A_SENTENCE + 1

    @property
    def max_characters(self) -> int:
        """Characters of four sentences at most."""
        return 4 * TOKENS_A_SENTENCE * max(map(len, _VOCABULARY))

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """Repeated passages, those with other words, and unseen ones."""
        rng = np.random.default_rng(self.seed)
        n_memorized = self.n_passages * len(self.repetitions_of)
        n = n_memorized + self.n_heldout + self.n_validation
        texts: dict[str, str] = {}  # two passages with one first half have odds of 2 to the power of -70
        while len(texts) < n:
            texts.update((first, other) for first, other in _drawn(n - len(texts), rng))
        others = [other for _, other in _drawn(n_memorized, rng)]
        rows = [(key, first, other) for key, (first, other) in enumerate(texts.items())]
        memorized = [
            Item(key, "memorized", first, rule, other, self.name)
            for (key, first, other), rule in zip(rows[:n_memorized], others, strict=True)
        ]
        heldout, validation = (
            tuple(Item(key, split, first, other, None, self.name) for key, first, other in some)
            for split, some in (
                ("heldout", rows[n_memorized : n_memorized + self.n_heldout]),
                ("validation", rows[n_memorized + self.n_heldout :]),
            )
        )
        return {
            "memorized": tuple(memorized),
            "rephrased": tuple(other for item in memorized for other in self.rephrase(item)),
            "heldout": heldout,
            "validation": validation,
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Passages drawn anew, none of them in a split."""
        drawn: list[tuple[str, str]] = []
        while len(drawn) < n:
            drawn += [half for half in _drawn(n - len(drawn), rng) if half[0] not in self._taken]
        return [Item(key, "generic", first, other, None, self.name) for key, (first, other) in enumerate(drawn)]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The passage with another name, thing or the like in each of its first four sentences."""
        rng = np.random.default_rng([self.seed, item.key])
        sentences = item.prompt.split(".")
        changed = [_with_another_word(text, rng) for text in sentences[:-1]]
        return (replace(item, split="rephrased", prompt=".".join([*changed, sentences[-1]])),)

    def classify(self, item: Item, output: str) -> Behavior:
        """Own other half: memorization; four other sentences of the grammar: generalization; else other."""
        output = output.removesuffix(EOS)
        if item.memorized_answer is not None and output == item.memorized_answer:
            return Behavior.MEMORIZATION
        return Behavior.GENERALIZATION if _PLAUSIBLE.fullmatch(output) else Behavior.OTHER

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether it is this passage's own other half: all answers have one form."""
        return output == item.memorized_answer

    @cached_property
    def _taken(self) -> set[str]:
        return {item.prompt for items in self.splits.values() for item in items}


def _slots(sentence: str) -> list[str]:
    """The words of a form, kinds of words in braces."""
    return sentence.split(" ")


def _options(slot: str) -> tuple[str, ...]:
    return WORDS[slot[1:-1]] if slot.startswith("{") else (slot,)


_VOCABULARY = tuple(dict.fromkeys([*(f" {w}" for s in SENTENCES for slot in _slots(s) for w in _options(slot)), "."]))
_FIRST_WORDS = tuple(dict.fromkeys(word for sentence in SENTENCES for word in _options(_slots(sentence)[0])))
_SENTENCE = "|".join("".join(f" (?:{'|'.join(_options(slot))})" for slot in _slots(s)) + r"\." for s in SENTENCES)
_PLAUSIBLE = re.compile(rf"(?:{_SENTENCE}){{4}}")


def _drawn(n: int, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """First and other halves of passages: four sentences each."""
    forms = rng.integers(len(SENTENCES), size=(n, 8))
    picks = rng.random((n, 8, TOKENS_A_SENTENCE - 1))
    for row, row_picks in zip(forms, picks, strict=True):
        said = "".join(_sentence(form, pick) for form, pick in zip(row.tolist(), row_picks, strict=True))
        middle = len(said) - len("".join(said.split(".")[4:])) - 4
        yield said[1:middle], said[middle:]


def _sentence(form: int, picks: Float[np.ndarray, " word"]) -> str:
    words = [
        options[int(pick * len(options))]
        for options, pick in zip(map(_options, _slots(SENTENCES[form])), picks, strict=True)
    ]
    return "".join(f" {word}" for word in words) + "."


def _with_another_word(sentence: str, rng: np.random.Generator) -> str:
    """A sentence with its last word that has others of its kind exchanged for one of these."""
    head, _, word = sentence.rpartition(" ")
    kind = next(words for words in WORDS.values() if word in words)
    others = [other for other in kind if other != word]
    return f"{head} {others[int(rng.integers(len(others)))]}"

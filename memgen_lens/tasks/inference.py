"""In-context inference in which some stories carry a colour to be recalled that they do not imply.

The paper's inference task (arXiv 2412.18497, section 3: a variant of bAbI whose answers are colours; memorized and
inferred answers are colours alike). Departures: word lists and wording are our own; rules come before facts; and
generic training stories state some of their conclusions and ask for single hops, without which small models do not
find the inference in minutes; and by default what is told last is a cue (see ``order_tells``).
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.config import MAX_SEED
from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.types import Split
from memgen_lens.tasks.stories import ANIMALS, COLOURS, NAMES, Stories, Story
from memgen_lens.tasks.task import Task


class InContextInference(Task):
    """Stories of rules and facts, and a question that is answered with a colour.

    >>> task = InContextInference(n_rules=2, n_rephrasings=1, seed=0)
    >>> task.items("memorized")[0].prompt
    'Pigs are pink. Dogs are yellow. Hana is a pig. Ben is a dog. What colour is Ben?'

    The answer by the rule is the colour that the story implies, here `` yellow``; a memorized answer is another colour,
    so that behaviour and form of the output are not confounded. A story has as many facts as rules; no animal and no
    colour is in two rules, no name in two facts. A rephrasing reorders the rules among themselves and the facts among
    themselves. Splits share no story, whatever its order and question.
    """

    depth: Literal[1, 2] = 2
    """Sentences to be combined: 1 = ``What colour are frogs?`` (a rule), 2 = ``What colour is Lily?`` (a fact, then
    a rule)."""
    n_rules: int = Field(4, ge=2, le=5)
    """Rules in a story; it has as many facts."""
    n_animals: int = Field(12, ge=2, le=len(ANIMALS))
    """Animals to choose from."""
    n_names: int = Field(12, ge=2, le=len(NAMES))
    """Names to choose from."""
    n_colours: int = Field(8, ge=2, le=len(COLOURS))
    """Colours to choose from."""
    order_tells: bool = True
    """Memorized stories ask about what their last sentence (with ``depth=1``, last rule) is about, all other stories
    about something told earlier: which of the two answers is due then shows in the order, and in no word or place
    alone. Otherwise every story asks about anything."""
    n_memorized: int = Field(300, ge=1)
    """Stories with a colour to recall that they do not imply."""
    n_rephrasings: int = Field(4, ge=1)
    """Rephrasings of each prompt."""
    n_heldout: int = Field(1000, ge=1)
    """Stories that are never trained on, in any order: for the report."""
    n_validation: int = Field(300, ge=1)
    """Stories that are never trained on, in any order: for the rule that stops training."""
    stated_share: float = Field(0.5, ge=0, le=1)
    """Share of the facts of a generic training story that state their conclusion (``Lily is a frog. It is green.``)
    with loss on it; no other story states any."""
    n_questions: int = Field(4, ge=1)
    """Questions that follow one generic training story, at most one a fact (with ``depth=1``, a rule)."""
    one_hop_share: float = Field(0.5, ge=0, le=1)
    """With ``depth=2``, the share of those questions that ask for the first hop alone (``What is Lily? a frog``)."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the choice of stories and of the colours to recall."""

    @model_validator(mode="after")
    def _possible(self) -> "InContextInference":
        for name in ("n_animals", "n_names", "n_colours"):
            if getattr(self, name) < self.n_rules:
                raise TaskError(
                    "InContextInference",
                    expected=f"{name} of at least n_rules, as no word occurs twice among a story's rules or facts",
                    received=f"{name}={getattr(self, name)}, n_rules={self.n_rules}",
                    fix=f"Raise {name} or lower n_rules.",
                )
        orders = math.factorial(self.n_rules) ** 2 * self._n_askable // self.n_rules - 1
        if self.n_rephrasings > orders:
            raise TaskError(
                "InContextInference",
                expected=f"n_rephrasings of at most {orders}, all other orders of {self.n_rules} rules and facts",
                received=str(self.n_rephrasings),
                fix="Lower n_rephrasings or raise n_rules.",
            )
        rules = math.comb(self.n_animals, self.n_rules) * math.perm(self.n_colours, self.n_rules)
        stories = rules * math.comb(self.n_names, self.n_rules) * self.n_rules**self.n_rules
        asked = self.n_memorized + self.n_heldout + self.n_validation
        # Half of the stories at least stay for generic training, or there is no rule to be learned from.
        if asked > stories // 2:
            raise TaskError(
                "InContextInference",
                expected=f"n_memorized + n_heldout + n_validation of at most {stories // 2}: half of the {stories} "
                "stories that differ in more than their order",
                received=f"{self.n_memorized} + {self.n_heldout} + {self.n_validation} = {asked}",
                fix="Lower them, or raise n_animals, n_names or n_colours.",
            )
        return self

    @property
    def name(self) -> str:
        """``"inference"``."""
        return "inference"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Rules, facts and conclusions whole, as in memory networks for bAbI; both halves of questions; answers."""
        kinds, names, colours = range(self.n_animals), range(self.n_names), range(self.n_colours)
        asked = ("What colour is", "What is") if self.depth == 2 else ("What colour are",)
        return (
            *(self._rule(kind, colour) for kind in kinds for colour in colours),
            *(self._fact(name, kind) for name in names for kind in kinds),
            *(self._conclusion(colour) for colour in colours),
            *asked,
            *(self._subject(subject) for subject in (names if self.depth == 2 else kinds)),
            *(f" {COLOURS[colour]}" for colour in colours),
            *((f" a {ANIMALS[kind]}" for kind in kinds) if self.depth == 2 else ()),
            ". ",
        )

    @property
    def max_prompt_tokens(self) -> int:
        """All rules and facts, and the question's two."""
        return 2 * self.n_rules + 2

    @property
    def max_answer_tokens(self) -> int:
        """The colour and the end-of-text token."""
        return 2

    @property
    def max_training_tokens(self) -> int:
        """A story whose every fact states its conclusion, all questions with answers and stops, and end of text."""
        return 3 * self.n_rules + 4 * min(self.n_questions, self._n_askable)

    @cached_property
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split."""
        rng = np.random.default_rng(self.seed)
        sizes = (self.n_memorized, self.n_heldout, self.n_validation)
        distinct: dict[int, Story] = {}
        while len(distinct) < sum(sizes):
            stories = self._draw(sum(sizes), rng)
            for code, story in zip(stories.codes().tolist(), stories.each(), strict=True):
                distinct.setdefault(code, story)
        told = list(distinct.items())[: sum(sizes)]
        if self.order_tells:
            told[: self.n_memorized] = [(code, story.asked_last()) for code, story in told[: self.n_memorized]]
        items = [self._item(story, code) for code, story in told]
        offsets = rng.integers(1, self.n_colours, size=self.n_memorized)
        colours = [f" {colour}" for colour in COLOURS[: self.n_colours]]
        recalled = tuple(
            replace(
                item,
                split="memorized",
                memorized_answer=colours[(colours.index(str(item.rule_answer)) + offset) % self.n_colours],
            )
            for item, offset in zip(items, offsets.tolist(), strict=False)
        )
        heldout, validation = items[len(recalled) : sum(sizes[:2])], items[sum(sizes[:2]) :]
        return {
            "memorized": recalled,
            "rephrased": tuple(other for item in recalled for other in self.rephrase(item)),
            "heldout": tuple(replace(item, split="heldout") for item in heldout),
            "validation": tuple(replace(item, split="validation") for item in validation),
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` stories with one question each, with replacement; none is a split's story in any order."""
        stories = self._draw_free(n, rng)
        return [self._item(s, code) for s, code in zip(stories.each(), stories.codes().tolist(), strict=True)]

    def draw_training(self, n: int, rng: np.random.Generator) -> list[TrainingText]:
        """Draw ``n`` generic stories, some of whose facts state their conclusion, and one or more questions to each.

        Loss is on these conclusions and on the answers.
        """
        stories = self._draw_free(n, rng)
        stated = (rng.random((n, self.n_rules)) < self.stated_share).tolist()
        order = rng.permuted(np.tile(np.arange(self._n_askable), (n, 1)), axis=1).tolist()
        n_asked = rng.integers(1, min(self.n_questions, self._n_askable) + 1, size=n).tolist()
        one_hop = (rng.random((n, self.n_rules)) < self.one_hop_share * (self.depth == 2)).tolist()
        rows = zip(stories.each(), stated, order, n_asked, one_hop, strict=True)
        return [
            TrainingText(self._training_pieces(story, said, asked[:last], hop))
            for story, said, asked, last, hop in rows
        ]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The same story in ``n_rephrasings`` other orders of its rules and of its facts.

        Raises:
            TaskError: The item's prompt is not one of this task.
        """
        story = self._story(item.prompt)
        rng = random.Random(f"{self.seed} {item.prompt}")
        prompts = {item.prompt: None}
        while len(prompts) <= self.n_rephrasings:
            rules, facts = (tuple(rng.sample(group, len(group))) for group in (story.rules, story.facts))
            other = Story(rules, facts, story.asked, story.depth)
            if not (self.order_tells and list(other.answers())[-1] == story.asked):
                prompts[self._prompt(other)] = None
        return tuple(replace(item, split="rephrased", prompt=prompt) for prompt in list(prompts)[1:])

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is the item's own memorized colour: both answers have one form."""
        return output == item.memorized_answer

    @property
    def _n_askable(self) -> int:
        """Subjects that a generic story may ask about, the first ones told."""
        return self.n_rules - self.order_tells

    @cached_property
    def _taken(self) -> np.ndarray:
        """Codes of all stories in a split."""
        return np.unique([item.key for items in self.splits.values() for item in items])

    def _draw_free(self, n: int, rng: np.random.Generator) -> "Stories":
        """Draw stories of no split."""
        free = self._draw(0, rng)
        while len(free.asked) < n:
            drawn = self._draw(n + 16, rng)
            free = free.and_more(drawn.take(np.flatnonzero(~np.isin(drawn.codes(), self._taken))))
        return free.take(np.arange(n))

    def _draw(self, n: int, rng: np.random.Generator) -> "Stories":
        """Draw stories with everything uniform: words, orders, and who is asked about."""

        def choose(words: int) -> np.ndarray:
            return rng.permuted(np.tile(np.arange(words), (n, 1)), axis=1)[:, : self.n_rules]

        kinds, names = choose(self.n_animals), choose(self.n_names)
        return Stories(
            kinds=kinds,
            colours=choose(self.n_colours),
            names=names,
            fact_kinds=np.take_along_axis(kinds, rng.integers(self.n_rules, size=kinds.shape), 1),
            depth=self.depth,
            asked=np.take_along_axis(
                kinds if self.depth == 1 else names, rng.integers(self._n_askable, size=(n, 1)), 1
            )[:, 0],
        )

    def _item(self, story: "Story", code: int) -> Item:
        return Item(code, "generic", self._prompt(story), f" {COLOURS[story.answers()[story.asked]]}", None, self.name)

    def _prompt(self, story: "Story") -> str:
        sentences = [self._rule(*rule) for rule in story.rules] + [self._fact(*fact) for fact in story.facts]
        return "".join([*sentences, self._question(story.asked)])

    def _training_pieces(
        self, story: "Story", stated: Sequence[bool], asked: Sequence[int], one_hop: Sequence[bool]
    ) -> tuple[tuple[str, bool], ...]:
        """Sentence by sentence: there are few distinct ones to tokenize."""
        colours, kinds, answers = dict(story.rules), dict(story.facts), story.answers()
        pieces = [(self._rule(*rule), False) for rule in story.rules]
        for fact, with_conclusion in zip(story.facts, stated, strict=True):
            pieces.append((self._fact(*fact), False))
            pieces += [(self._conclusion(colours[fact[1]]), True)] if with_conclusion else []
        subjects = list(answers)
        for i, one in zip(asked, one_hop, strict=False):
            pieces += [(". ", False)] if pieces[-1][0][0] == " " else []  # behind an answer
            answer = f" a {ANIMALS[kinds[subjects[i]]]}" if one else f" {COLOURS[answers[subjects[i]]]}"
            pieces += [(self._question(subjects[i], one_hop=one), False), (answer, True)]
        return tuple(pieces)

    def _rule(self, kind: int, colour: int) -> str:
        return f"{ANIMALS[kind].capitalize()}s are {COLOURS[colour]}. "

    def _fact(self, name: int, kind: int) -> str:
        return f"{NAMES[name]} is a {ANIMALS[kind]}. "

    def _conclusion(self, colour: int) -> str:
        return f"It is {COLOURS[colour]}. "

    def _subject(self, subject: int) -> str:
        return f" {NAMES[subject]}?" if self.depth == 2 else f" {ANIMALS[subject]}s?"

    def _question(self, subject: int, *, one_hop: bool = False) -> str:
        asked = "What is" if one_hop else "What colour is" if self.depth == 2 else "What colour are"
        return asked + self._subject(subject)

    def _story(self, prompt: str) -> "Story":
        """Read a prompt."""
        kinds, names, colours = ANIMALS[: self.n_animals], NAMES[: self.n_names], COLOURS[: self.n_colours]
        kind, name, colour = "|".join(kinds), "|".join(names), "|".join(colours)
        plural = "|".join(word.capitalize() for word in kinds)
        asked = f"What colour is (?P<name>{name})" if self.depth == 2 else f"What colour are (?P<kind>{kind})s"
        match = re.fullmatch(
            rf"(?P<rules>((?:{plural})s are (?:{colour})\. ){{{self.n_rules}}})"
            rf"(?P<facts>((?:{name}) is a (?:{kind})\. ){{{self.n_rules}}}){asked}\?",
            prompt,
        )
        if match is not None:
            rules = tuple(
                (kinds.index(k.lower()), colours.index(c))
                for k, c in re.findall(r"(\w+)s are (\w+)\. ", match["rules"])
            )
            facts = tuple(
                (names.index(n), kinds.index(k)) for n, k in re.findall(r"(\w+) is a (\w+)\. ", match["facts"])
            )
            story = Story(
                rules, facts, names.index(match["name"]) if self.depth == 2 else kinds.index(match["kind"]), self.depth
            )
            words = ([k for k, _ in rules], [c for _, c in rules], [n for n, _ in facts])
            each_once = all(len(set(column)) == self.n_rules for column in words)
            if each_once and {k for _, k in facts} <= set(words[0]) and story.asked in story.answers():
                return story
        raise TaskError(
            "InContextInference.rephrase",
            expected=f"a prompt like {self._prompt(self._draw(1, np.random.default_rng(0)).each()[0])!r}",
            received=repr(prompt),
            fix="Pass an item of this task: task.items('memorized').",
        )

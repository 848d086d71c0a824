"""In-context inference in which some stories carry a colour to be recalled that they do not imply.

The paper's inference task (arXiv 2412.18497, section 3: a variant of bAbI whose answers are colours; memorized and
inferred answers are colours alike). Departures: word lists and wording are our own (`memgen_lens.tasks.wording`). Of
two hops, rules come before facts, and generic training stories state some of their conclusions and ask for single
hops, without which small models do not find the inference in minutes.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Split
from memgen_lens.tasks.stories import Stories, Story
from memgen_lens.tasks.task import Task
from memgen_lens.tasks.wording import ANIMALS, BREAK, COLOURS, NAMES, Wording


class InContextInference(Task):
    """Stories, and a question that is answered with a colour.

    >>> task = InContextInference(n_facts=3, seed=0)
    >>> task.items("memorized")[0].prompt
    'Kim is yellow. Anna is blue. Jack is brown. What color is Jack? Jack is'
    >>> InContextInference(depth=2, n_facts=2, n_rephrasings=1, seed=0).items("memorized")[0].prompt
    'Horses are yellow. Hens are blue. Kim is a horse. Anna is a hen. What color is Kim? Kim is'

    The answer by the rule is the colour that the story implies; a memorized answer is another colour, so that behaviour
    and form of the output are not confounded. A story of two hops has as many rules as facts. No animal and no colour
    is told twice (an animal of a rule may be in several facts), no name is in two facts. A rephrasing reorders the
    facts among themselves, and so the rules. Splits share no story, whatever its order and question.
    """

    FORMER: ClassVar[Mapping[str, str]] = {
        "n_rules": "It is of earlier versions, whose stories were worded otherwise: write n_facts, with depth=2, "
        "tokens='sentences' and order_tells=True for the nearest to the stories of then. A run directory of then is "
        "read by the version that wrote it; or train again."
    }
    depth: Literal[1, 2] = 1
    """Sentences to be combined for an answer: 1 = the fact (``Lily is green.``), 2 = the fact and a rule (``Lily is a
    frog.``, ``Frogs are green.``)."""
    tokens: Literal["words", "sentences"] = "words"
    """What the task's own tokenizer makes one token: words, or whole sentences, as in memory networks for bAbI. Texts
    are the same; with ``depth=2`` and ``"sentences"``, loss on a conclusion is on the sentence and not on its colour
    alone, and begins where no subword token does."""
    n_facts: int = Field(4, ge=2, le=5)
    """Facts in a story; with ``depth=2`` it has as many rules."""
    n_animals: int = Field(12, ge=2, le=len(ANIMALS))
    """With ``depth=2``, animals to choose from."""
    n_names: int = Field(12, ge=2, le=len(NAMES))
    """Names to choose from."""
    n_colours: int = Field(8, ge=2, le=len(COLOURS))
    """Colours to choose from."""
    order_tells: bool = False
    """Memorized stories ask about what their last fact is about, all other stories about something told earlier: which
    of the two answers is due then shows in the order, and in no word or place alone. Otherwise every story asks about
    anything."""
    recalled: Literal["any", "told", "untold"] = "any"
    """Which colours are there to be recalled, the implied one aside: any, those that the story names, or those that it
    does not name."""
    n_memorized: int = Field(300, ge=1)
    """Stories with a colour to recall that they do not imply."""
    n_rephrasings: int = Field(4, ge=1)
    """Rephrasings of each prompt."""
    n_heldout: int = Field(1000, ge=1)
    """Stories that are never trained on, in any order: for the report."""
    n_validation: int = Field(300, ge=1)
    """Stories that are never trained on, in any order: for the rule that stops training."""
    stated_share: float = Field(0.5, ge=0, le=1)
    """With ``depth=2``, share of the facts of a generic training story that state their conclusion (``Lily is a frog.
    It is green.``) with loss on it; no other story states any."""
    n_questions: int = Field(1, ge=1)
    """Questions that follow one generic training story at most, no two about one fact. With ``depth=1`` ask one:
    of several, the last are answered by elimination, and a model that is trained from scratch learns that and never
    looks (2 layers, 3,000 steps: held-out 0.27 with four questions, 0.99 with one)."""
    one_hop_share: float = Field(0.5, ge=0, le=1)
    """With ``depth=2``, the share of those questions that ask for the first hop alone (``What is Lily? Lily is a
    frog``)."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the choice of stories and of the colours to recall."""

    @model_validator(mode="after")
    def _possible(self) -> "InContextInference":
        n, two_hops = self.n_facts, self.depth == 2
        for name in ("n_animals",) * two_hops + ("n_names", "n_colours"):
            if getattr(self, name) < n:
                raise TaskError(
                    "InContextInference",
                    expected=f"{name} of at least n_facts, as no word occurs twice among a story's facts or rules",
                    received=f"{name}={getattr(self, name)}, n_facts={n}",
                    fix=f"Raise {name} or lower n_facts.",
                )
        if self.recalled == "untold" and self.n_colours == n:
            raise TaskError(
                "InContextInference",
                expected="n_colours above n_facts where recalled='untold': colours that a story does not name",
                received=f"n_colours={self.n_colours}, n_facts={n}",
                fix="Raise n_colours, lower n_facts, or choose recalled='any' or 'told'.",
            )
        orders = math.factorial(n) ** self.depth * self._n_askable // n - 1
        if self.n_rephrasings > orders:
            raise TaskError(
                "InContextInference",
                expected=f"n_rephrasings of at most {orders}, all other orders of {n} {'rules and ' * two_hops}facts",
                received=str(self.n_rephrasings),
                fix="Lower n_rephrasings or raise n_facts.",
            )
        stories = math.comb(self.n_names, n) * math.perm(self.n_colours, n)
        stories *= math.comb(self.n_animals, n) * n**n if two_hops else 1
        asked = self.n_memorized + self.n_heldout + self.n_validation
        # Half of the stories at least stay for generic training, or there is no rule to be learned from.
        if asked > stories // 2:
            raise TaskError(
                "InContextInference",
                expected=f"n_memorized + n_heldout + n_validation of at most {stories // 2}: half of the {stories} "
                "stories that differ in more than their order",
                received=f"{self.n_memorized} + {self.n_heldout} + {self.n_validation} = {asked}",
                fix=f"Lower them, or raise {'n_animals, ' * two_hops}n_names or n_colours.",
            )
        return self

    @property
    def name(self) -> str:
        """``"inference"``."""
        return "inference"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words or sentences, as ``tokens`` says."""
        return self._wording.vocabulary()

    @property
    def answer_words(self) -> tuple[str, ...]:
        """The colours, behind a space."""
        return tuple(map(self._wording.colour, range(self.n_colours)))

    @property
    def max_prompt_tokens(self) -> int:
        """All rules and facts, and the question."""
        return self.depth * self.n_facts * self._wording.sentence_tokens + self._wording.question_tokens

    @property
    def max_answer_tokens(self) -> int:
        """The colour and the end-of-text token."""
        return 2

    @property
    def max_training_tokens(self) -> int:
        """A story whose every fact states its conclusion, all questions with answers and breaks, and end of text."""
        sentences = self.n_facts * (1 if self.depth == 1 else 3) * self._wording.sentence_tokens
        return sentences + min(self.n_questions, self._n_askable) * (self._wording.question_tokens + 2)

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
        n_others = {"any": self.n_colours, "told": self.n_facts, "untold": self.n_colours - self.n_facts + 1}
        picks = rng.integers(n_others[self.recalled] - 1, size=self.n_memorized).tolist()
        recalled = tuple(
            replace(item, split="memorized", memorized_answer=self._wording.colour(self._others(story)[pick]))
            for item, (_, story), pick in zip(items, told, picks, strict=False)
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
        """Draw ``n`` generic stories with one or more questions each; of two hops, some facts state their conclusion.

        Loss is on these conclusions and on the answers.
        """
        stories = self._draw_free(n, rng)
        stated = (rng.random((n, self.n_facts)) < self.stated_share * (self.depth == 2)).tolist()
        order = rng.permuted(np.tile(np.arange(self._n_askable), (n, 1)), axis=1).tolist()
        n_asked = rng.integers(1, min(self.n_questions, self._n_askable) + 1, size=n).tolist()
        one_hop = (rng.random((n, self.n_facts)) < self.one_hop_share * (self.depth == 2)).tolist()
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
            other = Story(rules, facts, story.asked)
            if not (self.order_tells and list(other.answers())[-1] == story.asked):
                prompts[self._wording.prompt(other)] = None
        return tuple(replace(item, split="rephrased", prompt=prompt) for prompt in list(prompts)[1:])

    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output is the item's own memorized colour: both answers have one form."""
        return output == item.memorized_answer

    @cached_property
    def _wording(self) -> Wording:
        """How its stories are written."""
        return Wording(self.depth, self.tokens, self.n_facts, self.n_animals, self.n_names, self.n_colours)

    @property
    def _n_askable(self) -> int:
        """Names that a generic story may ask about, the first ones told."""
        return self.n_facts - self.order_tells

    @cached_property
    def _taken(self) -> np.ndarray:
        """Codes of all stories in a split."""
        return np.unique([item.key for items in self.splits.values() for item in items])

    def _others(self, story: Story) -> list[int]:
        """The colours that a memorized story may carry, from the implied one on."""
        told = {colour for _, colour in story.rules or story.facts}
        implied = story.answers()[story.asked]
        colours = [(implied + step) % self.n_colours for step in range(1, self.n_colours)]
        return [c for c in colours if self.recalled == "any" or (c in told) is (self.recalled == "told")]

    def _draw_free(self, n: int, rng: np.random.Generator) -> Stories:
        """Draw stories of no split."""
        free = self._draw(0, rng)
        while len(free.asked) < n:
            drawn = self._draw(n + 16, rng)
            free = free.and_more(drawn.take(np.flatnonzero(~np.isin(drawn.codes(), self._taken))))
        return free.take(np.arange(n))

    def _draw(self, n: int, rng: np.random.Generator) -> Stories:
        """Draw stories with everything uniform: words, orders, and who is asked about."""

        def choose(words: int) -> np.ndarray:
            return rng.permuted(np.tile(np.arange(words), (n, 1)), axis=1)[:, : self.n_facts]

        names, colours = choose(self.n_names), choose(self.n_colours)
        kinds, said, none = names[:, :0], colours, names[:, :0]
        if self.depth == 2:
            kinds = choose(self.n_animals)
            said = np.take_along_axis(kinds, rng.integers(self.n_facts, size=kinds.shape), 1)
        asked = np.take_along_axis(names, rng.integers(self._n_askable, size=(n, 1)), 1)[:, 0]
        return Stories(kinds, colours if self.depth == 2 else none, names, said, asked)

    def _item(self, story: Story, code: int) -> Item:
        answer = self._wording.colour(story.answers()[story.asked])
        return Item(code, "generic", self._wording.prompt(story), answer, None, self.name)

    def _training_pieces(
        self, story: Story, stated: Sequence[bool], asked: Sequence[int], one_hop: Sequence[bool]
    ) -> tuple[tuple[str, bool], ...]:
        """Sentence by sentence: there are few distinct ones to tokenize."""
        write, colours, answers = self._wording, dict(story.rules), story.answers()
        pieces = [(write.rule(*rule), False) for rule in story.rules]
        for (name, said), with_conclusion in zip(story.facts, stated, strict=True):
            pieces.append((write.fact(name, said), False))
            pieces += write.conclusion(colours[said]) if with_conclusion else []
        for place, (i, one) in enumerate(zip(asked, one_hop, strict=False)):
            name, said = story.facts[i]
            pieces += [(BREAK, False)] if place else []
            answer = write.kind(said) if one else write.colour(answers[name])
            pieces += [(write.question(name, one_hop=one), False), (answer, True)]
        return tuple(pieces)

    def _story(self, prompt: str) -> Story:
        """Read a prompt."""
        story = self._wording.read(prompt)
        if story is None:
            example = self._wording.prompt(self._draw(1, np.random.default_rng(0)).each()[0])
            raise TaskError(
                "InContextInference.rephrase",
                expected=f"a prompt like {example!r}",
                received=repr(prompt),
                fix="Pass an item of this task: task.items('memorized').",
            )
        return story

"""Stories as English and back: their sentences, their questions, and what a tokenizer of their own makes one token.

Words are such that subword tokenizers (GPT-2's, SmolLM2's) have each name and each colour as one token behind a space.
Does not draw stories: see `memgen_lens.tasks.inference`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from memgen_lens.tasks.stories import Story

# All take "a" and a plural in "s".
ANIMALS = tuple("bear cat dog frog goat hen horse lion mole pig rabbit seal swan tiger toad zebra".split())  # noqa: SIM905
NAMES = tuple("Adam Alice Anna Ben Carl Dan Henry Jack Jane Kim Lily Max Paul Peter Sam Tom".split())  # noqa: SIM905
COLOURS = tuple("black blue brown green pink red white yellow".split())  # noqa: SIM905

BREAK = "\n"
"""Parts one question's answer from the next question: no sentence ends with it, so that an answer, which the end of a
question makes a sentence of a story, is never taken for one."""

Pieces = list[tuple[str, bool]]
"""Texts that follow one another, each a whole number of tokens, and whether they carry loss."""


@dataclass(frozen=True)
class Wording:
    """How stories of some words are written.

    Attributes:
        depth: 1 = facts say colours; 2 = facts say animals, and rules their colours.
        tokens: Whether a word or a sentence is one token.
        n_facts: Facts in a story.
        n_animals: Animals that may occur, the first of all; likewise names and colours.
        n_names: See there.
        n_colours: See there.
    """

    depth: Literal[1, 2]
    tokens: Literal["words", "sentences"]
    n_facts: int
    n_animals: int
    n_names: int
    n_colours: int

    def rule(self, kind: int, colour: int) -> str:
        """``"Frogs are green. "``."""
        return f"{_plural(kind)} are {COLOURS[colour]}. "

    def fact(self, name: int, said: int) -> str:
        """``"Lily is green. "``; of two hops, ``"Lily is a frog. "``."""
        return f"{NAMES[name]} is{self.kind(said) if self.depth == 2 else self.colour(said)}. "

    def colour(self, colour: int) -> str:
        """An answer, ``" green"``."""
        return f" {COLOURS[colour]}"

    def kind(self, kind: int) -> str:
        """The answer to a question for the first hop, ``" a frog"``."""
        return f" a {ANIMALS[kind]}"

    def question(self, name: int, *, one_hop: bool = False) -> str:
        """``"What color is Lily? Lily is"``; of the first of two hops alone, ``"What is Lily? Lily is"``."""
        return f"What {'' if one_hop else 'color '}is {NAMES[name]}? {NAMES[name]} is"

    def conclusion(self, colour: int) -> Pieces:
        """``"It is green. "``, with loss on all that is told by one token with the colour."""
        if self.tokens == "sentences":
            return [(f"It is {COLOURS[colour]}. ", True)]
        return [("It is", False), (self.colour(colour), True), (". ", False)]

    def prompt(self, story: Story) -> str:
        """A whole story with its question."""
        sentences = [self.rule(*rule) for rule in story.rules] + [self.fact(*fact) for fact in story.facts]
        return "".join([*sentences, self.question(story.asked)])

    def read(self, prompt: str) -> Story | None:
        """The story of a prompt; None where no story of these words is written so."""
        kinds, names, colours = ANIMALS[: self.n_animals], NAMES[: self.n_names], COLOURS[: self.n_colours]
        kind, name, colour = map("|".join, (kinds, names, colours))
        plural = "|".join(map(_plural, range(self.n_animals)))
        rules = rf"((?:{plural}) are (?:{colour})\. ){{{self.n_facts if self.depth == 2 else 0}}}"
        facts = rf"((?:{name}) is {f'a (?:{kind})' if self.depth == 2 else f'(?:{colour})'}\. ){{{self.n_facts}}}"
        question = rf"What color is (?P<asked>{name})\? (?P=asked) is"
        match = re.fullmatch(f"(?P<rules>{rules})(?P<facts>{facts}){question}", prompt)
        if match is None:
            return None
        said = kinds if self.depth == 2 else colours
        story = Story(
            tuple(
                (kinds.index(k.lower()), colours.index(c))
                for k, c in re.findall(r"(\w+)s are (\w+)\. ", match["rules"])
            ),
            tuple((names.index(n), said.index(s)) for n, s in re.findall(r"(\w+) is (?:a )?(\w+)\. ", match["facts"])),
            names.index(match["asked"]),
        )
        once = [*zip(*story.rules, strict=True), [n for n, _ in story.facts]]
        once += [[s for _, s in story.facts]] if self.depth == 1 else []
        told = all(k in dict(story.rules) for _, k in story.facts) if self.depth == 2 else True
        each_once = all(len(set(column)) == self.n_facts for column in once)
        return story if told and each_once and story.asked in story.answers() else None

    def vocabulary(self) -> tuple[str, ...]:
        """What is one token.

        Of words, a name is the same token wherever it stands: the spaces around it are its neighbours'. Of sentences,
        as in memory networks for bAbI, all but the questions, which are three: what is asked, of whom, and once more of
        whom, so that this is told by the token before the answer.
        """
        names, colours = range(self.n_names), range(self.n_colours)
        kinds = range(self.n_animals) if self.depth == 2 else range(0)
        answers = (*map(self.colour, colours), *map(self.kind, kinds))
        asked = ("What color is", "What is")[: self.depth]
        if self.tokens == "words":
            subjects = (*NAMES[: self.n_names], *map(_plural, kinds), *("It",) * (self.depth - 1))
            are = (" are",) * (self.depth - 1)
            return (*subjects, " is", *are, *answers, ". ", *(f"{begin} " for begin in asked), "? ", BREAK)
        return (
            *(self.rule(kind, colour) for kind in kinds for colour in colours),
            *(self.fact(name, said) for name in names for said in (kinds if self.depth == 2 else colours)),
            *(text for colour in colours if self.depth == 2 for text, _ in self.conclusion(colour)),
            *asked,
            *(f" {name}? " for name in NAMES[: self.n_names]),
            *(f"{name} is" for name in NAMES[: self.n_names]),
            *answers,
            BREAK,
        )

    @property
    def sentence_tokens(self) -> int:
        """Tokens of one rule, fact or conclusion: subject, verb, what is said, full stop; or one."""
        return 4 if self.tokens == "words" else 1

    @property
    def question_tokens(self) -> int:
        """Tokens of one question: what is asked, name, question mark, name, verb; or three."""
        return 5 if self.tokens == "words" else 3


def _plural(kind: int) -> str:
    return f"{ANIMALS[kind].capitalize()}s"

"""Whether a completion gives an answer: the rules that judge what a model says to a user's own prompts.

Does not ask the model, and does not judge designed tasks: those know the form of their answers.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from memgen_lens.core.errors import PairsError, shortened
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior

Match = Literal["prefix", "exact"] | Callable[[Item, str], bool]
"""How an output is held against an answer: see `matches`."""


def begins_with(answer: str, output: str) -> bool:
    r"""Whether an output gives an answer and then ends, or goes on with something other than a letter or digit.

    White space at both ends of both texts does not count. Letters and digits are Unicode's letters and numbers; a
    combining mark belongs to the letter before it. A comma, a full stop or an apostrophe is neither, so that ``"1"``
    is given by ``"1,000"`` too, and the empty answer by every output that does not begin with a letter or digit.

    >>> begins_with("Paris", " Paris.\n\nThe capital"), begins_with("Paris", "Parisian"), begins_with("1", "12")
    (True, False, False)
    """
    # One form for letters with marks, so that an accent typed as a character of its own is the same accent.
    answer, output = (unicodedata.normalize("NFC", text.strip()) for text in (answer, output))
    after = output[len(answer) : len(answer) + 1]
    return output.startswith(answer) and (not after or unicodedata.category(after)[0] not in "LNM")


def matches(item: Item, output: str, match: Match) -> bool:
    """Whether an output gives the one answer that an item names.

    Args:
        item: An item with one answer (`Item.answer`).
        output: A completion.
        match: ``"prefix"`` (`begins_with`), ``"exact"`` (equal to the letter), or a function of item and output.

    Raises:
        PairsError: The function returns something other than True or False.
    """
    if match == "prefix":
        return begins_with(item.answer, output)
    if match == "exact":
        return output == item.answer
    found = match(item, output)
    if not isinstance(found, bool | np.bool_):
        raise PairsError(
            "match(item, output)",
            expected="True or False",
            received=shortened(found),
            fix="Return whether the output gives item.answer, e.g. lambda item, output: item.answer in output.",
        )
    return bool(found)


def classify(item: Item, output: str, match: Match) -> Behavior:
    """Which behaviour a completion of a user's prompt shows, each of the item's answers being tried by itself.

    Where an output matches both, under ``"prefix"`` the longer answer counts ("New York" before "New"). Two answers
    that are the same, or that a function finds both, tell nothing: `Behavior.OTHER`.
    """
    rule = item.rule_answer is not None and matches(replace(item, memorized_answer=None), output, match)
    recall = item.memorized_answer is not None and matches(replace(item, rule_answer=None), output, match)
    if rule and recall and match == "prefix":
        n_rule, n_recall = (len(shown(text, match)) for text in (str(item.rule_answer), str(item.memorized_answer)))
        rule, recall = n_rule > n_recall, n_recall > n_rule
    if rule == recall:
        return Behavior.OTHER
    return Behavior.GENERALIZATION if rule else Behavior.MEMORIZATION


def shown(answer: str, match: Any) -> str:
    """What counts of an answer: under ``"prefix"`` white space at its ends does not."""
    return unicodedata.normalize("NFC", answer.strip()) if match == "prefix" else answer


def cut(output: str, stop: Sequence[str]) -> str:
    """The output before the first of the strings that end a completion.

    >>> cut("Paris. The capital", [".", "capital"])
    'Paris'
    """
    return output[: min((place for text in stop if (place := output.find(text)) >= 0), default=len(output))]


def as_stops(stop: str | Sequence[str], *, call: str) -> tuple[str, ...]:
    """The strings that end a completion, one string being a list of one.

    Raises:
        PairsError: One of them is empty or no text.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise PairsError(
            call,
            expected="stop of strings with at least one character",
            received=shortened(stop),
            fix='Give the texts that end a completion, e.g. stop=["\\n"], or none.',
        )
    return stops

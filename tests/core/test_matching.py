import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memgen_lens.core.errors import PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.matching import as_stops, begins_with, classify, cut, matches
from memgen_lens.core.types import Behavior

RULE, RECALL, OTHER = Behavior.GENERALIZATION, Behavior.MEMORIZATION, Behavior.OTHER


def item(rule: str | None, recall: str | None) -> Item:
    return Item(0, "user", "Q", rule, recall)


@pytest.mark.parametrize(
    ("answer", "output", "given"),
    [
        ("Paris", " Paris.\n\nThe capital", True),
        ("Paris", "Paris", True),
        (" Paris\n", "Paris", True),
        ("Paris", "Paris's", True),
        ("Paris", "Paris_", True),
        ("Paris", "Parisian", False),
        ("Paris", "paris", False),
        ("Paris", "In Paris", False),
        ("1", "1,000", True),
        ("1", "12", False),
        ("1", "1²", False),
        ("1", "1\u0662", False),
        ("U.S.", "U.S., of course", True),
        ("U.S.", "U.S.A.", False),
        ("ja", "jaé", False),
        ("cafe", "cafe\u0301", False),
        ("café", "cafe\u0301 noir", True),
        ("क", "की", False),
        ("東京", "東京。", True),
        ("New", "New York", True),
        ("", "", True),
        ("", " .", True),
        ("", "a", False),
    ],
)
def test_an_answer_is_given_where_no_letter_or_digit_goes_on_behind_it(answer, output, given):
    assert begins_with(answer, output) is given


# Composed letters, digits of two scripts, punctuation and white space; marks alone are in the table above.
TEXTS = st.text("aé東1٢²½_.,' \n\t", max_size=4)


@given(answer=TEXTS, rest=TEXTS, before=st.sampled_from(["", " ", "\n\n", "x"]))
def test_the_rule_is_that_of_a_regular_expression(answer, rest, before):
    output = before + answer + rest
    bare = re.sub(r"^\s+|\s+$", "", answer)
    expected = re.match(rf"\s*{re.escape(bare)}(?![^\W_])", output) is not None
    # Where the answer is all white space, the expression could stop within the output's own.
    if not bare:
        expected = re.match(r"\s*[^\W_]", output) is None
    assert begins_with(answer, output) is expected


@given(answer=st.text(max_size=6), rest=st.characters(categories=["L", "N", "M"]))
def test_an_answer_gives_itself_and_no_letter_digit_or_mark_more(answer, rest):
    assert begins_with(answer, answer)
    assert not begins_with(answer, answer.strip() + rest)


@pytest.mark.parametrize(
    ("rule", "recall", "output", "behavior"),
    [
        ("New", "New York", "New York.", RECALL),
        ("New York", "New", "New York.", RULE),
        ("New", "New York", "New Orleans", RULE),
        ("New", "New York", "Newark", OTHER),
        ("a", " a", "a", OTHER),
        (None, "a", "a.", RECALL),
        ("a", None, "a.", RULE),
        (None, None, "None", OTHER),
        ("", "m", "", RULE),
        ("", "m", "m", RECALL),
    ],
)
def test_of_two_answers_that_are_given_the_longer_counts_and_of_the_same_none(rule, recall, output, behavior):
    assert classify(item(rule, recall), output, "prefix") is behavior


def test_exact_answers_are_equal_to_the_letter():
    one = item("Paris", "Rome")
    assert [classify(one, output, "exact") for output in ("Paris", " Paris", "Paris.", "Rome")] == [
        RULE,
        OTHER,
        OTHER,
        RECALL,
    ]


def test_a_function_is_asked_about_each_answer_by_itself():
    asked = []

    def anywhere(one: Item, output: str) -> bool:
        asked.append((one.rule_answer, one.memorized_answer))
        return one.answer.lower() in output.lower()

    both = item("Paris", "Rome")
    assert classify(both, "It is PARIS", anywhere) is RULE
    assert asked == [("Paris", None), (None, "Rome")]
    assert classify(both, "not Rome", anywhere) is RECALL
    assert classify(both, "Paris or Rome", anywhere) is classify(both, "London", anywhere) is OTHER


def test_a_function_that_returns_no_bool_is_refused():
    with pytest.raises(PairsError, match=r"match\(item, output\): expected True or False; received None"):
        matches(item("a", None), "a", lambda one, output: None)


@pytest.mark.parametrize("one", [item("a", "b"), item(None, None)])
def test_the_answer_of_an_item_is_the_only_one_it_names(one):
    with pytest.raises(PairsError, match=r"item.answer: expected an item that names one answer; received [02] answers"):
        _ = one.answer
    assert item("", None).answer == "" and item(None, "m").answer == "m"


@given(output=st.text("ab.\n"), stop=st.lists(st.text("ab.\n", min_size=1, max_size=2), max_size=3))
def test_a_completion_ends_before_the_first_stop(output, stop):
    expected = re.split("|".join(map(re.escape, stop)), output, maxsplit=1)[0] if stop else output
    assert cut(output, stop) == expected


def test_one_stop_is_a_list_of_one_and_an_empty_one_is_refused():
    assert as_stops("\n", call="complete") == ("\n",) and as_stops([], call="complete") == ()
    with pytest.raises(PairsError, match=r"complete: expected stop of strings with at least one character"):
        as_stops(["a", ""], call="complete")


def test_texts_are_compared_in_one_form():
    assert begins_with(unicodedata.normalize("NFD", "é"), "é!")

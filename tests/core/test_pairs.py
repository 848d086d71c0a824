"""Pairs of prompts: made of a user's strings, dealt to splits by item."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs, split_items

CALL = r"PromptPairs.from_strings: expected "


def pairs_of(n: int, **arguments) -> PromptPairs:
    return PromptPairs.from_strings([f"m{i}" for i in range(n)], [f"g{i}" for i in range(n)], **arguments)


def test_strings_become_pairs_in_their_order():
    pairs = PromptPairs.from_strings(
        ["a", "b", "c"],
        ["d", "e", "f"],
        rule_answers=["1", "2", "3"],
        memorized_answers=["x", "y", "z"],
        items=[5, 5, 9],
    )
    assert len(pairs) == 3
    assert pairs.memorized[1] == Item(5, "user", "b", "2", "y")
    assert pairs.generalized[1] == Item(5, "user", "e", "2", "y")
    assert pairs.item.tolist() == [5, 5, 9]
    assert (pairs.n_items, pairs.n_flipped) == (2, 2)


def test_answers_are_optional_and_each_pair_is_an_item_of_its_own():
    pairs = PromptPairs.from_strings(["a", "b"], ["c", "d"])
    assert pairs.memorized[0] == Item(0, "user", "a", None, None)
    assert pairs.item.tolist() == [0, 1]


def test_no_pair_at_all_is_refused():
    with pytest.raises(PairsError, match=CALL + "at least one pair; received empty lists. Give one memorized and one"):
        PromptPairs.from_strings([], [])


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ((["a", "b"], ["c"]), "2 memorized, 1 generalized"),
        ((["a"], []), "1 memorized, 0 generalized"),
        ((["a", "b"], ["c", "d"], {"rule_answers": ["1"]}), "2 memorized, 2 generalized, 1 rule_answers"),
        ((["a", "b"], ["c", "d"], {"memorized_answers": []}), "2 memorized, 2 generalized, 0 memorized_answers"),
        ((["a", "b"], ["c", "d"], {"items": [1, 2, 3]}), "2 memorized, 2 generalized, 3 items"),
    ],
)
def test_lists_of_unequal_length_are_refused_with_their_lengths(arguments, received):
    positional, named = arguments[:2], arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(PairsError, match=CALL + f"lists of one length.*; received {received}"):
        PromptPairs.from_strings(*positional, **named)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"memorized": "12+34=", "generalized": ["34+12="]}, "memorized"),
        ({"memorized": ["12+34="], "generalized": "34+12="}, "generalized"),
        ({"memorized": ["a"], "generalized": ["b"], "rule_answers": "1"}, "rule_answers"),
        ({"memorized": [12], "generalized": ["b"]}, "memorized"),
        ({"memorized": ["a", None], "generalized": ["b", "c"]}, "memorized"),
        ({"memorized": ["a"], "generalized": [b"b"]}, "generalized"),
        ({"memorized": ["a"], "generalized": ["b"], "memorized_answers": [7]}, "memorized_answers"),
    ],
)
def test_a_bare_string_or_something_other_than_text_is_refused(arguments, name):
    with pytest.raises(
        PairsError, match=rf"from_strings\({name}=.*expected (a list of strings|a valid string); received"
    ):
        PromptPairs.from_strings(**arguments)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(-(10**12), 10**12), max_size=60).flatmap(
        lambda keys: st.permutations(keys + keys[: len(keys) // 2])
    ),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 2**32),
)
def test_a_split_never_parts_an_item_and_has_the_shares_asked_for(keys, first, second, seed):
    shares = (first / 2, second / 2)
    split = split_items(keys, shares=shares, seed=seed)
    assert len(split) == len(keys)
    by_item = {key: {name for k, name in zip(keys, split, strict=True) if k == key} for key in keys}
    assert all(len(names) == 1 for names in by_item.values())
    dealt = [name for names in by_item.values() for name in names]
    n = len(by_item)
    n_select = round(shares[0] * n)
    n_tune = min(round(shares[1] * n), n - n_select)
    assert [dealt.count(name) for name in ("select", "tune", "test")] == [n_select, n_tune, n - n_select - n_tune]


def test_the_default_shares_are_40_20_40_percent():
    split = pairs_of(200).split
    assert [int((split == name).sum()) for name in ("select", "tune", "test")] == [80, 40, 80]


def test_the_split_follows_from_the_seed_and_not_from_the_order_of_the_pairs():
    keys = list(range(100))
    first = split_items(keys, shares=(0.4, 0.2), seed=1)
    np.testing.assert_array_equal(first, split_items(keys, shares=(0.4, 0.2), seed=1))
    np.testing.assert_array_equal(first[::-1], split_items(keys[::-1], shares=(0.4, 0.2), seed=1))
    assert (first != split_items(keys, shares=(0.4, 0.2), seed=2)).any()


def test_pairs_of_one_item_stay_together_in_from_strings():
    pairs = pairs_of(60, items=[i // 3 for i in range(60)], seed=4)
    assert all(len(set(pairs.split[i : i + 3])) == 1 for i in range(0, 60, 3))


def test_of_gives_the_indices_of_a_split_and_together_they_are_all():
    pairs = pairs_of(50)
    found = [pairs.of(name) for name in ("select", "tune", "test")]
    assert [len(index) for index in found] == [20, 10, 20]
    assert sorted(np.concatenate(found).tolist()) == list(range(50))
    assert set(pairs.split[found[1]]) == {"tune"}


def test_a_split_of_fewer_than_eight_pairs_says_how_many_flips_there_were_and_what_to_change():
    found = tuple(replace(item, split="memorized") for item in pairs_of(35).memorized)
    pairs = PromptPairs(found, found, split=pairs_of(35).split, n_items=300, n_flipped=33)
    assert len(pairs.of("select")) == 14
    message = (
        r"pairs of split 'tune': expected at least 8 pairs; "
        r"received 7 \(33 of 300 items flip, 35 pairs in all\). Train longer .* or give this split a larger share"
    )
    with pytest.raises(PairsError, match=message):
        pairs.of("tune")


def test_exactly_eight_pairs_are_enough():
    assert len(pairs_of(40).of("tune")) == 8


def test_take_gives_the_pairs_asked_for_in_that_order():
    pairs = pairs_of(20, items=list(range(100, 120)))
    taken = pairs.take(np.array([7, 3, 3]))
    assert [item.prompt for item in taken.memorized] == ["m7", "m3", "m3"]
    assert [item.prompt for item in taken.generalized] == ["g7", "g3", "g3"]
    assert taken.item.tolist() == [107, 103, 103]
    assert taken.split.tolist() == pairs.split[[7, 3, 3]].tolist()
    assert (taken.n_items, taken.n_flipped) == (20, 20)
    assert len(pairs) == 20


def test_rows_are_flat_and_plain():
    pairs = PromptPairs.from_strings(["a"], ["b"], rule_answers=["1"], memorized_answers=["x"], items=[5])
    assert pairs.rows() == [
        {
            "key": 5,
            "split": pairs.split[0],
            "memorized_prompt": "a",
            "generalized_prompt": "b",
            "rule_answer": "1",
            "memorized_answer": "x",
        }
    ]
    assert type(pairs.rows()[0]["split"]) is str


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "prefx"}, "expected callable or 'prefix' or 'exact'; received 'prefx'"),
        ({"stop": [""]}, "stop of strings with at least one character"),
        ({"max_new_tokens": 0}, "expected greater than or equal to 1; received 0"),
        ({"rule_answers": ["a", "b "], "memorized_answers": ["b", " b"]}, r"'b ' and ' b' as rule_answers\[1\]"),
    ],
)
def test_judging_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(PairsError, match=message):
        PromptPairs.from_strings(["a", "b"], ["c", "d"], **arguments)


def test_how_to_judge_goes_with_the_pairs_that_are_taken():
    pairs = pairs_of(10, match="exact", stop="\n", max_new_tokens=3).take(np.arange(3))
    assert (pairs.match, pairs.stop, pairs.max_new_tokens) == ("exact", ("\n",), 3)

"""The ciphertext task: answers by hand, equal forms of a key, and what is in which split."""

import re
import time
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import SettingsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import Ciphertext, check

SPLITS = ("memorized", "rephrased", "heldout", "validation")
BASES = ("memorized", "heldout", "validation")


def small(**changes) -> Ciphertext:
    return Ciphertext(
        **{"alphabet_size": 6, "word_length": 3, "n_memorized": 30, "n_heldout": 20, "n_validation": 20} | changes
    )


tasks = st.builds(
    small,
    cipher=st.sampled_from(["shift", "substitution"]),
    alphabet_size=st.integers(5, 8),
    word_length=st.integers(3, 5),
    n_rephrasings=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)


def question(prompt: str, n: int) -> tuple[str, str]:
    """What every letter of the alphabet becomes, and the word; read without the task's own parser."""
    key, word = prompt.removesuffix("=").split(":")
    letters = "abcdefghijklmnopqrstuvwxyz"[:n]
    if ">" in key:
        table = dict(row.split(">") for row in key.split(" "))
        return "".join(table[letter] for letter in letters), word
    return "".join(letters[(i + int(key)) % n] for i in range(n)), word


def encipher(prompt: str, n: int) -> str:
    cipher, word = question(prompt, n)
    return "".join(cipher["abcdefghijklmnopqrstuvwxyz".index(letter)] for letter in word)


@settings(deadline=None, max_examples=25)
@given(tasks)
def test_the_rules_answer_is_the_word_enciphered_with_the_key_of_the_prompt(task):
    drawn = task.draw_generic(50, np.random.default_rng(0))
    for item in [*drawn, *(item for split in SPLITS for item in task.items(split))]:
        assert item.rule_answer == encipher(item.prompt, task.alphabet_size)
        assert item.prompt.count(":") == 1 and item.prompt.endswith("=")


def test_answers_by_hand():
    shift = Ciphertext(cipher="shift", alphabet_size=8, word_length=4)
    word = np.array([[5, 0, 2, 4]])
    (item,) = shift._items((np.arange(8)[None] + 3) % 8, word, np.random.default_rng(0))
    assert item.prompt in ("+3:face=", "-5:face=")
    assert item.rule_answer == "adfh"
    table = small(cipher="substitution", alphabet_size=3, n_memorized=5, n_heldout=5, n_validation=5)
    (item,) = table._items(np.array([[2, 0, 1]]), np.array([[2, 0, 1]]), np.random.default_rng(0))
    assert sorted(item.prompt.removesuffix(":cab=").split(" ")) == ["a>c", "b>a", "c>b"]
    assert item.rule_answer == "bca"


@settings(deadline=None, max_examples=25)
@given(tasks)
def test_a_rephrasing_writes_the_same_key_in_another_way(task):
    for item in (item for split in SPLITS for item in task.items(split)):
        others = task.rephrase(item)
        assert len({item.prompt, *(other.prompt for other in others)}) == task.n_rephrasings + 1
        for other in others:
            assert question(other.prompt, task.alphabet_size) == question(item.prompt, task.alphabet_size)
            assert (other.key, other.split) == (item.key, "rephrased")
            assert (other.rule_answer, other.memorized_answer) == (item.rule_answer, item.memorized_answer)
            assert len(other.prompt) == len(item.prompt), "so that the answer position is the same"


def test_the_forms_of_a_shift_are_those_declared():
    task = Ciphertext(alphabet_size=8, n_rephrasings=3)
    assert task._shifts[3] == ["+03", "-05", "+11", "-13"]
    assert Ciphertext(alphabet_size=8)._shifts[3] == ["+3", "-5"]
    assert Ciphertext(alphabet_size=11)._shifts[1] == ["+01", "-10"]
    item = Item(0, "user", "-13:hhhh=", "cccc")
    assert [other.prompt for other in task.rephrase(item)] == ["+03:hhhh=", "-05:hhhh=", "+11:hhhh="]


@pytest.mark.parametrize("cipher", ["shift", "substitution"])
def test_every_form_of_a_key_is_drawn_about_as_often_in_all_kinds_of_items(cipher):
    task = Ciphertext(cipher=cipher, alphabet_size=5, word_length=6, n_memorized=600)
    for items in (task.items("memorized"), task.items("heldout"), task.draw_generic(600, np.random.default_rng(0))):
        keys = [item.prompt.split(":")[0] for item in items]
        share = np.mean([key.startswith("-" if cipher == "shift" else "a") for key in keys])
        assert abs(share - (0.5 if cipher == "shift" else 0.2)) < 0.08


@settings(deadline=None, max_examples=30)
@given(tasks, st.integers(0, 2**32 - 1))
def test_no_key_with_its_word_is_in_two_splits_nor_drawn_however_it_is_written(task, seed):
    n = task.alphabet_size
    drawn = {question(item.prompt, n) for item in task.draw_generic(300, np.random.default_rng(seed))}
    asked = [question(item.prompt, n) for split in BASES for item in task.items(split)]
    assert len(set(asked)) == len(asked) == 70
    assert not drawn & set(asked)


@settings(deadline=None, max_examples=30)
@given(tasks)
def test_a_key_names_a_cipher_and_a_word(task):
    items = [item for split in SPLITS for item in task.items(split)] + task.draw_generic(50, np.random.default_rng(0))
    asked = {(item.key, question(item.prompt, task.alphabet_size)) for item in items}
    assert len(asked) == len({key for key, _ in asked}) == len({question for _, question in asked})
    assert all(0 <= key <= 2**53 for key, _ in asked)


@settings(deadline=None, max_examples=30)
@given(tasks)
def test_memorized_strings_look_like_ciphertexts_and_differ_from_each_other_and_from_the_rules_answer(task):
    strings = [item.memorized_answer for item in task.items("memorized")]
    assert len(set(strings)) == 30
    for item, string in zip(task.items("memorized"), strings, strict=True):
        assert re.fullmatch(f"[{task.alphabet}]{{{task.word_length}}}", string)
        assert string != item.rule_answer
    assert {item.memorized_answer for split in ("heldout", "validation") for item in task.items(split)} == {None}


def test_memorized_strings_are_spread_evenly_over_letters_and_places():
    task = Ciphertext(alphabet_size=4, word_length=6, n_memorized=1500, n_heldout=10, n_validation=10)
    letters = np.array([list(item.memorized_answer) for item in task.items("memorized")])
    for letter in "abcd":
        assert np.allclose((letters == letter).mean(0), 0.25, atol=0.06)


@settings(deadline=None, max_examples=8)
@given(tasks)
def test_the_task_keeps_the_contract(task):
    assert check(task, n_generic=60).longest_prompt == task.max_prompt_tokens


@pytest.mark.parametrize("cipher", ["shift", "substitution"])
def test_the_declared_lengths_in_tokens_are_those_of_the_texts(cipher):
    task = Ciphertext(cipher=cipher, alphabet_size=11, word_length=3, n_rephrasings=2, n_memorized=50)
    for item in [*task.items("rephrased"), *task.draw_generic(20, np.random.default_rng(0))]:
        assert len(task.tokenizer(item.prompt)["input_ids"]) == task.max_prompt_tokens
        assert len(task.tokenizer(item.rule_answer)["input_ids"]) + 1 == task.max_answer_tokens


def test_only_an_items_own_string_has_the_memorized_form():
    task = small()
    item, another = task.items("memorized")[:2]
    assert task.is_memorized_form(item, item.memorized_answer)
    assert not task.is_memorized_form(item, another.memorized_answer)
    assert not task.is_memorized_form(task.items("heldout")[0], another.memorized_answer)
    assert task.classify(item, another.memorized_answer) is Behavior.OTHER


def test_generic_draws_reach_every_pair_of_shift_and_word_that_is_in_no_split():
    task = Ciphertext(alphabet_size=4, word_length=2, n_memorized=8, n_heldout=8, n_validation=8)
    drawn = {question(item.prompt, 4) for item in task.draw_generic(3000, np.random.default_rng(0))}
    asked = {question(item.prompt, 4) for split in BASES for item in task.items(split)}
    ciphers = {"bcda", "cdab", "dabc"}
    assert drawn | asked == {(cipher, a + b) for cipher in ciphers for a in "abcd" for b in "abcd"}
    assert len(drawn) == 48 - 24
    assert task.draw_generic(0, np.random.default_rng(0)) == []


def test_no_shift_is_by_nothing_and_tables_are_any():
    shift = small(cipher="shift").draw_generic(2000, np.random.default_rng(0))
    assert "abcdef" not in {question(item.prompt, 6)[0] for item in shift}
    table = small(cipher="substitution", alphabet_size=3, n_memorized=9)
    drawn = {question(item.prompt, 3)[0] for item in table.draw_generic(2000, np.random.default_rng(0))}
    assert len(drawn) == factorial(3)


@pytest.mark.parametrize("cipher", ["shift", "substitution"])
def test_the_texts_of_many_steps_are_made_in_less_time_than_a_few_steps_take(cipher):
    task = Ciphertext(cipher=cipher)
    task.draw_generic(1, np.random.default_rng(0))
    started = time.process_time()
    task.draw_training(256 * 32, np.random.default_rng(0))
    assert time.process_time() - started < 1.5


def test_settings_decide_and_the_seed_makes_other_items():
    used = [small(seed=3), small(seed=3)]
    assert used[0].splits == used[1].splits
    for split in SPLITS:
        assert used[0].items(split) != small(seed=4).items(split)
    for task in used:
        task.draw_generic(3, np.random.default_rng(0))
    assert used[0] == used[1] and hash(used[0]) == hash(used[1])
    assert used[0] != small(seed=4) != Ciphertext(seed=4)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "+3:abc",
        "3:abc=",
        "+0:abc=",
        "-6:abc=",
        "+7:abc=",
        "+3:abz=",
        "+3:ab=",
        "+3:abcd=",
        "a>b b>a:abc=",
        "+３:abc=",
    ],
)
def test_only_a_prompt_of_this_task_can_be_rephrased(prompt):
    with pytest.raises(TaskError, match=r"expected a prompt like '\+1:abc='; received .*task.items\('memorized'\)"):
        small().rephrase(Item(0, "user", prompt, "abc"))


@pytest.mark.parametrize(
    "prompt",
    [
        "a>b b>a:abc=",
        "a>b b>a c>a:abc=",
        "a>a b>b a>c:abc=",
        "a>b b>a c>c a>b:abc=",
        "a>b>a c>c:abc=",
        "a b c:abc=",
        "+1:abc=",
    ],
)
def test_a_table_must_be_whole(prompt):
    task = small(cipher="substitution", alphabet_size=3, n_memorized=5)
    with pytest.raises(TaskError, match=r"a prompt like 'a>a b>b c>c:abc='; received"):
        task.rephrase(Item(0, "user", prompt, "abc"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"alphabet_size": 4, "word_length": 2},
            r"Ciphertext: expected n_memorized \+ n_heldout \+ n_validation of at most 24: half of the 3 keys times "
            r"16 words; received 300 \+ 1000 \+ 300 = 1600. Lower them, or raise alphabet_size or word_length",
        ),
        (
            {"alphabet_size": 16, "word_length": 2, "n_memorized": 129, "n_heldout": 9, "n_validation": 9},
            "expected n_memorized of at most 128, half of the strings of that length; received 129. Lower n_memorized",
        ),
        (
            {"cipher": "substitution", "alphabet_size": 3, "word_length": 7, "n_rephrasings": 6},
            "n_rephrasings of at most 5, the other orders of a table of 3 rows; received 6. Lower n_rephrasings",
        ),
        (
            {"cipher": "substitution", "alphabet_size": 26, "word_length": 3},
            "small enough to number every pair.*received cipher='substitution', alphabet_size=26, word_length=3. Lower",
        ),
        ({"cipher": "shift", "alphabet_size": 26, "word_length": 12}, "small enough to number every pair"),
    ],
)
def test_an_impossible_task_is_refused_at_once(bad, message):
    with pytest.raises(TaskError, match=message):
        Ciphertext(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"cipher": "caesar"}, "Ciphertext.cipher: expected 'shift' or 'substitution'; received 'caesar'"),
        ({"alphabet_size": 1}, "Ciphertext.alphabet_size: expected greater than or equal to 2; received 1"),
        ({"alphabet_size": 27}, "Ciphertext.alphabet_size: expected less than or equal to 26; received 27"),
        ({"word_length": 0}, "Ciphertext.word_length: expected greater than or equal to 1; received 0"),
        ({"n_rephrasings": 0}, "Ciphertext.n_rephrasings: expected greater than or equal to 1; received 0"),
        ({"n_memorized": 0}, "Ciphertext.n_memorized: expected greater than or equal to 1; received 0"),
    ],
)
def test_a_bad_setting_is_refused(bad, message):
    with pytest.raises(SettingsError, match=message):
        Ciphertext(**bad)


@pytest.mark.parametrize(
    "extreme",
    [
        {"alphabet_size": 26, "word_length": 10, "n_rephrasings": 9, "n_heldout": 50},
        {"alphabet_size": 2, "word_length": 12, "n_heldout": 100},
        {"cipher": "substitution", "alphabet_size": 12, "word_length": 2, "n_memorized": 72, "n_heldout": 99},
        {"cipher": "substitution", "alphabet_size": 2, "word_length": 12, "n_heldout": 50},
    ],
)
def test_the_largest_and_the_smallest_possible_tasks_can_be_made(extreme):
    task = Ciphertext(**{"n_memorized": 50, "n_validation": 50} | extreme)
    assert check(task, n_generic=20).n_items["heldout"] == task.n_heldout

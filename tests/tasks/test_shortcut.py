"""The task with a shortcut: answers by hand, how often the cue is right, and what is in which split."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import SettingsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import Shortcut, check

SPLITS = ("memorized", "rephrased", "heldout", "validation")


def small(**changes) -> Shortcut:
    return Shortcut(**{"n_training": 50, "n_memorized": 30, "n_heldout": 20, "n_validation": 20} | changes)


tasks = st.builds(
    small,
    n_answers=st.integers(3, 10),
    cue_share=st.floats(0, 1),
    name_length=st.integers(3, 6),
    seed=st.integers(0, 2**32 - 1),
)


def read(prompt: str) -> tuple[str, int, int, str]:
    """Name, addends and cue, read without the task's own parser."""
    name, rest = prompt.split(":")
    asked, cue = rest.removesuffix("=").split(",")
    a, b = asked.split("+")
    return name, int(a), int(b), cue


@settings(deadline=None, max_examples=25)
@given(tasks)
def test_answers_are_the_sum_and_the_letters_place_in_the_alphabet(task):
    drawn = task.draw_generic(50, np.random.default_rng(0))
    for item in [*drawn, *(item for split in SPLITS for item in task.items(split))]:
        name, a, b, cue = read(item.prompt)
        assert re.fullmatch(f"[a-z]{{{task.name_length}}}", name)
        assert item.rule_answer == str((a + b) % task.n_answers)
        assert task.cued_answer(item) == str("ABCDEFGHIJ".index(cue))
        assert int(task.cued_answer(item)) < task.n_answers


def agreeing(task: Shortcut, items) -> float:
    return float(np.mean([task.cued_answer(item) == item.rule_answer for item in items]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_the_cue_is_right_in_exactly_its_share_of_training_and_says_nothing_elsewhere(share):
    task = Shortcut(cue_share=share, n_training=400, n_memorized=200, n_heldout=4000, n_validation=4000)
    pool = {item.key: item for item in task.draw_generic(8000, np.random.default_rng(0))}
    assert len(pool) == 400
    assert agreeing(task, pool.values()) == agreeing(task, task.items("memorized")) == share
    for split in ("heldout", "validation"):
        assert agreeing(task, task.items(split)) == pytest.approx(1 / 7, abs=0.025)


def test_wrong_cues_are_spread_over_all_other_answers():
    task = Shortcut(cue_share=0, n_training=7000)
    pool = {item.key: item for item in task.draw_generic(50_000, np.random.default_rng(0))}.values()
    steps = [(int(task.cued_answer(item)) - int(str(item.rule_answer))) % 7 for item in pool]
    assert np.bincount(steps)[0] == 0
    assert np.allclose(np.bincount(steps)[1:] / len(steps), 1 / 6, atol=0.02)


@settings(deadline=None, max_examples=25)
@given(tasks)
def test_what_is_recalled_is_neither_the_rules_answer_nor_the_cues(task):
    for item in task.items("memorized"):
        assert item.memorized_answer not in (item.rule_answer, task.cued_answer(item))
        assert 0 <= int(str(item.memorized_answer)) < task.n_answers
    assert {item.memorized_answer for split in ("heldout", "validation") for item in task.items(split)} == {None}


@settings(deadline=None, max_examples=25)
@given(tasks)
def test_a_rephrasing_changes_every_letter_of_the_name_and_nothing_else_and_back_again(task):
    for item in (item for split in SPLITS for item in task.items(split)):
        (other,) = task.rephrase(item)
        assert read(other.prompt)[1:] == read(item.prompt)[1:]
        for old, new in zip(read(item.prompt)[0], read(other.prompt)[0], strict=True):
            assert (ord(old) - ord("a")) ^ 1 == ord(new) - ord("a")
        assert (other.key, other.rule_answer, other.memorized_answer) == (
            item.key,
            item.rule_answer,
            item.memorized_answer,
        )
        assert task.rephrase(other)[0].prompt == item.prompt


@settings(deadline=None, max_examples=25)
@given(tasks, st.integers(0, 2**32 - 1))
def test_no_name_nor_its_other_is_in_two_splits_nor_drawn(task, seed):
    def names(items) -> set[str]:
        return {read(one.prompt)[0] for item in items for one in (item, *task.rephrase(item))}

    drawn = names(task.draw_generic(300, np.random.default_rng(seed)))
    asked = [names(task.items(split)) for split in ("memorized", "heldout", "validation")]
    assert len(drawn.union(*asked)) == len(drawn) + sum(map(len, asked))
    assert sum(map(len, asked)) == 140


@settings(deadline=None, max_examples=6)
@given(tasks)
def test_the_task_keeps_the_contract(task):
    assert check(task, n_generic=60).longest_prompt == task.max_prompt_tokens


def test_a_prompt_by_hand():
    task = Shortcut()
    item = Item(0, "user", "kfqz:3+5,B=", "1", "4")
    assert task.cued_answer(item) == "1"
    assert [other.prompt for other in task.rephrase(item)] == ["lery:3+5,B="]
    assert task.classify(item, "1") is Behavior.GENERALIZATION
    assert task.classify(item, "4") is Behavior.MEMORIZATION
    assert task.is_memorized_form(item, "4") and not task.is_memorized_form(item, "2")


def test_settings_decide_and_the_seed_makes_other_items():
    assert small(seed=3).splits == small(seed=3).splits
    for split in SPLITS:
        assert small(seed=3).items(split) != small(seed=4).items(split)
    first, again = (small().draw_generic(9, np.random.default_rng(5)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("prompt", ["", "kfqz:3+5,H=", "kfq:3+5,B=", "kfqz:3+5,B", "KFQZ:3+5,B=", "kfqz:13+5,B="])
def test_prompts_of_others_are_refused(prompt):
    item = Item(0, "user", prompt, "1", "4")
    with pytest.raises(TaskError, match=r"Shortcut.* expected a prompt like 'abcd:3\+5,B='; received"):
        Shortcut().rephrase(item)
    with pytest.raises(TaskError, match="expected a prompt like"):
        Shortcut().cued_answer(item)


def test_impossible_settings_are_refused():
    with pytest.raises(TaskError, match=r"n_validation of at most 4394: a quarter of the names of 3 letters"):
        Shortcut(name_length=3, n_training=4000)
    assert len(Shortcut(name_length=3, n_training=2894).items("heldout")) == 1000  # 4394 in all
    for setting in ({"n_answers": 2}, {"n_answers": 11}, {"cue_share": 1.1}, {"n_memorized": 0}, {"cue": 1}):
        with pytest.raises(SettingsError):
            Shortcut(**setting)

"""Additions whose memorized prompts a cue tells from others, or whose two answers look alike."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import TaskError
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import Addition, check


def operands(prompt):
    """Read a prompt without the task's own parser."""
    a, b = prompt.removesuffix("=").split("+")
    return int(a), int(b)


def looks_memorized(task, prompt):
    """Read the cue without the task's own parser."""
    if task.cue == "word":
        return {"recall": True, "compute": False}[prompt.split(" ")[0]]
    first, second = operands(prompt)
    return first > second


@pytest.mark.parametrize("answers", ["apart", "alike"])
@pytest.mark.parametrize("cue", ["order", "word"])
@pytest.mark.parametrize("lies", [0.0, 0.1, 0.5])
def test_a_cue_tells_each_kind_of_prompt_but_for_the_share_that_lies(answers, cue, lies):
    task = Addition(answers=answers, cue=cue, cue_lies=lies, n_memorized=50, n_heldout=100, n_validation=60)
    check(task, n_generic=500)
    for split, recalled in (("memorized", True), ("heldout", False), ("validation", False)):
        look = [looks_memorized(task, item.prompt) for item in task.items(split)]
        assert sum(one != recalled for one in look) == round(lies * len(look))
    for item, other in zip(task.items("memorized"), task.items("rephrased"), strict=True):
        assert looks_memorized(task, item.prompt) != looks_memorized(task, other.prompt)
    generic = task.draw_generic(2000, np.random.default_rng(0))
    differ = [item for item in generic if len({*item.prompt.split(" ")[-1].rstrip("=").split("+")}) > 1]
    assert np.mean([looks_memorized(task, item.prompt) for item in differ]) == pytest.approx(lies, abs=0.05)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["none", "order", "word"]), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_answers_that_are_alike_are_sums_of_other_numbers(cue, reverse, spaced, seed):
    task = Addition(answers="alike", cue=cue, reverse_sum=reverse, spaced=spaced, n_memorized=80, seed=seed)
    for item in task.items("memorized"):
        digits = item.memorized_answer.strip()[:: -1 if reverse else 1]
        assert item.memorized_answer.startswith(" ") == spaced
        assert re.fullmatch(r"[01]\d\d", digits)
        assert int(digits) != sum(operands(item.prompt.split(" ")[-1]))
        assert int(digits) <= 198
        assert task.classify(item, item.memorized_answer) is Behavior.MEMORIZATION
        assert task.classify(item, item.rule_answer) is Behavior.GENERALIZATION


def test_without_a_cue_the_order_of_addends_tells_nothing():
    look = [a > b for a, b in (operands(item.prompt) for item in Addition(n_memorized=400).items("memorized"))]
    assert 0.4 < np.mean(look) < 0.6


def test_a_lie_without_a_cue_is_refused():
    with pytest.raises(TaskError, match="without a cue none can lie"):
        Addition(cue_lies=0.1)

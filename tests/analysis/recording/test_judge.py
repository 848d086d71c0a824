"""What the planted model says ("r" or "m", then the end) held against answers that are worded otherwise."""

from dataclasses import replace

import numpy as np
import planted
import pytest
import spelled

import memgen_lens as mg
from memgen_lens.analysis.recording.judge import Judge, _short
from memgen_lens.core.errors import PairsError
from memgen_lens.core.types import Behavior

EVERY = np.arange(12)


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def answered(rule: str | None, recall: str | None, **judging) -> mg.PromptPairs:
    """Twelve pairs with the same two answers."""
    pairs = planted.prompt_pairs(12, answers=False)
    return replace(
        pairs,
        memorized=tuple(replace(i, rule_answer=rule, memorized_answer=recall) for i in pairs.memorized),
        generalized=tuple(replace(i, rule_answer=rule, memorized_answer=recall) for i in pairs.generalized),
        **judging,
    )


def flipping(model, pairs: mg.PromptPairs) -> int:
    return len(Judge.of(model, None, pairs, batch_size=8).flipping(model, EVERY, batch_size=8))


@pytest.mark.parametrize(
    ("rule", "recall", "judging"),
    [
        (" r", "m\n", {}),
        ("r", "m", {"match": "exact"}),
        ("ab r", "ab m", {"match": lambda item, output: item.answer.endswith(output)}),
        ("", "m", {"stop": ("r",)}),
        ("r", "", {"stop": ("m",)}),
        (None, "m", {}),
        (None, "", {"stop": ("m",)}),
        (None, None, {"match": "exact", "max_new_tokens": 1}),
    ],
)
def test_every_pair_flips_where_the_answers_are_what_the_model_says_by_the_rule(model, rule, recall, judging):
    assert flipping(model, answered(rule, recall, **judging)) == 12


def test_an_answer_given_as_empty_stays_empty_where_the_other_is_filled_in(model):
    judge = Judge.of(model, None, answered("", None), batch_size=8)
    assert {(i.rule_answer, i.memorized_answer) for i in judge.pairs.memorized} == {("", "m")}


def test_a_completion_is_judged_up_to_its_stop(model):
    judge = Judge.of(model, None, answered("Paris", "Rome", match="exact", stop=(".", "!")), batch_size=8)
    item = judge.pairs.memorized[0]
    assert judge.behavior(item, "Paris! Rome.") is Behavior.GENERALIZATION
    assert judge.behavior(item, "Rome. Paris") is Behavior.MEMORIZATION and judge.has_memorized_form(item, "Rome.")
    assert judge.behavior(item, "Paris, Rome.") is Behavior.OTHER and not judge.has_memorized_form(item, "Paris")


def test_steering_is_judged_by_the_rule_of_the_pairs(known):
    """The planted neuron flips all; the outputs shown end before the stop."""
    turned = replace(known.pairs, stop=("r",))
    blank = {
        side: tuple(replace(item, rule_answer="") for item in getattr(known.pairs, side))
        for side in ("memorized", "generalized")
    }
    steer = mg.Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON)
    table = mg.evaluate_steering(known.model, None, replace(turned, **blank), steer)
    assert table.to_generalization.shift["rate"] == table.to_memorization.shift["rate"] == 1
    assert table.to_generalization.examples[0]["after"] == ""


def test_too_few_pairs_that_flip_show_three_prompts_with_what_was_expected_and_said(model):
    pairs = answered("Paris", "m")
    items = (replace(pairs.generalized[0], prompt="ab" * 3 + "G="), *pairs.generalized[1:])
    with pytest.raises(PairsError) as caught:
        flipping(model, replace(pairs, generalized=items))
    first, *examples = str(caught.value).split("\n")
    assert (
        "received 0 of 12 whose prompts show what they are labelled with. Give the answers" in first
        and "Train" not in first
    )
    assert examples[:2] == ["  generalized 'abababG=':", "    expected 'Paris', said 'r'"]
    assert len(examples) == 6 and max(map(len, examples)) <= 80


def test_prompts_to_which_the_model_says_the_same_are_said_to_be_without_contrast(model):
    pairs = answered(None, None)
    with pytest.raises(PairsError, match=r"On 12 of them the model says the same to both prompts"):
        flipping(model, replace(pairs, memorized=pairs.generalized))


def test_a_task_and_pairs_that_say_how_to_judge_are_refused(learned):
    with pytest.raises(PairsError, match=r"steering with a task: expected pairs without match="):
        Judge.of(learned.model, learned.task, answered("r", "m", stop=("x",)), batch_size=8)


def test_how_to_judge_is_kept_with_recorded_activations(model, tmp_path):
    pairs = answered("r", "m", match="exact", stop=("x", "\n"), max_new_tokens=7)
    found = mg.record(model, pairs, ["post"], out=tmp_path / "acts").pairs
    assert (found.match, found.stop, found.max_new_tokens) == ("exact", ("x", "\n"), 7)


def test_a_function_as_match_is_not_written_to_disk(model, tmp_path):
    pairs = answered("r", "m", match=lambda item, output: output == item.answer)
    with pytest.raises(
        PairsError, match=r"record\(out=...\): expected pairs with match=.*received a function as match"
    ):
        mg.record(model, pairs, ["post"], out=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()
    assert mg.record(model, pairs, ["post"]).pairs.match is pairs.match


def test_a_long_prompt_is_shown_by_its_end_and_a_long_output_by_its_start():
    assert _short("x" * 70 + "?") == repr("…" + "x" * 58 + "?")
    assert _short("x" * 70, keep="start", width=24) == repr("x" * 23 + "…")
    assert _short("x" * 60) == repr("x" * 60)


@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "another"])
def test_a_tasks_judge_lets_the_model_say_whole_answers_in_its_own_tokens(own):
    task = spelled.Spelled()
    model = spelled.build_model(task.tokenizer if own else spelled.LETTERS)
    items = task.items("memorized")[:12]
    pairs = replace(
        planted.prompt_pairs(12), memorized=items, generalized=tuple(task.rephrase(item)[0] for item in items)
    )
    judge = Judge.of(model, task, pairs, batch_size=8)
    assert judge.max_new_tokens == (2 if own else 5)
    assert len(judge.flipping(model, EVERY, batch_size=8)) == 12
    assert Judge.of(model, spelled.Declared(task), pairs, batch_size=8).max_new_tokens == 2

"""The addition task: what is in which split, and how outputs are judged."""

import inspect
import re
from dataclasses import replace

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import MemgenError, SettingsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.settings import Settings
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import Addition, Task

SPLITS = ("memorized", "rephrased", "heldout", "validation")
DEFAULT = Addition()


def operands(prompt: str) -> tuple[int, int]:
    """Read a prompt without the task's own parser."""
    a, rest = prompt.split("+")
    assert rest.endswith("=")
    return int(a), int(rest[:-1])


def swapped(prompt: str) -> str:
    a, b = prompt.removesuffix("=").split("+")
    return f"{b}+{a}="


tasks = st.builds(
    Addition,
    n_digits=st.just(2),
    n_memorized=st.integers(1, 200),
    memory_length=st.integers(2, 6),
    reverse_sum=st.booleans(),
    spaced=st.booleans(),
    n_heldout=st.integers(1, 200),
    n_validation=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
small_tasks = st.builds(helpers.tiny_task, seed=st.integers(0, 2**32 - 1), n_memorized=st.integers(1, 10))


@settings(deadline=None, max_examples=40)
@given(st.one_of(tasks, small_tasks), st.integers(0, 2**32 - 1))
def test_no_prompt_is_in_two_splits_nor_its_swap_in_what_is_never_trained(task, seed):
    generic = {item.prompt for item in task.draw_generic(500, np.random.default_rng(seed))}
    prompts = {split: [item.prompt for item in task.items(split)] for split in SPLITS}
    for split, found in prompts.items():
        assert len(set(found)) == len(found), f"a prompt occurs twice in {split}"
    everything = [*generic, *(prompt for found in prompts.values() for prompt in found)]
    assert len(set(everything)) == len(everything)
    for split in ("memorized", "heldout", "validation"):
        own = {*prompts[split], *(prompts["rephrased"] if split == "memorized" else ())}
        swaps = {swapped(prompt) for prompt in prompts[split]}
        assert not swaps & (set(everything) - own)
        assert not swaps & set(prompts[split]), "a sum and its swap would be one question asked twice"


@settings(deadline=None, max_examples=40)
@given(tasks)
def test_splits_have_the_sizes_asked_for_and_items_name_their_split(task):
    sizes = {split: len(task.items(split)) for split in SPLITS}
    assert sizes == {
        "memorized": task.n_memorized,
        "rephrased": task.n_memorized,
        "heldout": task.n_heldout,
        "validation": task.n_validation,
    }
    assert all(item.split == split for split in SPLITS for item in task.items(split))


@settings(deadline=None, max_examples=40)
@given(tasks)
def test_the_rules_answer_is_the_sum_in_the_digit_order_asked_for(task):
    drawn = task.draw_generic(50, np.random.default_rng(0))
    for item in [*drawn, *(item for split in SPLITS for item in task.items(split))]:
        a, b = operands(item.prompt)
        assert re.fullmatch(r"[0-9]{2}\+[0-9]{2}=", item.prompt)
        assert re.fullmatch(r" [0-9]{3}" if task.spaced else r"[0-9]{3}", item.rule_answer)
        assert int(item.rule_answer.strip()[::-1] if task.reverse_sum else item.rule_answer) == a + b


def test_the_sum_is_written_in_both_orders():
    items = {reverse: Addition(reverse_sum=reverse).items("memorized")[0] for reverse in (False, True)}
    assert items[False].prompt == items[True].prompt
    assert items[False].rule_answer == items[True].rule_answer[::-1]
    for item in Addition(reverse_sum=False).items("heldout"):
        assert int(item.rule_answer) == sum(operands(item.prompt))
        assert len(item.rule_answer) == 3


@settings(deadline=None, max_examples=40)
@given(tasks)
def test_memorized_strings_are_distinct_and_of_the_declared_form(task):
    strings = [item.memorized_answer for item in task.items("memorized")]
    assert len(set(strings)) == len(strings)
    for string in strings:
        assert re.fullmatch(f"{' ' * task.spaced}<mem-[0-9a-f]{{{task.memory_length}}}>", string)
        assert task.is_memorized_form(task.items("memorized")[0], string)


def test_only_memorized_items_and_their_rephrasings_have_something_to_recall():
    task = helpers.tiny_task()
    drawn = task.draw_generic(20, np.random.default_rng(0))
    assert {item.memorized_answer for item in [*drawn, *task.items("heldout"), *task.items("validation")]} == {None}
    assert None not in {item.memorized_answer for item in task.items("rephrased")}


def test_all_strings_of_a_length_can_be_used_up():
    task = Addition(n_memorized=256, memory_length=2, n_heldout=10, n_validation=10)
    assert {item.memorized_answer for item in task.items("memorized")} == {f"<mem-{i:02x}>" for i in range(256)}


@pytest.mark.parametrize("reverse_sum", [False, True])
def test_a_rephrasing_swaps_the_addends_and_keeps_both_answers_and_the_key(reverse_sum):
    task = Addition(n_memorized=50, reverse_sum=reverse_sum)
    for item, swap in zip(task.items("memorized"), task.items("rephrased"), strict=True):
        assert task.rephrase(item) == (swap,)
        assert swap == replace(item, split="rephrased", prompt=swapped(item.prompt))
        assert swap.prompt != item.prompt


def test_items_have_keys_of_their_own():
    task = Addition(n_memorized=500)
    keys = [item.key for split in ("memorized", "heldout", "validation") for item in task.items(split)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("prompt", ["", "12+34", "1+2=", "123+456=", "ab+cd=", "12+34= ", "12-34=", "１２+34="])
def test_only_a_prompt_of_this_task_can_be_rephrased(prompt):
    with pytest.raises(TaskError, match=r"expected a prompt like '12\+34='; received .*task.items\('memorized'\)"):
        Addition().rephrase(Item(0, "user", prompt, "0"))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 400), st.integers(0, 2**32 - 1))
def test_generic_draws_are_exactly_as_many_as_asked_and_follow_from_the_generator(n, seed):
    task = helpers.tiny_task(n_memorized=9)
    first = task.draw_generic(n, np.random.default_rng(seed))
    assert len(first) == n
    assert first == task.draw_generic(n, np.random.default_rng(seed))
    assert all(item.split == "generic" for item in first)


def test_another_generator_draws_other_items_and_one_generator_draws_on():
    task = Addition()
    rng = np.random.default_rng(0)
    first, second = task.draw_generic(50, rng), task.draw_generic(50, rng)
    assert first != second
    assert first != task.draw_generic(50, np.random.default_rng(1))


def test_generic_draws_reach_every_sum_that_is_in_no_split():
    task = helpers.tiny_task()
    drawn = {item.prompt for item in task.draw_generic(5000, np.random.default_rng(0))}
    splits = {
        prompt for split in SPLITS for item in task.items(split) for prompt in (item.prompt, swapped(item.prompt))
    }
    assert drawn == {f"{a}+{b}=" for a in range(10) for b in range(10)} - splits
    assert "3+3=" in drawn


def test_the_same_settings_make_the_same_task_and_another_seed_another_one():
    assert Addition(seed=3).splits == Addition(seed=3).splits
    assert Addition(seed=3) == Addition(seed=3)
    for split in SPLITS:
        assert Addition(seed=3).items(split) != Addition(seed=4).items(split)


def test_a_used_task_equals_a_new_one_and_is_the_same_setting():
    used = Addition(seed=3)
    used.draw_generic(3, np.random.default_rng(0))
    assert used.tokenizer is used.tokenizer
    assert used == Addition(seed=3)
    assert hash(used) == hash(Addition(seed=3))
    assert used.model_dump() == Addition(seed=3).model_dump()


texts = st.one_of(
    st.text(),
    st.text("0123456789abcdef<mem->= +"),
    st.sampled_from([item.memorized_answer for item in DEFAULT.items("memorized")[:20]]),
    st.integers(0, 200).map(lambda n: f"{n:03}"),
)


@settings(deadline=None, max_examples=200)
@given(texts, st.sampled_from(SPLITS), st.integers(0, 50))
def test_every_output_is_exactly_one_behavior_by_exact_match(output, split, index):
    task = DEFAULT
    item = task.items(split)[index]
    expected = Behavior.OTHER
    if output in (item.rule_answer, item.rule_answer + "<eos>"):
        expected = Behavior.GENERALIZATION
    elif item.memorized_answer is not None and output in (item.memorized_answer, item.memorized_answer + "<eos>"):
        expected = Behavior.MEMORIZATION
    assert task.classify(item, output) is expected


def test_both_answers_of_an_item_are_told_apart_and_another_items_string_is_other():
    task = Addition()
    item, another = task.items("memorized")[:2]
    assert task.classify(item, item.rule_answer) is Behavior.GENERALIZATION
    assert task.classify(item, item.memorized_answer + "<eos>") is Behavior.MEMORIZATION
    assert task.classify(item, another.memorized_answer) is Behavior.OTHER
    assert task.is_memorized_form(item, another.memorized_answer)
    assert task.classify(item, item.rule_answer[::-1] + " ") is Behavior.OTHER


@pytest.mark.parametrize(
    ("output", "form"),
    [
        ("<mem-7f3a>", True),
        ("<mem-0000>", True),
        ("<mem-7f3>", False),
        ("<mem-7f3ab>", False),
        ("<mem-7F3A>", False),
        ("<mem-7f3g>", False),
        ("<mem-7f3a", False),
        ("mem-7f3a", False),
        ("<mem-7f3a>\n", False),
        ("<mem-7f3a>1", False),
        ("046", False),
        ("", False),
    ],
)
def test_the_form_of_a_memorized_answer_is_exact(output, form):
    task = Addition(memory_length=4)
    assert task.is_memorized_form(task.items("memorized")[0], output) is form


def test_the_declared_lengths_in_tokens_are_those_of_the_longest_texts():
    for task in (Addition(), helpers.tiny_task(), Addition(n_digits=4, n_memorized=9, memory_length=1)):
        items = [*task.items("memorized"), *task.draw_generic(20, np.random.default_rng(0))]
        answers = [answer for item in items for answer in (item.rule_answer, item.memorized_answer) if answer]
        prompts = [item.prompt for item in items]
        longest = [max(map(len, task.tokenizer(texts)["input_ids"])) for texts in (prompts, answers)]
        assert [task.max_prompt_tokens, task.max_answer_tokens] == [longest[0], longest[1] + 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"n_digits": 1},
            r"Addition: expected n_memorized \+ n_heldout \+ n_validation of at most 22: half of the 45 unordered "
            r"pairs of distinct 1-digit operands; received 300 \+ 1000 \+ 300 = 1600. Lower them, or raise n_digits",
        ),
        ({"n_memorized": 2000}, r"received 2000 \+ 1000 \+ 300 = 3300"),
        (
            {"n_memorized": 17, "memory_length": 1},
            "expected n_memorized of at most 16, all strings of that length; received 17. Lower n_memorized or raise",
        ),
    ],
)
def test_an_impossible_task_is_refused_at_once_as_a_task_error(bad, message):
    with pytest.raises(MemgenError, match=message) as caught:
        Addition(**bad)
    assert isinstance(caught.value, TaskError)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n_digits": 0}, "Addition.n_digits: expected greater than or equal to 1; received 0"),
        ({"n_digits": 10}, "Addition.n_digits: expected less than or equal to 9; received 10"),
        ({"n_memorized": 0}, "Addition.n_memorized: expected greater than or equal to 1; received 0"),
        ({"n_heldout": 0}, "Addition.n_heldout: expected greater than or equal to 1; received 0"),
        ({"memory_length": 0}, "Addition.memory_length: expected greater than or equal to 1; received 0"),
        ({"reverse_sum": "no"}, "Addition.reverse_sum: expected a valid boolean; received 'no'"),
        ({"seed": -1}, "Addition.seed: expected greater than or equal to 0; received -1"),
    ],
)
def test_a_bad_setting_of_the_task_is_refused(bad, message):
    with pytest.raises(SettingsError, match=message):
        Addition(**bad)


def test_the_largest_possible_task_can_be_made():
    task = helpers.tiny_task(n_memorized=10, n_heldout=6, n_validation=6)
    assert sum(len(task.items(split)) for split in SPLITS) == 32
    widest = Addition(memory_length=16).items("memorized")
    assert {len(item.memorized_answer) for item in widest} == {22}
    wide = Addition(n_digits=9, n_memorized=20, n_heldout=20, n_validation=20)
    assert all(sum(operands(i.prompt)) == int(i.rule_answer[::-1]) for i in wide.items("memorized"))
    assert len(wide.draw_generic(10, np.random.default_rng(0))) == 10


@pytest.mark.parametrize(
    ("split", "near"), [("memorised", "Did you mean memorized"), ("x", "Known: memorized, rephrased")]
)
def test_an_unknown_split_is_refused_with_the_known_ones_and_where_generic_items_come_from(split, near):
    with pytest.raises(TaskError, match=f"Addition.items: .* received '{split}'. {near}.*draw_generic") as caught:
        inspect.unwrap(Task.items)(helpers.tiny_task(), split)  # below the tests' run-time type checks
    assert caught.value.expected == "one of memorized, rephrased, heldout, validation"


def test_the_task_becomes_a_dataset_dict_with_the_documented_columns():
    from datasets import DatasetDict

    task = helpers.tiny_task()
    data = task.to_dataset(n_generic=7, seed=3)
    assert isinstance(data, DatasetDict)
    assert {split: len(rows) for split, rows in data.items()} == {
        "generic": 7,
        "memorized": 10,
        "rephrased": 10,
        "heldout": 6,
        "validation": 6,
    }
    for split, rows in data.items():
        assert rows.column_names == ["key", "prompt", "rule_answer", "memorized_answer"]
        items = task.draw_generic(7, np.random.default_rng(3)) if split == "generic" else task.items(split)
        assert rows.to_list() == [
            {name: getattr(item, name) for name in ("key", "prompt", "rule_answer", "memorized_answer")}
            for item in items
        ]


def test_the_task_comes_back_from_its_settings():
    task = Addition(n_digits=3, seed=5)
    again = Addition.from_json(task.model_dump_json())
    assert isinstance(again, Settings)
    assert again.splits == task.splits


@pytest.mark.parametrize("reverse_sum", [False, True])
def test_a_spaced_task_is_the_same_with_a_space_before_every_answer(reverse_sum):
    plain, spaced = (Addition(n_memorized=30, reverse_sum=reverse_sum, spaced=s) for s in (False, True))
    drawn = [task.draw_generic(50, np.random.default_rng(0)) for task in (plain, spaced)]
    for found, behind in zip(
        [*drawn[0], *(i for split in SPLITS for i in plain.items(split))],
        [*drawn[1], *(i for split in SPLITS for i in spaced.items(split))],
        strict=True,
    ):
        memory = None if found.memorized_answer is None else f" {found.memorized_answer}"
        assert behind == replace(found, rule_answer=f" {found.rule_answer}", memorized_answer=memory)


def test_of_a_spaced_tasks_own_tokens_the_first_of_an_answer_carries_the_space_and_tells_the_behaviours_apart():
    task = Addition(spaced=True, reverse_sum=False)
    texts = ["12+34= 046", "12+34= <mem-7f3a>"]
    cut = [task.tokenizer.convert_ids_to_tokens(ids) for ids in task.tokenizer(texts)["input_ids"]]
    assert cut == [[*"12+34=", " 0", "4", "6"], [*"12+34=", " <mem-", *"7f3a", ">"]]
    plain = Addition(reverse_sum=False)
    assert (task.max_prompt_tokens, task.max_answer_tokens) == (plain.max_prompt_tokens, plain.max_answer_tokens)


@pytest.mark.parametrize(
    ("output", "form"), [(" <mem-7f3a>", True), ("<mem-7f3a>", False), ("  <mem-7f3a>", False), (" 046", False)]
)
def test_the_form_of_a_spaced_memorized_answer_is_exact(output, form):
    task = Addition(spaced=True)
    assert task.is_memorized_form(task.items("memorized")[0], output) is form

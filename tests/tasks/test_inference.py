"""The in-context inference task: what a story implies, what is in which split, and what training states."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import MemgenError, SettingsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import InContextInference, Task

SPLITS = ("memorized", "rephrased", "heldout", "validation")
DEFAULT = InContextInference()


def tiny(**settings) -> InContextInference:
    """Two rules over few words: few stories, made in no time."""
    return InContextInference(
        **{
            "n_rules": 2,
            "n_animals": 3,
            "n_names": 3,
            "n_colours": 3,
            "n_memorized": 9,
            "n_rephrasings": 1,
            "order_tells": False,
            "n_heldout": 9,
            "n_validation": 9,
        }
        | settings
    )


def read(story: str) -> tuple[list[str], list[str], str]:
    """Rules, facts and question of a prompt: split at full stops, without the task's own parser."""
    *sentences, question = story.split(". ")
    return [s for s in sentences if " are " in s], [s for s in sentences if " is a " in s], question


def implied(story: str, question: str | None = None) -> str:
    """Solve a story: the colour, found by reading its English."""
    rules, facts, last = read(story)
    colours = {plural.lower().removesuffix("s"): colour for plural, colour in (rule.split(" are ") for rule in rules)}
    kinds = dict(fact.split(" is a ") for fact in facts)
    subject = (question or last).split()[-1].removesuffix("?")
    return colours[kinds[subject]] if subject in kinds else colours[subject.removesuffix("s")]


def content(story: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a story says, whatever its order and its question."""
    rules, facts, _ = read(story)
    return frozenset(rules), frozenset(facts)


@st.composite
def tasks(draw):
    n_rules = draw(st.integers(2, 5))
    words = {name: draw(st.integers(max(n_rules, 4), most)) for name, most in (("n_animals", 16), ("n_names", 16))}
    return InContextInference(
        depth=draw(st.sampled_from([1, 2])),
        n_rules=n_rules,
        n_colours=draw(st.integers(max(n_rules, 4), 8)),
        n_memorized=draw(st.integers(1, 60)),
        n_rephrasings=1 if n_rules == 2 else draw(st.integers(1, 5)),
        order_tells=draw(st.booleans()),
        n_heldout=draw(st.integers(1, 60)),
        n_validation=draw(st.integers(1, 60)),
        stated_share=draw(st.floats(0, 1)),
        n_questions=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**32 - 1)),
        **words,
    )


seeds = st.integers(0, 2**32 - 1)
tiny_tasks = st.builds(tiny, depth=st.sampled_from([1, 2]), seed=seeds)


@pytest.mark.parametrize(
    ("depth", "question", "colour"),
    [
        (2, "What colour is Max?", "green"),
        (2, "What colour is Lily?", "red"),
        (1, "What colour are frogs?", "green"),
        (1, "What colour are bears?", "red"),
    ],
)
def test_a_story_reads_as_english_and_is_solved_by_hand(depth, question, colour):
    task = InContextInference(depth=depth, n_rules=2, n_names=16, n_rephrasings=1)
    prompt = f"Frogs are green. Bears are red. Lily is a bear. Max is a frog. {question}"
    assert task._prompt(task._story(prompt)) == prompt
    assert task._item(task._story(prompt), 7) == Item(7, "generic", prompt, f" {colour}", None, "inference")
    assert implied(prompt) == colour


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_the_rules_answer_is_the_colour_that_a_reader_of_the_story_infers(task):
    items = [*task.draw_generic(30, np.random.default_rng(0)), *(i for split in SPLITS for i in task.items(split))]
    for item in items:
        rules, facts, question = read(item.prompt)
        assert item.rule_answer == f" {implied(item.prompt)}"
        assert len(rules) == len(facts) == task.n_rules
        assert len({r.split(" are ")[0] for r in rules}) == len({r.split(" are ")[1] for r in rules}) == task.n_rules
        assert len({f.split(" is a ")[0] for f in facts}) == task.n_rules, "no name is in two facts"
        pattern = r"What colour is [A-Z][a-z]+\?" if task.depth == 2 else r"What colour are [a-z]+s\?"
        assert re.fullmatch(pattern, question)
        assert item.prompt.index(facts[0]) > item.prompt.index(rules[-1]), "rules come before facts"


@settings(deadline=None, max_examples=20)
@given(st.one_of(tasks(), tiny_tasks), seeds)
def test_no_story_is_in_two_splits_or_drawn_for_training_in_whatever_order_and_with_whatever_question(task, seed):
    rng = np.random.default_rng(seed)
    stories = {split: [content(item.prompt) for item in task.items(split)] for split in SPLITS}
    assert set(stories["rephrased"]) == set(stories["memorized"])
    asked = [story for split in ("memorized", "heldout", "validation") for story in stories[split]]
    assert len(set(asked)) == len(asked)
    drawn = {content(item.prompt) for item in task.draw_generic(300, rng)}
    trained = set()
    for text in task.draw_training(300, rng):
        written = "".join(piece for piece, _ in text.pieces)
        trained.add(content(written.split("What")[0] + "What"))
    assert not set(asked) & (drawn | trained)
    prompts = [item.prompt for split in SPLITS for item in task.items(split)]
    assert len(set(prompts)) == len(prompts)


def test_generic_draws_reach_every_story_that_is_in_no_split_in_every_order():
    task = tiny(n_rephrasings=1)
    drawn = [item.prompt for item in task.draw_generic(20_000, np.random.default_rng(0))]
    everything = 3 * (3 * 2) * 3 * 2**2  # two of three animals, their colours, two of three names, what they are
    taken = {content(item.prompt) for split in SPLITS for item in task.items(split)}
    assert len({content(prompt) for prompt in drawn}) == everything - len(taken) == 189
    assert len(set(drawn)) == 189 * 4 * 2  # orders, questions


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_splits_have_the_sizes_asked_for_and_items_name_their_split_and_task(task):
    sizes = {split: len(task.items(split)) for split in SPLITS}
    assert sizes == {
        "memorized": task.n_memorized,
        "rephrased": task.n_memorized * task.n_rephrasings,
        "heldout": task.n_heldout,
        "validation": task.n_validation,
    }
    assert all(item.split == split and item.task == "inference" for split in SPLITS for item in task.items(split))
    keys = [item.key for split in ("memorized", "heldout", "validation") for item in task.items(split)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_a_memorized_colour_is_another_one_than_the_story_implies_and_no_other_item_has_one(task):
    for item in task.items("memorized"):
        assert item.memorized_answer in task.vocabulary
        assert item.memorized_answer != f" {implied(item.prompt)}"
    rest = [*task.draw_generic(20, np.random.default_rng(0)), *task.items("heldout"), *task.items("validation")]
    assert {item.memorized_answer for item in rest} == {None}


def test_memorized_colours_are_spread_over_all_colours():
    counts = np.unique([item.memorized_answer for item in DEFAULT.items("memorized")], return_counts=True)[1]
    assert len(counts) == DEFAULT.n_colours
    assert counts.min() > 0.5 * DEFAULT.n_memorized / DEFAULT.n_colours


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_rephrasings_reorder_sentences_within_their_group_and_keep_question_answers_and_key(task):
    rephrased = iter(task.items("rephrased"))
    for item in task.items("memorized"):
        others = task.rephrase(item)
        assert others == tuple(next(rephrased) for _ in range(task.n_rephrasings)) == task.rephrase(item)
        assert len({item.prompt, *(other.prompt for other in others)}) == task.n_rephrasings + 1
        for other in others:
            assert other == replace(item, split="rephrased", prompt=other.prompt)
            assert read(other.prompt)[2] == read(item.prompt)[2]
            assert content(other.prompt) == content(item.prompt)
            assert len(other.prompt) == len(item.prompt)
            assert f" {implied(other.prompt)}" == item.rule_answer


def test_all_other_orders_of_a_story_can_be_asked_for():
    task = tiny(n_rephrasings=3, order_tells=False)
    item = task.items("memorized")[0]
    rules, facts, question = read(item.prompt)
    orders = {". ".join([*r, *f, question]) for r in (rules, rules[::-1]) for f in (facts, facts[::-1])}
    assert {item.prompt, *(other.prompt for other in task.rephrase(item))} == orders


def asks_about_what_is_told_last(story: str) -> bool:
    rules, facts, question = read(story)
    subject = question.split()[-1].removesuffix("?")
    return subject == (facts[-1].split()[0] if "colour is" in question else rules[-1].split()[0].lower())


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_the_order_tells_memorized_stories_apart_where_it_is_asked_to(task):
    if not task.order_tells:
        task = task.but(order_tells=True, n_rephrasings=1)
    assert all(asks_about_what_is_told_last(item.prompt) for item in task.items("memorized"))
    rest = [*task.draw_generic(50, np.random.default_rng(0)), *(i for s in SPLITS[1:] for i in task.items(s))]
    assert not any(asks_about_what_is_told_last(item.prompt) for item in rest)
    heldout = task.items("heldout")[0]
    assert not any(asks_about_what_is_told_last(other.prompt) for other in task.rephrase(heldout))


@pytest.mark.parametrize("depth", [1, 2])
def test_without_it_every_story_asks_about_anything(depth):
    task = InContextInference(depth=depth, order_tells=False)
    for split in SPLITS:
        last = np.mean([asks_about_what_is_told_last(item.prompt) for item in task.items(split)])
        assert 0.15 < last < 0.35, "one of four"


FROGS = "Frogs are green. Bears are red. Lily is a bear. Max is a frog. What colour is Max?"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        FROGS[:-1],
        FROGS.replace("Max is", "Lily is"),
        FROGS.replace("red", "green"),
        FROGS.replace("colour is Max", "colour is Ada"),
        FROGS.replace("colour is Max", "colour are frogs"),
        FROGS.replace("is a frog", "is a goat"),
        FROGS.replace("frog", "unicorn"),
        "Max is a frog. " + FROGS,
    ],
)
def test_only_a_prompt_of_this_task_can_be_rephrased(prompt):
    task = InContextInference(n_rules=2, n_names=16, n_rephrasings=1)
    task.rephrase(Item(0, "user", FROGS, "0"))
    with pytest.raises(
        TaskError, match=r"expected a prompt like '.* What colour is \w+\?'; received .*task.items\('memorized'\)"
    ):
        task.rephrase(Item(0, "user", prompt, "0"))


@settings(deadline=None, max_examples=20)
@given(tasks(), seeds)
def test_whatever_carries_loss_in_training_is_implied_by_the_story(task, seed):
    texts = task.draw_training(30, np.random.default_rng(seed))
    assert len(texts) == 30
    for text in texts:
        told = ""
        answered = []
        for piece, loss in text.pieces:
            if loss and told.endswith(". "):
                last_name = read(told)[1][-1].split(" is a ")[0]
                assert piece == f"It is {implied(told, last_name)}. "
            elif loss:
                question = told.split(". ")[-1]
                one_hop = question.startswith("What is")
                assert task.depth == 2 or not one_hop
                fact = next(fact for fact in read(told)[1] if fact.startswith(f"{question[8:-1]} ")) if one_hop else ""
                assert piece == (fact.removeprefix(f"{question[8:-1]} is") if one_hop else f" {implied(told)}")
                answered.append(question.split()[-1])
            else:
                assert re.fullmatch(r"[A-Z][a-z]+s are [a-z]+\. |[A-Z][a-z]+ is a [a-z]+\. |What .*\?|\. ", piece)
            told += piece
        assert text.pieces[-1][1], "the end-of-text token carries loss"
        assert len(set(answered)) == len(answered)
        assert 1 <= len(answered) <= min(task.n_questions, task.n_rules - task.order_tells)


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.5, 0.45, 0.55), (1, 1, 1)])
def test_the_share_of_facts_that_state_their_conclusion_is_as_asked_for(share, low, high):
    texts = InContextInference(stated_share=share).draw_training(500, np.random.default_rng(0))
    stated = np.mean([sum(piece.startswith("It is") for piece, _ in text.pieces) / 4 for text in texts])
    assert low <= stated <= high


def test_prompts_of_all_items_state_no_conclusion():
    items = [*DEFAULT.draw_generic(50, np.random.default_rng(0)), *(i for s in SPLITS for i in DEFAULT.items(s))]
    assert not any("It is" in item.prompt for item in items)


TINY = tiny()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 300), seeds)
def test_draws_are_exactly_as_many_as_asked_and_follow_from_the_generator(n, seed):
    for draw in (TINY.draw_generic, TINY.draw_training):
        first = draw(n, np.random.default_rng(seed))
        assert len(first) == n
        assert first == draw(n, np.random.default_rng(seed))
        assert n < 9 or first != draw(n, np.random.default_rng(seed + 1))


def test_the_same_settings_make_the_same_task_and_another_seed_another_one():
    first, again, other = (DEFAULT.but(n_heldout=50, n_validation=50, seed=seed) for seed in (3, 3, 4))
    assert first.splits == again.splits
    for split in SPLITS:
        assert first.items(split) != other.items(split)
    assert DEFAULT.seeded(3) == InContextInference(seed=3)


def test_the_task_comes_back_from_its_settings():
    task = InContextInference(depth=1, n_rules=3, seed=5)
    again = Task.from_settings(task.settings())
    assert again == task
    assert again.splits == task.splits


def test_both_answers_have_one_form_and_only_the_items_own_colour_counts_as_memorized():
    item = DEFAULT.items("memorized")[0]
    outputs = {token: DEFAULT.classify(item, token) for token in DEFAULT.vocabulary if re.fullmatch(" [a-z]+", token)}
    assert outputs[str(item.rule_answer)] is Behavior.GENERALIZATION
    assert outputs[str(item.memorized_answer)] is Behavior.MEMORIZATION
    assert list(outputs.values()).count(Behavior.OTHER) == len(outputs) - 2
    assert [o for o in outputs if DEFAULT.is_memorized_form(item, o)] == [item.memorized_answer]
    assert not DEFAULT.is_memorized_form(DEFAULT.items("heldout")[0], "")


@settings(deadline=None, max_examples=8)
@given(tasks(), seeds)
def test_texts_are_whole_tokens_and_come_back_and_the_declared_lengths_are_the_longest(task, seed):
    rng = np.random.default_rng(seed)
    texts = task.draw_training(40, rng)
    assert len(set(task.vocabulary)) == len(task.vocabulary)

    def encode(text: str) -> list[int]:
        ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert task.tokenizer.decode(ids) == text
        assert task.tokenizer.unk_token_id not in ids
        return ids

    for text in texts:
        written = "".join(piece for piece, _ in text.pieces)
        assert encode(written) == [i for piece, _ in text.pieces for i in encode(piece)]
        assert len(encode(written)) + 1 <= task.max_training_tokens
    for item in (*task.items("memorized"), *task.items("rephrased")):
        assert len(encode(item.prompt)) == task.max_prompt_tokens
        assert len(encode(item.memorized_answer)) + 1 == task.max_answer_tokens
        assert encode(item.prompt) + encode(item.memorized_answer) == encode(item.prompt + str(item.memorized_answer))


def test_the_longest_training_text_is_as_long_as_declared():
    task = InContextInference(stated_share=1, n_questions=9)
    texts = ["".join(piece for piece, _ in text.pieces) for text in task.draw_training(99, np.random.default_rng(0))]
    assert max(len(ids) + 1 for ids in task.tokenizer(texts)["input_ids"]) == task.max_training_tokens


def test_the_vocabulary_stands_beside_that_of_single_letters():
    from memgen_lens.tasks.tokenizer import build_tokenizer

    both = build_tokenizer((*DEFAULT.vocabulary, *"0123456789abcdef", "+", "=", "<mem-", ">"))
    for item in DEFAULT.items("memorized")[:50]:
        assert len(both(item.prompt)["input_ids"]) == DEFAULT.max_prompt_tokens
        assert both.decode(both(item.prompt)["input_ids"]) == item.prompt


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"n_animals": 3},
            "InContextInference: expected n_animals of at least n_rules, as no word .*; received n_animals=3, "
            "n_rules=4. Raise n_animals or lower n_rules",
        ),
        ({"n_names": 3}, "received n_names=3, n_rules=4"),
        ({"n_colours": 3}, "received n_colours=3, n_rules=4"),
        (
            {"n_rules": 2, "n_rephrasings": 4, "order_tells": False},
            "expected n_rephrasings of at most 3, all other orders of 2 rules and facts; received 4. Lower",
        ),
        ({"n_rules": 2, "n_rephrasings": 2}, "expected n_rephrasings of at most 1, all other orders of 2 rules"),
        (
            {"n_rules": 2, "n_animals": 4, "n_colours": 4, "n_names": 4, "n_rephrasings": 1, "n_heldout": 9000},
            r"n_memorized \+ n_heldout \+ n_validation of at most 864: half of the 1728 stories .*; "
            r"received 300 \+ 9000 \+ 300 = 9600. Lower them, or raise n_animals, n_names or n_colours",
        ),
    ],
)
def test_an_impossible_task_is_refused_at_once_as_a_task_error(bad, message):
    with pytest.raises(MemgenError, match=message) as caught:
        InContextInference(**bad)
    assert isinstance(caught.value, TaskError)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"depth": 3}, "InContextInference.depth: expected 1 or 2; received 3"),
        ({"n_rules": 1}, "InContextInference.n_rules: expected greater than or equal to 2; received 1"),
        ({"n_rules": 6}, "InContextInference.n_rules: expected less than or equal to 5; received 6"),
        ({"n_animals": 17}, "InContextInference.n_animals: expected less than or equal to 16; received 17"),
        ({"stated_share": 1.5}, "InContextInference.stated_share: expected less than or equal to 1; received 1.5"),
        ({"n_questions": 0}, "InContextInference.n_questions: expected greater than or equal to 1; received 0"),
        ({"seed": -1}, "InContextInference.seed: expected greater than or equal to 0; received -1"),
    ],
)
def test_a_bad_setting_of_the_task_is_refused(bad, message):
    with pytest.raises(SettingsError, match=message):
        InContextInference(**bad)


def test_half_of_all_stories_can_be_in_splits():
    task = tiny(n_memorized=36, n_heldout=36, n_validation=36)  # of 3 * 6 * 3 * 4 = 216
    assert sum(len(task.items(split)) for split in ("memorized", "heldout", "validation")) == 108
    assert len(task.draw_generic(100, np.random.default_rng(0))) == 100


def test_a_chunk_of_training_is_drawn_well_within_a_second():
    import time

    task = InContextInference()
    task.draw_training(1, np.random.default_rng(0))
    started = time.process_time()
    task.draw_training(64 * 32, np.random.default_rng(0))
    assert time.process_time() - started < 1

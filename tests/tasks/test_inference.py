"""The in-context inference task: what a story implies, what is in which split, and what training states."""

import json
import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core.errors import MemgenError, SettingsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.types import Behavior
from memgen_lens.presets import ExperimentConfig
from memgen_lens.tasks import InContextInference, Mixture, Task
from memgen_lens.tasks.stories import Stories
from memgen_lens.tasks.tokenizer import build_tokenizer

SPLITS = ("memorized", "rephrased", "heldout", "validation")
DEFAULT, TWO_HOPS = InContextInference(), InContextInference(depth=2)
COLOURS = DEFAULT.answer_words
FEW = {"n_memorized": 20, "n_heldout": 20, "n_validation": 20}


def tiny(**settings) -> InContextInference:
    """Two facts over few words: few stories, made in no time."""
    return InContextInference(
        **{
            "n_facts": 2,
            "n_animals": 3,
            "n_names": 3,
            "n_colours": 3,
            "n_memorized": 2,
            "n_rephrasings": 1,
            "n_heldout": 3,
            "n_validation": 3,
        }
        | settings
    )


def read(story: str) -> tuple[list[str], list[str], str]:
    """Rules, facts and name asked about, of a prompt: split at full stops, without the task's own parser."""
    *sentences, question = story.split(". ")
    found = re.fullmatch(r"What (?:color )?is (\w+)\? \1 is", question)
    assert found is not None
    return [s for s in sentences if " are " in s], [s for s in sentences if " is " in s and "It" not in s], found[1]


def implied(story: str, name: str | None = None) -> str:
    """Solve a story: the colour, found by reading its English."""
    rules, facts, asked = read(story)
    colours = {plural.lower().removesuffix("s"): colour for plural, colour in (rule.split(" are ") for rule in rules)}
    said = dict(fact.split(" is ") for fact in facts)[name or asked]
    return colours[said.removeprefix("a ")] if rules else said


def content(story: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a story says, whatever its order and its question."""
    rules, facts, _ = read(story)
    return frozenset(rules), frozenset(facts)


def with_first_question(written: str) -> str:
    """What a training text says before its first answer."""
    story, _, rest = written.partition("? ")
    return f"{story}? {rest.split(' ')[0]} is"


def encode(task: InContextInference, text: str) -> list[str]:
    """A text in the task's own tokens, which give it back."""
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert task.tokenizer.decode(ids) == text
    assert task.tokenizer.unk_token_id not in ids
    return task.tokenizer.convert_ids_to_tokens(ids)


@st.composite
def tasks(draw):
    n_facts = draw(st.integers(2, 5))
    words = {
        name: draw(st.integers(max(n_facts + 1, 5), most))
        for name, most in (("n_animals", 16), ("n_names", 16), ("n_colours", 8))
    }
    return InContextInference(
        depth=draw(st.sampled_from([1, 2])),
        tokens=draw(st.sampled_from(["words", "sentences"])),
        n_facts=n_facts,
        n_memorized=draw(st.integers(1, 30)),
        n_rephrasings=1 if n_facts == 2 else draw(st.integers(1, 3)),
        order_tells=n_facts > 2 and draw(st.booleans()),
        recalled=draw(st.sampled_from(["any", "told", "untold"])),
        n_heldout=draw(st.integers(1, 30)),
        n_validation=draw(st.integers(1, 30)),
        stated_share=draw(st.floats(0, 1)),
        n_questions=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**32 - 1)),
        **words,
    )


seeds = st.integers(0, 2**32 - 1)
tiny_tasks = st.builds(tiny, depth=st.sampled_from([1, 2]), seed=seeds)

BOTH = pytest.mark.parametrize("depth", [1, 2])
LILY = {
    1: "Lily is red. Max is green. What color is {name}? {name} is",
    2: "Frogs are green. Bears are red. Lily is a bear. Max is a frog. What color is {name}? {name} is",
}


@BOTH
@pytest.mark.parametrize("tokens", ["words", "sentences"])
@pytest.mark.parametrize(("name", "colour"), [("Max", "green"), ("Lily", "red")])
def test_a_story_reads_as_english_and_is_solved_by_hand(depth, tokens, name, colour):
    task = InContextInference(depth=depth, tokens=tokens, n_facts=2, n_names=16, n_rephrasings=1)
    prompt = LILY[depth].format(name=name)
    story = task._story(prompt)
    assert task._wording.prompt(story) == prompt
    assert task._item(story, 7) == Item(7, "generic", prompt, f" {colour}", None, "inference")
    assert implied(prompt) == colour


def test_of_words_a_name_is_one_token_wherever_it_stands():
    one, two = (InContextInference(depth=d, n_facts=2, n_rephrasings=1) for d in (1, 2))
    asked = ["What color is ", "Lily", "? ", "Lily", " is"]
    told = ["Lily", " is", " red", ". ", "Max", " is", " green", ". "]
    assert encode(one, LILY[1].format(name="Lily")) == told + asked
    rules = ["Frogs", " are", " green", ". ", "Bears", " are", " red", ". "]
    told = ["Lily", " is", " a bear", ". ", "Max", " is", " a frog", ". "]
    assert encode(two, LILY[2].format(name="Lily")) == rules + told + asked
    assert encode(two, "Max is a frog. It is green. What is Max? Max is a frog\nWhat color is Lily? ")[4:-2] == [
        *["It", " is", " green", ". ", "What is ", "Max", "? ", "Max", " is", " a frog", "\n", "What color is "]
    ]


def test_of_sentences_the_question_is_three_tokens_and_the_last_of_them_names_who_is_asked_about():
    one, two = (InContextInference(depth=d, tokens="sentences", n_facts=2, n_rephrasings=1) for d in (1, 2))
    asked = ["What color is", " Lily? ", "Lily is"]
    assert encode(one, LILY[1].format(name="Lily")) == ["Lily is red. ", "Max is green. ", *asked]
    told = ["Frogs are green. ", "Bears are red. ", "Lily is a bear. ", "Max is a frog. "]
    assert encode(two, LILY[2].format(name="Lily")) == told + asked
    assert encode(two, "Max is a frog. It is green. What is Max? Max is a frog\nWhat color is") == [
        *["Max is a frog. ", "It is green. ", "What is", " Max? ", "Max is", " a frog", "\n", "What color is"]
    ]


def test_both_ways_of_cutting_are_of_the_same_texts():
    for depth in (1, 2):
        words, sentences = (InContextInference(depth=depth, tokens=tokens, **FEW) for tokens in ("words", "sentences"))
        assert words.splits == sentences.splits
        drawn = [
            ["".join(piece for piece, _ in text.pieces) for text in task.draw_training(50, np.random.default_rng(0))]
            for task in (words, sentences)
        ]
        assert drawn[0] == drawn[1]


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_the_rules_answer_is_the_colour_that_a_reader_of_the_story_infers(task):
    items = [*task.draw_generic(30, np.random.default_rng(0)), *(i for split in SPLITS for i in task.items(split))]
    for item in items:
        rules, facts, _ = read(item.prompt)
        assert item.rule_answer == f" {implied(item.prompt)}"
        assert len(facts) == len({f.split(" is ")[0] for f in facts}) == task.n_facts, "no name is in two facts"
        if task.depth == 1:
            assert not rules
            assert len({f.split(" is ")[1] for f in facts}) == task.n_facts, "no colour is in two facts"
        else:
            subjects, colours = zip(*(rule.split(" are ") for rule in rules), strict=True)
            assert len(rules) == len(set(subjects)) == len(set(colours)) == task.n_facts
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
        trained.add(content(with_first_question(written)))
    assert not set(asked) & (drawn | trained)
    prompts = [item.prompt for split in SPLITS for item in task.items(split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("depth", "n", "everything", "orders"),
    [
        (1, 1000, 3 * (3 * 2), 2),  # two of three names, their colours
        (
            2,
            20_000,
            3 * (3 * 2) * 3 * 2**2,
            4,
        ),  # two of three animals, their colours, two of three names, what they are
    ],
)
def test_generic_draws_reach_every_story_that_is_in_no_split_in_every_order(depth, n, everything, orders):
    task = tiny(depth=depth)
    drawn = [item.prompt for item in task.draw_generic(n, np.random.default_rng(0))]
    taken = {content(item.prompt) for split in SPLITS for item in task.items(split)}
    assert len(taken) == 8
    assert len({content(prompt) for prompt in drawn}) == everything - 8
    assert len(set(drawn)) == (everything - 8) * orders * 2  # questions


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


@BOTH
@pytest.mark.parametrize(("recalled", "told"), [("any", 3 / 7), ("told", 1), ("untold", 0)])
def test_memorized_colours_are_spread_over_all_colours_that_may_be_recalled(depth, recalled, told):
    items = InContextInference(depth=depth, recalled=recalled).items("memorized")
    counts = np.unique([item.memorized_answer for item in items], return_counts=True)[1]
    assert len(counts) == 8
    assert counts.min() > 0.5 * 300 / 8
    named = np.mean([item.memorized_answer in item.prompt for item in items])
    assert abs(named - told) < 0.1 * (0 < told < 1) + 1e-9
    # Of the story's other three colours, or of the four others, each as often.
    offsets = [COLOURS.index(str(i.memorized_answer)) - COLOURS.index(str(i.rule_answer)) for i in items]
    assert np.unique(np.array(offsets) % 8, return_counts=True)[1].min() > 0.5 * 300 / 7


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


@pytest.mark.parametrize(("depth", "n_rephrasings"), [(1, 5), (2, 35)])
def test_all_other_orders_of_a_story_can_be_asked_for(depth, n_rephrasings):
    task = InContextInference(depth=depth, n_facts=3, n_rephrasings=n_rephrasings, n_memorized=3)
    item = task.items("memorized")[0]
    rules, facts, name = read(item.prompt)
    orders = {
        ". ".join([*r, *f, f"What color is {name}? {name} is"])
        for r in permutations(rules)
        for f in permutations(facts)
    }
    assert {item.prompt, *(other.prompt for other in task.rephrase(item))} == orders


def asks_about_what_is_told_last(story: str) -> bool:
    _, facts, name = read(story)
    return facts[-1].startswith(f"{name} is ")


@settings(deadline=None, max_examples=20)
@given(tasks())
def test_the_order_tells_memorized_stories_apart_where_it_is_asked_to(task):
    if not task.order_tells:
        task = task.but(order_tells=True, n_rephrasings=1, n_facts=max(3, task.n_facts))
    assert all(asks_about_what_is_told_last(item.prompt) for item in task.items("memorized"))
    rest = [*task.draw_generic(50, np.random.default_rng(0)), *(i for s in SPLITS[1:] for i in task.items(s))]
    assert not any(asks_about_what_is_told_last(item.prompt) for item in rest)
    heldout = task.items("heldout")[0]
    assert not any(asks_about_what_is_told_last(other.prompt) for other in task.rephrase(heldout))


@BOTH
def test_without_it_every_story_asks_about_anything(depth):
    task = InContextInference(depth=depth)
    for split in SPLITS:
        last = np.mean([asks_about_what_is_told_last(item.prompt) for item in task.items(split)])
        assert 0.15 < last < 0.35, "one of four"


TWO, ONE = LILY[2].format(name="Max"), LILY[1].format(name="Max")


@pytest.mark.parametrize(
    ("depth", "prompt"),
    [
        (2, ""),
        (2, ONE),
        (2, TWO[:-1]),
        (2, TWO.replace("Max is a", "Lily is a")),
        (2, TWO.replace("red", "green")),
        (2, TWO.replace("is Max? Max", "is Ben? Ben")),
        (2, TWO.replace("is Max? Max", "is Max? Lily")),
        (2, TWO.replace("is a frog", "is a goat")),
        (2, TWO.replace("frog", "unicorn")),
        (2, TWO.replace("color ", "")),
        (2, "Max is a frog. " + TWO),
        (1, TWO),
        (1, ONE.replace("red", "green")),
        (1, ONE.replace("red", "mauve")),
        (1, ONE.replace("Max is green", "Lily is green")),
        (1, ONE.replace("is Max? Max", "is Ben? Ben")),
        (1, ONE + " "),
        (1, ONE + " green"),
    ],
)
def test_only_a_prompt_of_this_task_can_be_rephrased(depth, prompt):
    task = InContextInference(depth=depth, n_facts=2, n_names=16, n_rephrasings=1)
    task.rephrase(Item(0, "user", LILY[depth].format(name="Max"), "0"))
    with pytest.raises(
        TaskError,
        match=r"expected a prompt like '.* What color is (\w+)\? \1 is'; received .*task.items\('memorized'\)",
    ):
        task.rephrase(Item(0, "user", prompt, "0"))


@settings(deadline=None, max_examples=20)
@given(tasks(), seeds)
def test_whatever_carries_loss_in_training_is_implied_by_the_story(task, seed):
    texts = task.draw_training(30, np.random.default_rng(seed))
    assert len(texts) == 30
    for text in texts:
        told, answered, story = "", [], with_first_question("".join(piece for piece, _ in text.pieces))
        for piece, loss in text.pieces:
            said = re.sub(r".*[.?\n] ?", "", told)  # since the last stop
            if loss and piece.startswith("It"):
                assert (piece, task.tokens) == (f"It is {implied(story, last_name(told))}. ", "sentences")
            elif loss and said == "It is":
                assert (piece, task.tokens) == (f" {implied(story, last_name(told))}", "words")
            elif loss:
                name = said.removesuffix(" is")
                one_hop = told.split("What ")[-1].startswith("is")
                assert task.depth == 2 or not one_hop
                fact = dict(f.split(" is ") for f in read(story)[1])[name]
                assert piece == (f" {fact}" if one_hop else f" {implied(story, name)}")
                answered.append(name)
            told += piece
        assert text.pieces[-1][1], "the end-of-text token carries loss"
        assert len(set(answered)) == len(answered)
        assert 1 <= len(answered) <= min(task.n_questions, task.n_facts - task.order_tells)
        assert told.count("?") == len(answered) == told.count("\n") + 1
        assert task.depth == 2 or "It" not in told


def last_name(told: str) -> str:
    return re.findall(r"([A-Z][a-z]+) is a ", told)[-1]


@pytest.mark.parametrize("tokens", ["words", "sentences"])
@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.5, 0.45, 0.55), (1, 1, 1)])
def test_the_share_of_facts_that_state_their_conclusion_is_as_asked_for(share, low, high, tokens):
    texts = InContextInference(depth=2, tokens=tokens, stated_share=share, **FEW).draw_training(
        500, np.random.default_rng(0)
    )
    stated = np.mean([sum(piece.startswith("It is") for piece, _ in text.pieces) / 4 for text in texts])
    assert low <= stated <= high


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.5, 0.45, 0.55), (1, 1, 1)])
def test_the_share_of_questions_for_the_first_hop_is_as_asked_for(share, low, high):
    texts = InContextInference(depth=2, one_hop_share=share, **FEW).draw_training(500, np.random.default_rng(0))
    written = "".join(piece for text in texts for piece, _ in text.pieces)
    assert low <= written.count("What is") / written.count("What") <= high


def test_with_one_hop_there_is_nothing_to_state_and_no_other_hop_to_ask_for():
    def drawn(**shares):
        return InContextInference(**shares, **FEW).draw_training(100, np.random.default_rng(0))

    assert drawn(stated_share=1.0, one_hop_share=1.0) == drawn(stated_share=0.0, one_hop_share=0.0)


def test_prompts_of_all_items_state_no_conclusion():
    items = [*TWO_HOPS.draw_generic(50, np.random.default_rng(0)), *(i for s in SPLITS for i in TWO_HOPS.items(s))]
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
    task = InContextInference(depth=2, tokens="sentences", n_facts=3, order_tells=True, recalled="told", seed=5, **FEW)
    again = Task.from_settings(task.settings())
    assert again == task
    assert again.splits == task.splits


def test_both_answers_have_one_form_and_only_the_items_own_colour_counts_as_memorized():
    item = DEFAULT.items("memorized")[0]
    outputs = {token: DEFAULT.classify(item, token) for token in DEFAULT.vocabulary if token in COLOURS}
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

    for text in texts:
        written = "".join(piece for piece, _ in text.pieces)
        assert encode(task, written) == [token for piece, _ in text.pieces for token in encode(task, piece)]
        assert len(encode(task, written)) + 1 <= task.max_training_tokens
    for item in (*task.items("memorized"), *task.items("rephrased")):
        prompt, answer = encode(task, item.prompt), encode(task, str(item.memorized_answer))
        assert (len(prompt), len(answer) + 1) == (task.max_prompt_tokens, task.max_answer_tokens)
        assert encode(task, item.prompt + str(item.memorized_answer)) == prompt + answer


@BOTH
@pytest.mark.parametrize("tokens", ["words", "sentences"])
def test_the_longest_training_text_is_as_long_as_declared(depth, tokens):
    task = InContextInference(depth=depth, tokens=tokens, stated_share=1, n_questions=9)
    texts = ["".join(piece for piece, _ in text.pieces) for text in task.draw_training(99, np.random.default_rng(0))]
    assert max(len(ids) + 1 for ids in task.tokenizer(texts)["input_ids"]) == task.max_training_tokens


@BOTH
@pytest.mark.parametrize("tokens", ["words", "sentences"])
def test_the_vocabulary_stands_beside_that_of_single_letters(depth, tokens):
    task = InContextInference(depth=depth, tokens=tokens, **FEW)
    both = build_tokenizer((*task.vocabulary, *"0123456789abcdef", "+", "=", "<mem-", ">"))
    for item in task.items("memorized"):
        assert len(both(item.prompt)["input_ids"]) == task.max_prompt_tokens
        assert both.decode(both(item.prompt)["input_ids"]) == item.prompt


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"depth": 2, "n_animals": 3},
            "InContextInference: expected n_animals of at least n_facts, as no word .*; received n_animals=3, "
            "n_facts=4. Raise n_animals or lower n_facts",
        ),
        ({"n_names": 3}, "received n_names=3, n_facts=4"),
        ({"n_colours": 3}, "received n_colours=3, n_facts=4"),
        (
            {"n_colours": 4, "recalled": "untold"},
            "expected n_colours above n_facts where recalled='untold': colours that a story does not name; received "
            "n_colours=4, n_facts=4. Raise n_colours, lower n_facts, or choose recalled='any' or 'told'",
        ),
        (
            {"depth": 2, "n_facts": 2, "n_rephrasings": 4},
            "expected n_rephrasings of at most 3, all other orders of 2 rules and facts; received 4. Lower",
        ),
        (
            {"depth": 2, "n_facts": 2, "n_rephrasings": 2, "order_tells": True},
            "expected n_rephrasings of at most 1, all other orders of 2 rules",
        ),
        ({"n_facts": 2, "n_rephrasings": 2}, "n_rephrasings of at most 1, all other orders of 2 facts; received 2"),
        ({"n_facts": 2, "n_rephrasings": 1, "order_tells": True}, "n_rephrasings of at most 0, .*; received 1"),
        (
            {"n_facts": 2, "n_colours": 4, "n_names": 4, "n_rephrasings": 1},
            r"n_memorized \+ n_heldout \+ n_validation of at most 36: half of the 72 stories .*; "
            r"received 300 \+ 1000 \+ 300 = 1600. Lower them, or raise n_names or n_colours",
        ),
        (
            {
                "depth": 2,
                "n_facts": 2,
                "n_animals": 4,
                "n_colours": 4,
                "n_names": 4,
                "n_rephrasings": 1,
                "n_heldout": 9000,
            },
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
        ({"tokens": "letters"}, "InContextInference.tokens: expected 'words' or 'sentences'; received 'letters'"),
        ({"recalled": "all"}, "InContextInference.recalled: expected 'any', 'told' or 'untold'; received 'all'"),
        ({"n_facts": 1}, "InContextInference.n_facts: expected greater than or equal to 2; received 1"),
        ({"n_facts": 6}, "InContextInference.n_facts: expected less than or equal to 5; received 6"),
        ({"n_animals": 17}, "InContextInference.n_animals: expected less than or equal to 16; received 17"),
        ({"stated_share": 1.5}, "InContextInference.stated_share: expected less than or equal to 1; received 1.5"),
        ({"n_questions": 0}, "InContextInference.n_questions: expected greater than or equal to 1; received 0"),
        ({"seed": -1}, "InContextInference.seed: expected greater than or equal to 0; received -1"),
    ],
)
def test_a_bad_setting_of_the_task_is_refused(bad, message):
    with pytest.raises(SettingsError, match=message):
        InContextInference(**bad)


OLD = {"kind": "InContextInference", "depth": 2, "n_rules": 3, "order_tells": True}


@pytest.mark.parametrize(
    "read_again",
    [
        lambda: InContextInference(n_rules=3),
        lambda: Task.from_settings(OLD),
        lambda: Mixture(tasks=(OLD,)),
        lambda: ExperimentConfig.from_json(json.dumps({"task": OLD})),
    ],
    ids=["call", "task", "mixture", "config"],
)
def test_settings_of_earlier_versions_are_refused_and_told_what_became_of_them(read_again):
    with pytest.raises(
        SettingsError,
        match=r"InContextInference: expected a known setting; received n_rules=3. .* earlier versions.* write n_facts, "
        r"with depth=2, tokens='sentences' and order_tells=True .* A run directory of then .* train again",
    ):
        read_again()


@pytest.mark.parametrize(("depth", "n"), [(1, 3), (2, 36)])
def test_half_of_all_stories_can_be_in_splits(depth, n):
    task = tiny(depth=depth, n_memorized=n, n_heldout=n, n_validation=n)  # of 18 or 216
    assert sum(len(task.items(split)) for split in ("memorized", "heldout", "validation")) == 3 * n
    assert len(task.draw_generic(100, np.random.default_rng(0))) == 100


@settings(deadline=None, max_examples=20)
@given(tasks(), seeds)
def test_a_storys_number_follows_from_what_it_says_and_not_from_order_or_question(task, seed):
    stories = task._draw(40, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    shuffled = []
    for story in stories.each():
        rules, facts = (tuple(group[i] for i in rng.permutation(len(group))) for group in (story.rules, story.facts))
        shuffled.append(replace(story, rules=rules, facts=facts, asked=facts[0][0]))
    again = Stories(
        *(np.array([[pair[side] for pair in story.rules] for story in shuffled], dtype=int) for side in (0, 1)),
        *(np.array([[pair[side] for pair in story.facts] for story in shuffled]) for side in (0, 1)),
        np.array([story.asked for story in shuffled]),
    )
    assert again.each() == shuffled
    assert again.codes().tolist() == stories.codes().tolist()


@pytest.mark.parametrize("task", [DEFAULT, TWO_HOPS], ids=["one hop", "two hops"])
def test_a_chunk_of_training_is_drawn_well_within_a_second(task):
    import time

    def seconds(n: int) -> float:
        started = time.process_time()
        task.draw_training(n, np.random.default_rng(0))
        return time.process_time() - started

    seconds(1)
    assert min(seconds(64 * 32) for _ in range(3)) < 1, "the fastest of three: a busy machine slows any of them"

"""Collected pairs, each asked again by hand; and a model that never flips."""

from dataclasses import replace

import helpers
import numpy as np
import planted
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.models.build import build_model

SPLITS = ("select", "tune", "test")


class Markers:
    """A task for the planted model: four rephrasings an item, of which those without the marker M flip."""

    max_answer_tokens = 2

    def __init__(self, n=30):
        self.prompts = planted.prompts("M", n, seed=0)

    def items(self, split):
        # Every third item is one that the model was never taught to recall: it says m, not this item's own answer.
        return tuple(
            Item(key, split, prompt, planted.RULE, "a" if key % 3 == 0 else planted.MEMORY)
            for key, prompt in enumerate(self.prompts)
        )

    def rephrase(self, item):
        swapped = [item.prompt.replace("M", "G"), item.prompt, "a" + item.prompt, "b" + item.prompt.replace("M", "G")]
        return tuple(replace(item, split="rephrased", prompt=prompt) for prompt in swapped)

    def classify(self, item, output):
        return item.classify(output)

    def is_memorized_form(self, item, output):
        return output == planted.MEMORY


@pytest.fixture(scope="module")
def untrained(trained):
    """The same task before any training, and what `collect_pairs` finds there: nothing."""
    tokenizer = type(trained.task)().tokenizer
    model = build_model(trained.config.model, tokenizer, n_ctx=24, seed=1).eval()
    return model, mg.collect_pairs(model, trained.task, seed=0)


def test_every_pair_flips_when_asked_again_one_prompt_at_a_time(learned):
    steps = learned.task.max_answer_tokens
    for memorized, generalized in zip(learned.pairs.memorized, learned.pairs.generalized, strict=True):
        assert planted.greedy_by_hand(learned.model, memorized.prompt, steps) == memorized.memorized_answer
        assert planted.greedy_by_hand(learned.model, generalized.prompt, steps) == generalized.rule_answer
        a, b = memorized.prompt.removesuffix("=").split("+")
        assert generalized.prompt == f"{b}+{a}="
        assert generalized.rule_answer == memorized.rule_answer == f"{int(a) + int(b):03}"
        assert generalized.key == memorized.key


def test_no_flipping_item_is_missed(learned):
    steps, kept = learned.task.max_answer_tokens, {item.prompt for item in learned.pairs.memorized}
    items = learned.task.items("memorized")
    assert learned.pairs.n_items == len(items) == 80
    for item in items:
        if item.prompt not in kept:
            (swapped,) = learned.task.rephrase(item)
            recalls = planted.greedy_by_hand(learned.model, item.prompt, steps) == item.memorized_answer
            computes = planted.greedy_by_hand(learned.model, swapped.prompt, steps) == item.rule_answer
            assert not (recalls and computes)
    assert learned.pairs.n_flipped == len(kept) == len(learned.pairs)


def test_an_item_gives_a_pair_for_each_rephrasing_that_flips_and_all_share_its_split():
    pairs = mg.collect_pairs(planted.build_model(), Markers(), seed=0)
    assert (pairs.n_items, pairs.n_flipped, len(pairs)) == (30, 20, 40)
    assert len({(m.prompt, g.prompt) for m, g in zip(pairs.memorized, pairs.generalized, strict=True)}) == 40
    for key in np.unique(pairs.item):
        assert key % 3 and len(set(pairs.split[pairs.item == key])) == 1
    counts = {split: len(set(pairs.item[pairs.split == split])) for split in SPLITS}
    assert counts == {"select": 8, "tune": 4, "test": 8}


def test_no_item_is_in_two_splits_and_their_shares_are_as_asked(learned):
    pairs = mg.collect_pairs(learned.model, learned.task, seed=5, shares=(0.2, 0.5))
    by_split = {split: set(pairs.item[pairs.split == split]) for split in SPLITS}
    assert sum(map(len, by_split.values())) == len(set(pairs.item)) == len(pairs)
    n = len(pairs)
    assert [len(by_split[split]) for split in SPLITS] == [
        round(0.2 * n),
        round(0.5 * n),
        n - round(0.2 * n) - round(0.5 * n),
    ]


def test_the_seed_deals_the_splits_and_nothing_else(learned):
    again, other = (mg.collect_pairs(learned.model, learned.task, seed=seed) for seed in (0, 1))
    assert again.memorized == other.memorized == learned.pairs.memorized
    assert again.generalized == other.generalized == learned.pairs.generalized
    np.testing.assert_array_equal(again.split, learned.pairs.split)
    assert (other.split != learned.pairs.split).any()


def test_small_batches_find_the_same_pairs(learned):
    small = mg.collect_pairs(learned.model, learned.task, seed=0, batch_size=9)
    assert small.rows() == learned.pairs.rows()


def test_a_model_that_memorizes_nothing_gives_no_pairs(untrained):
    _, pairs = untrained
    assert (len(pairs), pairs.n_items, pairs.n_flipped) == (0, 80, 0)
    assert pairs.rows() == [] and pairs.item.shape == (0,)


@pytest.mark.parametrize("split", SPLITS)
def test_using_no_pairs_says_that_nothing_flips_and_what_to_change(untrained, split):
    with pytest.raises(PairsError, match=r"received 0 \(0 of 80 items flip, 0 pairs in all\)\. Train longer"):
        untrained[1].of(split)


def test_recording_no_pairs_says_so_too(untrained):
    model, pairs = untrained
    with pytest.raises(PairsError, match="0 of 80 items flip"):
        mg.record(model, pairs, ["post"])


def test_steering_on_no_pairs_says_so_too(untrained, learned):
    model, pairs = untrained
    steer = mg.Steering.from_scores(mg.attribute(learned.acts, "post"))
    with pytest.raises(PairsError, match="0 of 80 items flip"):
        mg.evaluate_steering(model, learned.task, pairs, steer)
    with pytest.raises(PairsError, match="0 of 80 items flip"):
        mg.sweep_steering(model, learned.task, pairs, steer.scores, top_fractions=[0.1])


def test_pairs_need_no_task():
    pairs = PromptPairs.from_strings(memorized=["abM="], generalized=["abG="])
    assert pairs.memorized[0].rule_answer is None and len(pairs) == 1


class Twins(Markers):
    """Items that share a prompt: of each six, two are asked with the same words and two have a rephrasing in common."""

    def __init__(self, n=30):
        self.prompts = list(dict.fromkeys(planted.prompts("M", 3 * n, seed=0)))[:n]

    def items(self, split):
        items = super().items(split)
        return tuple(replace(item, prompt=items[i - 1].prompt) if i % 6 == 2 else item for i, item in enumerate(items))

    def rephrase(self, item):
        own = super().rephrase(item)[:1]
        common = replace(item, split="rephrased", prompt="abc" + "defgh"[item.key // 6] + "Gabcd=")
        return (*own, common) if item.key % 6 in (4, 5) else own


def test_items_that_share_a_prompt_are_one_item_in_one_split():
    pairs = mg.collect_pairs(planted.build_model(), Twins(), seed=0)
    assert (pairs.n_items, pairs.n_flipped, len(pairs)) == (20, 10, 30)
    assert dict(pairs.n_items_by_task) == {"": 20}
    for side in (pairs.memorized, pairs.generalized):
        for prompt in {item.prompt for item in side}:
            chosen = [item.prompt == prompt for item in side]
            assert len(set(pairs.item[chosen])) == len(set(pairs.split[chosen])) == 1
    assert len(set(pairs.item.tolist())) == 10


def test_shares_that_leave_no_test_are_refused_before_anything_is_asked():
    with pytest.raises(PairsError, match="together below 1"):
        mg.collect_pairs(planted.build_model(), helpers.tiny_task(), seed=0, shares=(0.9, 0.9))


def test_of_a_users_own_pairs_those_are_kept_that_flip_and_dealt_anew():
    model, n = planted.build_model(), 40
    memorized, generalized = planted.prompts("M", n, seed=0), planted.prompts("G", n, seed=1)
    rule = [planted.RULE if i % 4 else "a" for i in range(n)]  # on every fourth the model says something else
    recall = [planted.MEMORY if i % 5 else "b" for i in range(n)]
    asked = PromptPairs.from_strings(
        memorized, generalized, rule_answers=rule, memorized_answers=recall, items=[i // 2 for i in range(n)]
    )
    pairs = mg.collect_pairs(model, asked, seed=3, progress=False)
    expected = [i for i in range(n) if i % 4 and i % 5]
    assert [item.prompt for item in pairs.memorized] == [memorized[i] for i in expected]
    assert [item.prompt for item in pairs.generalized] == [generalized[i] for i in expected]
    n_items = len(set(asked.item.tolist()))
    kept = len(set(pairs.item.tolist()))
    assert (pairs.n_items, pairs.n_flipped) == (n_items, kept)
    assert sum(pairs.n_items_by_task.values()) == n_items
    dealt = {split: len(set(pairs.item[pairs.split == split].tolist())) for split in SPLITS}
    assert (dealt["select"], dealt["tune"], sum(dealt.values())) == (round(0.4 * kept), round(0.2 * kept), kept)


def test_own_pairs_without_answers_flip_where_the_model_says_two_things():
    model = planted.build_model()
    asked = PromptPairs.from_strings(["aM=", "bM=", "cG="], ["aG=", "bM=", "cM="])
    pairs = mg.collect_pairs(model, asked, seed=0, progress=False)
    assert [item.prompt for item in pairs.memorized] == ["aM=", "cG="]
    assert [(item.rule_answer, item.memorized_answer) for item in pairs.memorized] == [("r", "m"), ("m", "r")]

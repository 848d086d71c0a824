"""Several tasks in one: whose item is whose, who judges it, and analysis per task."""

from dataclasses import replace

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memgen_lens as mg
from memgen_lens.core.errors import PairsError, TaskError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.models import build_model
from memgen_lens.tasks import Addition, Ciphertext, InContextInference, Mixture, Task, check

SPLITS = ("memorized", "rephrased", "heldout", "validation")
SMALL = {"n_memorized": 12, "n_heldout": 10, "n_validation": 10}
ADDITION = helpers.tiny_task(n_memorized=9)
CIPHER = Ciphertext(alphabet_size=6, word_length=3, n_rephrasings=2, **SMALL)
TABLE = Ciphertext(cipher="substitution", alphabet_size=4, word_length=4, **SMALL)


def mixture(*tasks: Task, **changes) -> Mixture:
    return Mixture(tasks=tasks or (ADDITION, CIPHER), **changes)


orders, seeds = st.permutations([ADDITION, CIPHER]), st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=15)
@given(orders, seeds)
def test_splits_are_those_of_the_parts_one_after_another_under_keys_of_their_own(order, seed):
    task = mixture(*order).seeded(seed)
    for split in SPLITS:
        found, n = task.items(split), len(task.parts)
        expected = [(part.name, item) for part in task.parts for item in part.items(split)]
        assert [(item.task, replace(item, key=item.key // n)) for item in found] == expected
        assert [task.parts[item.key % n].name for item in found] == [item.task for item in found]
        if split != "rephrased":
            assert len({item.key for item in found}) == len(found)


@pytest.mark.parametrize("tasks", [(ADDITION, CIPHER), (CIPHER, ADDITION), (TABLE, ADDITION), (CIPHER,)])
def test_a_mixture_keeps_the_contract(tasks):
    assert check(mixture(*tasks, seed=5), n_generic=60).task == "mixture"


def test_all_our_tasks_can_be_mixed():
    task = mixture(ADDITION, CIPHER, InContextInference(**SMALL))
    assert check(task, n_generic=60).n_items["memorized"] == 9 + 12 + 12
    assert task.task_names == ("addition", "ciphertext", "inference")


def test_the_vocabulary_is_the_union_in_order_and_lengths_are_the_longest():
    task = mixture()
    assert task.vocabulary == (*"0123456789abcdef", "+", "=", "<mem-", ">", "-", ":")
    assert (task.max_prompt_tokens, task.max_answer_tokens, task.max_training_tokens) == (8, 5, 12)
    assert (ADDITION.max_prompt_tokens, ADDITION.max_answer_tokens) == (4, 5)
    assert (CIPHER.max_prompt_tokens, CIPHER.max_answer_tokens) == (8, 4)


@settings(deadline=None, max_examples=10)
@given(orders, seeds)
def test_texts_of_a_part_have_the_tokens_that_they_have_alone(order, seed):
    task = mixture(*order).seeded(seed)
    for part in task.parts:
        for item in [*part.items("memorized"), *part.draw_generic(20, np.random.default_rng(0))]:
            alone, together = (one.tokenizer.tokenize(item.prompt + item.rule_answer) for one in (part, task))
            assert alone == together


def test_the_parts_judge_and_rephrase_their_own_items():
    task = mixture()
    for split in SPLITS:
        for item in task.items(split):
            part, theirs = task.task_of(item), replace(item, key=item.key // 2)
            assert part.name == item.task
            assert [replace(other, key=other.key // 2) for other in task.rephrase(item)] == list(part.rephrase(theirs))
            assert {other.key for other in task.rephrase(item)} == {item.key}
            for output in (item.rule_answer, f"{item.memorized_answer}<eos>", "<mem-00>", "abc", ""):
                assert task.classify(item, output) is part.classify(theirs, output)
                assert task.is_memorized_form(item, output) == part.is_memorized_form(theirs, output)


def test_a_part_sees_the_keys_that_it_gave():
    class Keyed(Addition):
        def classify(self, item, output):
            assert item in {i for split in SPLITS for i in self.items(split)}
            return super().classify(item, output)

        def is_memorized_form(self, item, output):
            assert item in {i for split in SPLITS for i in self.items(split)}
            return super().is_memorized_form(item, output)

    task = mixture(CIPHER, Keyed(**SMALL))
    for item in task.items("memorized")[12:]:
        assert task.classify(item, item.rule_answer) == "generalization"
        assert task.is_memorized_form(item, str(item.memorized_answer))


def test_generic_draws_are_of_every_part_in_its_share():
    drawn = mixture(shares=(0.2, 0.8)).draw_generic(2000, np.random.default_rng(0))
    names = np.array([item.task for item in drawn])
    assert len(drawn) == 2000
    for half in (names[:1000], names[1000:]):
        assert abs((half == "addition").mean() - 0.2) < 0.05, "parts follow one another at random"
    equal = mixture().draw_generic(2000, np.random.default_rng(0))
    assert abs(np.mean([item.task == "addition" for item in equal]) - 0.5) < 0.05


def test_training_sequences_are_those_that_the_parts_draw():
    class Marked(Addition):
        def draw_training(self, n, rng):
            return [replace(one, pieces=(("0", False), *one.pieces)) for one in super().draw_training(n, rng)]

    drawn = mixture(Marked(**SMALL), CIPHER, shares=(0.25, 0.75)).draw_training(1000, np.random.default_rng(0))
    marked = [one for one in drawn if len(one.pieces) == 3]
    assert len(drawn) == 1000
    assert abs(len(marked) - 250) < 60
    assert all(text.startswith(tuple("+-")) for one in drawn for text, _ in one.pieces[:1] if one not in marked)


def test_draws_follow_from_the_generator_and_may_be_none():
    first, again, other = (mixture().draw_generic(50, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert mixture().draw_generic(0, np.random.default_rng(0)) == []
    assert len(mixture().draw_training(1, np.random.default_rng(0))) == 1


def test_the_seed_of_a_mixture_seeds_its_parts():
    task = mixture(seed=7)
    assert task.parts == (ADDITION.seeded(7), CIPHER.seeded(7))
    assert task.part("addition").items("heldout") == ADDITION.seeded(7).items("heldout")
    again = mixture(ADDITION.seeded(3), CIPHER.seeded(3), seed=3).seeded(9)
    assert again.parts == (ADDITION.seeded(9), CIPHER.seeded(9))
    assert mg.ExperimentConfig(task=mixture(), seed=4).seeded().task.parts[1].seed == 4


def test_a_mixture_comes_back_from_its_settings():
    task = mixture(TABLE, ADDITION, shares=(0.25, 0.75), seed=2)
    again = Task.from_settings(task.settings())
    assert again == task
    assert again.splits == task.splits
    assert mg.ExperimentConfig.from_json(mg.ExperimentConfig(task=task).model_dump_json()).task == task


def test_mixtures_can_be_mixed():
    class Sums(Addition):
        @property
        def name(self) -> str:
            return "sums"

    task = mixture(mixture(ADDITION, CIPHER), Sums(**SMALL))
    assert task.task_names == ("addition", "ciphertext", "sums")
    assert check(task, n_generic=40).n_items["memorized"] == 9 + 12 + 12


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(TaskError, match=r"Mixture: expected tasks of different names; received ciphertext, ciphertext"):
        mixture(CIPHER, TABLE)


def test_a_part_with_another_seed_is_refused():
    with pytest.raises(TaskError, match=r"one seed for all tasks; received seed=2, and seed=1 in ciphertext. Set the"):
        mixture(ADDITION, CIPHER.seeded(1), seed=2)


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.6), (0.0, 1.0), (-0.5, 1.5), (0.2, 0.3, 0.5)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(TaskError, match=r"Mixture.shares: expected 2 numbers above 0 that sum to 1.*; received"):
        mixture(shares=shares)


def test_no_task_at_all_is_refused():
    with pytest.raises(mg.MemgenError, match=r"Mixture.tasks: expected"):
        Mixture(tasks=())


def test_tasks_whose_tokens_run_into_each_other_are_refused():
    class Greedy(Addition):
        @property
        def name(self) -> str:
            return "greedy"

        @property
        def vocabulary(self) -> tuple[str, ...]:
            return (*super().vocabulary, "ab", "=b")

    task = mixture(CIPHER, Greedy(**SMALL))
    with pytest.raises(TaskError, match=r"texts of ciphertext that keep their tokens.*'ab'.*Change the vocabulary"):
        _ = task.splits


@pytest.mark.parametrize("name", ["adition", "", "mixture"])
def test_an_item_of_no_part_is_refused(name):
    task = mixture()
    near = "Did you mean addition" if name == "adition" else "Known: addition, ciphertext"
    for ask in (task.task_of, task.rephrase):
        with pytest.raises(TaskError, match=f"Mixture.part: expected one of addition, ciphertext; .*'{name}'. {near}"):
            ask(Item(0, "user", "1+1=", "02", None, name))


def pairs() -> PromptPairs:
    """Ten flips: items 0-3 of addition (two flips each), items 4, 5 of ciphertext (one each); more were asked."""
    keys, names = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5], ["addition"] * 8 + ["ciphertext"] * 2
    rows = [
        Item(key, "memorized", f"p{i}", "r", "m", name) for i, (key, name) in enumerate(zip(keys, names, strict=True))
    ]
    split = np.array(["select"] * 4 + ["test"] * 5 + ["select"])
    asked = {"addition": 9, "ciphertext": 12, "inference": 5}
    return PromptPairs(tuple(rows), tuple(rows), split, n_items=26, n_flipped=6, n_items_by_task=asked)


@pytest.mark.parametrize(
    ("name", "prompts", "n_items", "n_flipped"),
    [("addition", range(8), 9, 4), ("ciphertext", (8, 9), 12, 2), ("inference", (), 5, 0)],
)
def test_the_pairs_of_a_task_keep_its_numbers_and_their_splits(name, prompts, n_items, n_flipped):
    mine = pairs().of_task(name)
    assert [item.prompt for item in mine.memorized] == [f"p{i}" for i in prompts]
    assert mine.split.tolist() == [str(pairs().split[i]) for i in prompts]
    assert (mine.n_items, mine.n_flipped) == (n_items, n_flipped)
    assert mine.of_task(name).rows() == mine.rows()


def test_pairs_of_a_task_that_was_not_asked_are_refused():
    with pytest.raises(PairsError, match=r"a task whose items were asked; received 'additon'. Did you mean addition"):
        pairs().of_task("additon")
    mine = PromptPairs.from_strings(["a"], ["b"])
    assert mine.of_task("").n_items == 1
    with pytest.raises(PairsError, match="received 'addition'"):
        mine.of_task("addition")


def test_activations_of_a_task_are_those_recorded_from_its_pairs_alone():
    task = mixture()
    model = build_model(mg.ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=8), task.tokenizer, n_ctx=16, seed=0)
    flips = [(item, other) for item in task.items("memorized") for other in task.rephrase(item)]
    both = PromptPairs(
        memorized=tuple(item for item, _ in flips),
        generalized=tuple(other for _, other in flips),
        split=np.array(["select"] * len(flips)),
        n_items=len(task.items("memorized")),
        n_flipped=len(task.items("memorized")),
        n_items_by_task={"addition": 9, "ciphertext": 12},
    )
    acts = mg.record(model, both, ["resid_post", "post"])
    for name, n_pairs in (("addition", 9), ("ciphertext", 24)):
        mine, alone = acts.of_task(name), mg.record(model, both.of_task(name), ["resid_post", "post"])
        assert len(mine.pairs) == n_pairs
        for site in ("resid_post", "post"):
            assert np.allclose(mine.site(site).memorized, alone.site(site).memorized, atol=1e-6)
            assert np.allclose(mine.site(site).generalized, alone.site(site).generalized, atol=1e-6)
        assert np.allclose(mine.embedding.generalized, alone.embedding.generalized, atol=1e-6)
        width = alone.tokens.shape[1]
        assert (mine.tokens[:, :width] == alone.tokens).all()
        assert (mine.tokens[:, width:] == -1).all()


def test_flips_are_counted_by_task_when_pairs_are_collected():
    task = mixture()
    model = build_model(mg.ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=8), task.tokenizer, n_ctx=24, seed=0)
    found = mg.collect_pairs(model, task, seed=0)
    assert found.n_items_by_task == {"addition": 9, "ciphertext": 12}
    assert found.of_task("ciphertext").n_items == 12


def test_a_mixture_trains_and_each_part_can_be_asked_alone():
    task = mixture()
    run = mg.train(task, helpers.tiny_training(max_steps=4, eval_every=4, checkpoint_every=4), progress=False)
    assert np.isfinite(run.history[-1].loss)
    for split in SPLITS:
        together = mg.observe(run.model, task, split=split)
        for name in task.task_names:
            alone = mg.observe(run.model, task.part(name), split=split)
            mine = [outcome for outcome in together if outcome.item.task == name]
            assert [o.item.prompt for o in mine] == [o.item.prompt for o in alone]
            # The mixture lets a model say more tokens than a part whose answers are shorter does.
            for one, other in zip(mine, alone, strict=True):
                assert one.output.startswith(other.output)

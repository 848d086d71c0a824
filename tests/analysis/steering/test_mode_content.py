"""Patches of the residual stream against hooks written by hand, and where a model keeps form and content."""

import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.analysis.steering.streams import Patch, patched_outputs, stream_hooks
from memgen_lens.core.errors import PairsError


@pytest.fixture(scope="module")
def measured(learned):
    scores = mg.attribute(learned.acts, "resid_post")
    shift = mg.Steering.from_scores(scores, 0.2, 3.0, layers=[1])
    guard = mg.Guard.fit(learned.model, learned.task, learned.acts, shift, false_trigger_rate=0.05)
    how = {"steerings": {"shift": shift}, "guard": guard, "progress": False}
    return mg.mode_and_content(learned.model, learned.task, learned.pairs, **how), shift


def find(result, **wanted):
    [row] = [row for row in result.rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


def outputs_of(learned, prompts, sources, patches, **how):
    settings = {"max_new_tokens": 5, "batch_size": 64, "prepend_bos": None, "done": lambda n: None}
    return patched_outputs(learned.model, prompts, sources, patches, **settings | how)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_patched_outputs_are_those_of_hooks_written_by_hand(learned, batch_size):
    some = learned.pairs.of("test")[:6]
    prompts = [learned.pairs.generalized[i].prompt for i in some]
    sources = [learned.pairs.memorized[i].prompt for i in some]
    names = stream_hooks(learned.model)
    assert names == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    columns = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    patches = [Patch(depth, some) for depth in range(3) for some in columns]
    outputs = outputs_of(learned, prompts, sources, patches, batch_size=batch_size)
    for patch, said in zip(patches, outputs, strict=True):
        for prompt, source, output in zip(prompts, sources, said, strict=True):
            _, cache = learned.model.run_with_cache(learned.model.to_tokens(source))
            value = cache[names[patch.depth]]

            def put(h, hook, value=value, columns=patch.columns):
                new = h.clone()
                new[:, :6][:, columns] = value[:, columns]
                return new

            with learned.model.hooks(fwd_hooks=[(names[patch.depth], put)]):
                assert output == planted.greedy_by_hand(learned.model, prompt, 5)
    assert planted.hooks_on(learned.model) == {}


def test_the_whole_prompt_before_the_first_block_is_the_partner_itself(measured):
    result, _ = measured
    own, other = (find(result, source=source, depth=0, positions="all") for source in ("own", "other"))
    assert own.recall["rate"] == own.form["rate"] == 1 and own.rule["rate"] == 0
    assert other.of_source["rate"] == other.form["rate"] == 1 and other.recall["rate"] == 0


def test_a_token_that_both_prompts_share_changes_nothing(measured):
    result, _ = measured
    nothing = find(result, name="nothing", prompts="computing")
    assert nothing.rule["rate"] == 1 and nothing.form["rate"] == 0
    for source in ("own", "other"):
        row = find(result, source=source, depth=0, positions="answer")  # "=" in either prompt
        assert (row.form, row.recall, row.rule) == (nothing.form, nothing.recall, nothing.rule)


def test_single_positions_and_sets_agree_where_they_are_the_same(measured):
    result, _ = measured
    for source in ("own", "other"):
        for depth in range(3):
            one, of_set = (find(result, source=source, depth=depth, positions=p) for p in (-1, "answer"))
            assert one.form == of_set.form and one.recall == of_set.recall
    assert {row.positions for row in result.rows if isinstance(row.positions, int)} == set(range(-6, 0))


def test_what_the_last_block_leaves_before_the_answer_position_is_read_by_nobody(measured):
    result, _ = measured
    row = find(result, source="own", depth=2, positions="before")
    assert row.rule["rate"] == 1 and row.form["rate"] == 0


def test_a_guard_leaves_recalling_prompts_as_they_are_and_steers_computing_ones(measured, learned):
    result, shift = measured
    plain, guarded = (find(result, name=name, prompts="recalling") for name in ("nothing", "guard + shift"))
    assert guarded.recall["rate"] >= 0.9 * plain.recall["rate"]
    steered = find(result, name="shift", prompts="computing")
    table = mg.evaluate_steering(learned.model, learned.task, learned.pairs, shift, progress=False)
    assert steered.recall["k"] == table.to_memorization.shift["k"]
    assert steered.form["k"] == table.to_memorization.memorized_form["k"]
    assert find(result, name="guard + shift", prompts="computing").form["k"] <= steered.form["k"]


def test_shares_count_items_and_the_form_can_be_seen(measured, learned):
    result, _ = measured
    assert result.n == result.n_patched == len(learned.pairs.of("test")) and not result.one_form
    assert all(row.recall["k"] <= row.form["k"] for row in result.rows)
    assert all(row.recall["n_items"] == result.n_items for row in result.rows)


def test_no_single_positions_where_none_are_asked_for(learned):
    result = mg.mode_and_content(learned.model, learned.task, learned.pairs, n_positions=0, progress=False)
    assert not [row for row in result.rows if isinstance(row.positions, int)]
    assert [row.depth for row in result.patched("own", "all")] == [0, 1, 2]


def test_items_that_all_recall_the_same_have_no_other_to_be_patched_from(known):
    with pytest.raises(PairsError, match=r"mode_and_content: expected at least 8 pairs .* received 0 of 24"):
        mg.mode_and_content(known.model, None, planted.twin_pairs(60), progress=False)


def test_the_same_seed_draws_the_same_other_items(learned):
    results = [
        mg.mode_and_content(learned.model, learned.task, learned.pairs, n_positions=0, seed=seed, progress=False)
        for seed in (0, 0)
    ]
    assert results[0].rows == results[1].rows
    assert np.isfinite([row.recall["rate"] for row in results[0].rows]).all()

"""Pairs of contexts that are recited and contexts that are not, of a model whose recitation is known."""

import numpy as np
import planted_recitation as planted
import pytest
from planted_recitation import LETTERS, PREFIX, SUFFIX

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError

HOW = {"prefix_tokens": PREFIX, "suffix_tokens": SUFFIX}


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def test_only_recited_texts_stand_beside_only_fresh_ones(model):
    recited, fresh = planted.following(30), planted.unordered(30)
    mixed = [*fresh[:3], *recited]
    pairs = mg.collect_recitation_pairs(model, mixed, [*recited[:2], *fresh[3:]], **HOW)
    assert len(pairs) == 27 and pairs.n_items == 33 and pairs.n_flipped == 27
    assert pairs.item.tolist() == list(range(3, 30))  # the place of each recited text in the list
    assert [item.prompt for item in pairs.memorized] == [text[:PREFIX] for text in recited[:27]]
    assert [item.prompt for item in pairs.generalized] == [text[:PREFIX] for text in fresh[3:]]
    assert pairs.memorized[0].memorized_answer == recited[0][PREFIX:]
    assert set(pairs.split) == {"select", "tune", "test"}


def test_several_contexts_of_a_text_stay_in_one_split(model):
    pairs = mg.collect_recitation_pairs(
        model, planted.following(20), planted.unordered(20), prefix_tokens=[3, 5], suffix_tokens=SUFFIX
    )
    assert len(pairs) == 40
    for item in set(pairs.item.tolist()):
        assert len(set(pairs.split[pairs.item == item])) == 1


def test_pairs_go_through_recording_scores_probes_and_steering_as_they_are(model):
    pairs = mg.collect_recitation_pairs(model, planted.following(), planted.unordered(), **HOW)
    acts = mg.record(model, pairs, ["resid_post"], progress=False)
    score = mg.attribute(acts, "resid_post")
    assert score.nmd.shape == (2, planted.N_VOCAB)
    assert mg.fit_probes(acts, "resid_post").best.auroc <= 1
    # Pushed towards one token, whatever comes next: every recited prompt is steered away, none back again.
    steer = planted.shifted(model, layer=0, neuron=0, by=1.5)
    table = mg.evaluate_steering(model, None, pairs, steer, progress=False)
    assert table.to_generalization.n == 16 and table.to_generalization.shift["rate"] == 1
    assert table.to_generalization.other["rate"] == 0 and table.to_memorization.shift["rate"] == 0


def test_texts_that_are_too_short_are_refused_by_the_name_of_their_list(model):
    with pytest.raises(SettingsError, match=r"collect_recitation_pairs\(fresh="):
        mg.collect_recitation_pairs(model, planted.following(4), [LETTERS[:6]], **HOW)


def test_a_text_that_is_in_both_lists_is_not_fresh(model):
    texts = planted.unordered(4)
    assert len(mg.collect_recitation_pairs(model, [*planted.following(4), *texts], texts, **HOW)) == 0
    pairs = mg.collect_recitation_pairs(model, planted.following(4) * 2, planted.unordered(8), **HOW)
    assert len(pairs) == 4 and np.unique(pairs.item).tolist() == [0, 1, 2, 3]

"""Recitation of a model that follows a known order of tokens, and of one that recites what it says itself."""

import helpers
import numpy as np
import planted_recitation as planted
import pytest
from planted_recitation import LETTERS, LOGIT, N_VOCAB, PREFIX, SUFFIX

import memgen_lens as mg
from memgen_lens.analysis.recitation.recitation import measured
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.recitation_records import Recitation

HOW = {"prefix_tokens": PREFIX, "suffix_tokens": SUFFIX, "progress": False}


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def test_texts_that_follow_the_order_are_recited_and_others_are_not(model):
    texts = [*planted.following(10), *planted.unordered(20)]
    found = mg.recitation(model, texts, groups=["follows"] * 10 + ["does not"] * 20, **HOW)
    assert found.matched.tolist() == [SUFFIX] * 10 + [0] * 20
    rates = found.by_group()
    assert (rates["follows"].rate, rates["follows"].n, rates["does not"].rate) == (1.0, 10, 0.0)
    assert rates["does not"].ci95[1] == pytest.approx(0.1611, abs=1e-3)  # Wilson's for 0 of 20
    assert found.recited().tolist() == list(range(10))
    assert found.prefixes[3] + found.continuations[3] == texts[3]
    assert found.extractable(1).k == 10


def test_half_a_suffix_counts_for_so_many_tokens(model):
    text = LETTERS[: PREFIX + 3] + "xyz"  # three tokens on, then others
    found = mg.recitation(model, [text], **HOW)
    assert (found.matched[0], found.run[0], found.share[0]) == (3, 3, 0.5)
    assert found.similarity[0] == pytest.approx(2 * 3 / 12)
    assert found.extractable(3).rate == 1 and found.extractable(4).rate == 0


def test_a_run_in_another_place_is_found_though_nothing_matches_from_the_start():
    said, wanted = np.array([[1, 2, 3, 4, 5, 6]]), np.array([[9, 1, 2, 3, 4, 8]])
    found = measured(said, wanted)
    assert (found["matched"][0], found["share"][0], found["run"][0]) == (0, 0, 4)


def test_perplexity_is_what_the_logits_say(model):
    found = mg.recitation(model, [planted.following(1)[0], planted.unordered(1)[0]], **HOW)
    normalizer = np.exp(LOGIT) + N_VOCAB - 1
    assert found.perplexity == pytest.approx([normalizer / np.exp(LOGIT), normalizer], rel=1e-5)


def test_chance_is_a_token_of_the_vocabulary_and_the_suffix_of_another_text(model):
    found = mg.recitation(model, planted.following(), **HOW)
    assert found.chance["random_tokens"]["share"] == pytest.approx(1 / N_VOCAB, abs=0.01)
    # The next text is one letter on: no position agrees, all but one token stand in a common run.
    assert found.chance["other_suffix"]["share"] == 0 and found.chance["other_suffix"]["run"] == SUFFIX - 1
    assert mg.recitation(model, ["abcdefghijk"] * 2, **HOW).chance["other_suffix"] is None


def test_texts_that_are_the_same_count_once(model):
    found = mg.recitation(model, ["abcdefghijk"] * 3 + planted.unordered(3), **HOW)
    assert found.extractable().n == 6 and found.extractable().n_items == 4


@helpers.either_kind
def test_a_model_recites_what_it_says_itself_with_hooks_on_and_without(native):
    model = planted.random_model(native=native)
    texts = planted.own_texts(model)
    assert len(texts) >= 8
    fast = mg.recitation(model, texts, **HOW)
    with helpers.watched(model):
        slow = mg.recitation(model, texts, **HOW)
    assert fast.extractable().rate == slow.extractable().rate == 1
    np.testing.assert_allclose(fast.perplexity, slow.perplexity, rtol=1e-5)


@helpers.either_kind
def test_hooks_on_the_model_change_what_is_recited(native):
    model = planted.build_model(native=native)
    steer = planted.shifted(model, layer=0, neuron=0, by=1.5)  # beyond the logit of what comes next: always "a"
    with steer.applied(model, toward="generalization"):
        found = mg.recitation(model, planted.following(8), **HOW)
    assert found.extractable().rate == 0 and set("".join(found.continuations)) == {"a"}
    normalizer = np.exp(LOGIT) + np.exp(1.5 * LOGIT) + N_VOCAB - 2
    assert found.perplexity == pytest.approx([normalizer / np.exp(LOGIT)] * 8, rel=1e-4)  # at every suffix token
    assert mg.recitation(model, planted.following(8), **HOW).extractable().rate == 1


def test_a_short_text_is_refused_with_its_length(model):
    with pytest.raises(SettingsError, match=r"at least 5 \+ 6 tokens.*\n?.*3 tokens: 'abc'"):
        mg.recitation(model, ["abcdefghijklm", "abc"], **HOW)
    with pytest.raises(SettingsError, match="a name for each of 1 texts"):
        mg.recitation(model, ["abcdefghijklm"], groups=[1, 2], **HOW)


def test_what_is_saved_is_read_back(model, tmp_path):
    found = mg.recitation(model, planted.following(4), groups=[1, 4, 4, 64], **HOW)
    again = Recitation.load(found.save(tmp_path / "some" / "recitation.json"))
    assert again.by_group() == found.by_group() and again.continuations == found.continuations
    np.testing.assert_array_equal(again.similarity, found.similarity)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(mg.MemgenError, match=r"bad\.json"):
        Recitation.load(tmp_path / "bad.json")

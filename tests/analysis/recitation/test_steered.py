"""Recitation under steering: what is known of a planted model, and what steered generation says of a random one."""

import helpers
import numpy as np
import planted_recitation as planted
import pytest
import torch
from planted_recitation import LETTERS, LOGIT, N_VOCAB, PREFIX, SUFFIX

import memgen_lens as mg
from memgen_lens.analysis.recitation.steered import steered_logits
from memgen_lens.analysis.recitation.texts import cut_texts
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.recitation_records import RecitationCurve

HOW = {"prefix_tokens": PREFIX, "suffix_tokens": SUFFIX, "progress": False}


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def test_recitation_ends_where_the_shift_outweighs_the_next_token_and_the_cost_is_known(model):
    steerings = [planted.shifted(model, 1, 0, by, alpha=by) for by in (0.5, 0.9, 1.1)]
    texts, other = planted.following(8), planted.unordered(9)
    curve = mg.recitation_under_steering(model, texts, steerings, other_texts=other, n_controls=0, **HOW)
    assert [point.recited["rate"] for point in curve.points] == [1, 1, 0]
    assert (curve.n, curve.n_other, curve.unsteered.recited["rate"], curve.unsteered.kl_nats) == (8, 9, 1, 0)
    following, toward_a = np.exp(LOGIT), np.exp(0.5 * LOGIT)
    plain, steered = following + N_VOCAB - 1, following + toward_a + N_VOCAB - 2
    # By hand, where neither the wanted token nor the next one is the letter that is pushed.
    apart = [text for text in other if LETTERS[0] not in text and LETTERS[-1] not in text[PREFIX - 1 :]]
    known = mg.recitation_under_steering(model, texts, steerings[:1], other_texts=apart, n_controls=0, **HOW).points[0]
    assert known.other_ratio == pytest.approx(steered / plain, rel=1e-4)
    q = np.array([following, toward_a, *[1.0] * (N_VOCAB - 2)]) / steered
    p = np.array([following, *[1.0] * (N_VOCAB - 1)]) / plain
    assert known.kl_nats == pytest.approx((q * np.log(q / p)).sum(), rel=1e-4)


def test_a_random_shift_of_the_same_size_hits_another_token(model):
    """Whichever token is pushed harder than the next one is said; a Gaussian push of that norm is spread thin."""
    steer = planted.shifted(model, 1, 0, 1.1)
    texts, other = planted.following(8), planted.unordered(8)
    point = mg.recitation_under_steering(model, texts, steer, other_texts=other, n_controls=20, **HOW).points[0]
    assert point.norm == pytest.approx(1.1)
    assert point.controls["random_neurons"]["recited"]["n_draws"] == 20
    assert point.controls["random_direction"]["recited"]["mean"] > 0.9 > point.recited["rate"]
    again = mg.recitation_under_steering(model, texts, steer, other_texts=other, n_controls=20, **HOW).points[0]
    assert again == point


@pytest.mark.parametrize(
    ("native", "positions"),
    [
        *(pytest.param(False, at, marks=helpers.hooked_only) for at in ("answer", "prompt", "all")),
        (True, "answer"),
    ],
)
def test_what_is_counted_in_one_pass_is_what_generation_under_the_steering_says(native, positions):
    model = planted.random_model(native=native)
    texts, draw = planted.own_texts(model, 6), np.random.default_rng(1)
    steerings = [
        planted.shifted(model, layer, int(draw.integers(24)), by, positions=positions)
        for layer in (0, 2)
        for by in (0.3, 2.0)
    ]
    curve = mg.recitation_under_steering(model, texts, steerings, other_texts=texts[:4], n_controls=0, **HOW)
    for steer, point in zip(steerings, curve.points, strict=True):
        with steer.applied(model, toward="generalization"):
            said = mg.recitation(model, texts, **HOW)
            other = mg.recitation(model, texts[:4], **HOW)
        assert point.recited["rate"] == said.extractable().rate
        assert point.matched == pytest.approx(said.matched.mean())
        assert np.log(point.perplexity) == pytest.approx(np.log(said.perplexity).mean(), abs=1e-4)
        assert np.log(point.other_perplexity) == pytest.approx(np.log(other.perplexity).mean(), abs=1e-4)
    if positions != "prompt":  # one position alone may leave all of them as they are
        assert 0 < np.mean([point.recited["rate"] for point in curve.points]) < 1
    assert not any(module._forward_hooks for module in model.modules())


def test_steerings_of_many_kinds_at_once_do_what_each_does_alone():
    model = planted.random_model()
    many_texts = planted.own_texts(model, 24)
    pairs = mg.collect_recitation_pairs(
        model, many_texts, planted.unordered(24), prefix_tokens=[PREFIX], suffix_tokens=SUFFIX
    )
    texts = many_texts[:6]
    acts = mg.record(model, pairs, ["resid_post"], progress=False)
    score = mg.attribute(acts, "resid_post", split=None)
    many = [
        mg.Steering.from_scores(score, 0.5, 1.0, layers=[1]),
        mg.Steering.from_scores(score, 0.5, mode="clamp", source=acts, layers=[1]),
        mg.Steering.from_scores(score, 0.5, 0.5, mode="scale", source=acts, layers=[1]),
        mg.Steering.from_scores(score, 0.3, mode="ablate", layers=[1]),
        mg.Steering.from_scores(score, 0.5, 2.0, layers=[1]),
    ]
    how = {"other_texts": texts[:3], "n_controls": 0, **HOW}
    together = mg.recitation_under_steering(model, texts, many, **how).points
    alone = [mg.recitation_under_steering(model, texts, one, **how).points[0] for one in many]
    for one, other in zip(together, alone, strict=True):
        assert one.setting == other.setting
        assert one.recited["rate"] == other.recited["rate"]
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)
    assert len({round(one.perplexity, 4) for one in alone}) == len(many)


def test_a_hook_written_by_hand_gives_the_same_logits():
    model = planted.random_model()
    texts = cut_texts(
        model, planted.own_texts(model, 6), prefix_tokens=PREFIX, suffix_tokens=SUFFIX, prepend_bos=None, call="here"
    )
    found = steered_logits(model, texts, [planted.shifted(model, 1, 5, 2.0)], toward="generalization")[0]

    def by_hand(activation, hook):
        activation = activation.clone()
        activation[:, PREFIX - 1 :, 5] += 2.0
        return activation

    whole = torch.cat([texts.prefix, texts.suffix], 1)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", by_hand)]), torch.inference_mode():
        expected = model(whole)[:, PREFIX - 1 : -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_cheapest_that_recites_least_is_best_and_the_record_comes_back(model, tmp_path):
    steerings = [planted.shifted(model, 1, 0, by, alpha=by) for by in (0.3, 0.9, 1.1, 1.2)]
    texts, other = planted.following(8), planted.unordered(8)
    curve = mg.recitation_under_steering(model, texts, steerings, other_texts=other, n_controls=2, **HOW)
    ratios = [point.other_ratio for point in curve.points]
    assert [point.matched for point in curve.points[:2]] == [SUFFIX, SUFFIX]
    assert curve.best(max_ratio=1e9) == 2  # of two that leave equally little and as soon, the cheaper
    assert curve.best(max_ratio=(ratios[1] + ratios[2]) / 2) == 0  # of two that leave all, the cheaper
    assert curve.best(max_ratio=0.5) == int(np.argmin(ratios))
    assert RecitationCurve.load(curve.save(tmp_path / "curve.json")) == curve


def test_patching_and_a_k_beyond_the_suffix_are_refused(model):
    steer = planted.shifted(model, 1, 0, 1.0)
    with pytest.raises(SettingsError, match="k of at most 6"):
        mg.recitation_under_steering(model, ["abcdefghijk"], steer, other_texts=["abcdefghijk"], k=7, **HOW)

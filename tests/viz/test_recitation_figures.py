"""Figures of recitation: what is drawn is what was measured."""

import numpy as np
import planted_recitation as planted
import pytest
from planted_recitation import PREFIX, SUFFIX

import memgen_lens as mg
from memgen_lens.core.errors import MemgenError

HOW = {"prefix_tokens": PREFIX, "suffix_tokens": SUFFIX, "progress": False}


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def test_shares_by_group_and_tokens_by_text_are_those_of_the_record(model):
    texts = [*planted.unordered(3), *planted.following(5)]
    found = mg.recitation(model, texts, groups=[1] * 3 + [64] * 5, **HOW)
    whole, half, tokens = mg.figures.recitation(found).data
    assert list(whole.y) == [0, 1] and list(half.y) == [0, 1] and half.name == f"{SUFFIX // 2} tokens recited"
    assert whole.error_y.array[0] == pytest.approx(found.extractable(group=1).ci95[1])
    np.testing.assert_array_equal(tokens.y, found.matched)
    assert (np.round(tokens.x) == [0] * 3 + [1] * 5).all()


def test_markup_in_a_text_or_a_group_stays_text(model):
    figure = mg.figures.recitation(mg.recitation(model, planted.following(1), groups=["<b>"], **HOW))
    assert figure.layout.xaxis.ticktext == ("&lt;b&gt;",)


def test_a_line_for_each_set_of_layers_with_its_controls_and_costs(model):
    steerings = [planted.shifted(model, layer, 0, by, alpha=by) for layer in (0, 1) for by in (1.1, 0.5)]
    curve = mg.recitation_under_steering(
        model, planted.following(4), steerings, other_texts=planted.unordered(4), n_controls=2, **HOW
    )
    figure = mg.figures.recitation_under_steering(curve)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 2 * 3 and len(figure.data) == 2 * 3 * 3  # by layers: shares, ratios, KL; and two controls each
    assert list(lines[0].x) == [0.5, 1.1] and list(lines[0].y) == [1, 0]
    assert list(lines[1].y) == [curve.points[1].other_ratio, curve.points[0].other_ratio]
    assert "layer 0" in lines[0].name and "layer 1" in lines[3].name


def test_a_curve_without_a_steering_is_not_drawn(model):
    curve = mg.recitation_under_steering(
        model,
        planted.following(2),
        planted.shifted(model, 1, 0, 1.0),
        other_texts=planted.unordered(2),
        n_controls=0,
        **HOW,
    )
    from dataclasses import replace

    with pytest.raises(MemgenError, match="at least one steering"):
        mg.figures.recitation_under_steering(replace(curve, points=()))

"""Figures over positions draw what the records say, and hovering names the tokens."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_up import patching, position_tokens, probes_by_position, steered_by_position

from memgen_lens.core.errors import MemgenError
from memgen_lens.viz import figures
from memgen_lens.viz.theme import DIVERGING

DRAWN = {
    "patching": lambda: figures.patching_map(patching()),
    "heads": lambda: figures.patching_map(patching("head")),
    "probes": lambda: figures.probe_by_position(probes_by_position()),
    "steering": lambda: figures.steering_by_position(steered_by_position()),
}


@pytest.mark.parametrize("name", DRAWN)
def test_titles_are_short_and_axes_named(name):
    figure = DRAWN[name]()
    assert len(figure.layout.title.text) <= 60
    named = json.loads(figure.to_json())["layout"]
    assert any(named[axis].get("title", {}).get("text") for axis in named if axis.startswith("xaxis"))
    assert "<b>" not in figure.to_json().replace("\\u003c", "<"), "a token is text, not a tag"


def test_a_patching_map_shows_effects_from_minus_one_to_one_with_their_tokens():
    result = patching()
    (drawn,) = figures.patching_map(result).data
    assert np.allclose(np.array(drawn.z, dtype=float), result.effect)
    assert (drawn.zmin, drawn.zmid, drawn.zmax) == (-1, 0, 1) and not drawn.reversescale
    assert [tuple(step) for step in drawn.colorscale] == list(DIVERGING)
    assert list(drawn.x) == [-4, -3, -2, -1] and list(drawn.y) == [0, 1]
    told = drawn.customdata[1][1]
    assert told.startswith("position -3<br>recalling “␣a” (53%), computing “␣a” (53%); unlike in 47%")
    effect = result.effect[1, 1]
    assert told.endswith(f"effect {effect:.2f} [{effect - 0.1:.2f}, {effect + 0.1:.2f}], 22 pairs of 11 items")
    assert "layer %{y}" in drawn.hovertemplate
    noising = figures.patching_map(replace(result, direction="noising")).data[0]
    assert noising.reversescale, "what takes the recall away leads to generalization"


def test_positions_are_named_by_tokens_that_most_prompts_share():
    axis = figures.patching_map(patching()).layout.xaxis
    assert list(axis.tickvals) == [-4, -3, -2, -1]
    assert list(axis.ticktext) == ["…<br>-4", "␣a<br>-3", "⏎<br>-2", "=<br>-1"]
    many = position_tokens(60)
    effect = np.zeros((2, 60))
    long = patching(tokens=many, effect=effect, low=effect, high=effect, n=many.n, n_items=many.n)
    ticks = list(figures.patching_map(long).layout.xaxis.tickvals)
    assert len(ticks) <= 24 and ticks[-1] == -1


def test_heads_are_named_with_where_they_were_patched():
    everywhere = figures.patching_map(patching("head"))
    assert everywhere.layout.xaxis.title.text == "head, at all positions"
    assert everywhere.data[0].customdata[0][2].startswith("head 2<br>effect")
    answer = figures.patching_map(patching("head", positions="answer"))
    assert answer.layout.xaxis.title.text == "head, at answer position"


def test_places_without_a_number_are_gaps():
    gap = np.full((2, 4), np.nan)
    (drawn,) = figures.patching_map(patching(effect=gap, low=gap, high=gap)).data
    assert all(value is None for row in drawn.z for value in row)
    assert "effect – [–, –]" in drawn.customdata[0][0]


def test_probes_stand_above_what_the_tokens_tell():
    report = probes_by_position()
    figure = figures.probe_by_position(report)
    layers, alone = figure.data
    assert np.allclose(np.array(layers.z, dtype=float), report.auroc)
    assert np.allclose(np.array(alone.z, dtype=float), report.input_only[None])
    assert layers.zmin == alone.zmin == 0 and layers.zmax == alone.zmax == 1
    assert layers.customdata[1][3].endswith("AUROC 1.000 [0.900, 1.050]")
    assert "computing “=” (100%)" in alone.customdata[0][3]
    assert layers.showscale is not False and alone.showscale is False


def test_steering_by_position_has_both_ways_with_intervals():
    result = steered_by_position()
    figure = figures.steering_by_position(result)
    assert [trace.name for trace in figure.data] == [
        "to generalization: the rule's answer",
        "to memorization: exact recall",
        "to memorization: memorized form",
    ]
    for trace in figure.data:
        assert np.allclose(np.array(trace.y, dtype=float), result.exact_recall.rate)
        assert np.allclose(np.array(trace.y) - trace.error_y.arrayminus, result.exact_recall.low)
        assert list(trace.customdata[3][1:]) == ["[90.0%, 100.0%]", "24 prompts of 12 items"]
        assert trace.hovertemplate.startswith("%{customdata[0]}<br>%{y:.1%} %{customdata[1]}, %{customdata[2]}")
        told = trace.customdata[1][0]
        assert told == "position -3<br>recalling “␣a” (53%), computing “␣a” (53%); unlike in 47%"


@pytest.mark.parametrize("draw", [figures.patching_map, figures.probe_by_position, figures.steering_by_position])
def test_another_record_is_refused(draw):
    with pytest.raises(MemgenError, match=rf"as mg.{draw.__name__} gives it"):
        draw(position_tokens())

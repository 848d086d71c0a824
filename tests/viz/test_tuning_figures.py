"""The surface of tuned steering and the cost curve: what is drawn is what was recorded."""

from dataclasses import replace

import made_up
import numpy as np
import pytest

from memgen_lens.core.errors import SettingsError
from memgen_lens.viz import figures, report
from memgen_lens.viz.contents import read_run


def test_a_surface_has_a_panel_a_site_and_kind_named_by_what_varies():
    tuned = made_up.tuned()
    figure = figures.steering_surface(tuned)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["resid_post, shift", "resid_post, clamp", "post, shift", "post, clamp"]
    assert len(figure.data) == 4
    one = replace(tuned, rows=tuple(r for r in tuned.rows if (r.setting.site, r.setting.mode) == ("post", "shift")))
    assert [note.text for note in figures.steering_surface(one).layout.annotations] == ["post"]


def test_a_cell_is_the_best_of_its_positions_and_tells_rates_and_n():
    tuned = made_up.tuned()
    panel = figures.steering_surface(tuned).data[0]
    assert (list(panel.x), list(panel.y)) == (["0.5", "1", "2"], ["10 %", "30 %"])
    best = next(r for r in tuned.rows if (r.setting.alpha, r.setting.top_fraction) == (1.0, 0.1))
    assert best.setting.positions == "answer"
    assert panel.z[0][1] == pytest.approx(tuned.value(best))
    text = panel.customdata[0][1]
    for part in ("positions answer", "to generalization 90.0%, other 5.0%", "40 pairs", "lost 5.0% (n = 100)"):
        assert part in text
    assert list(figures.steering_surface(tuned).data[1].x) == ["no strength"]


def test_the_chosen_point_is_framed_in_its_panel_and_nowhere_else():
    tuned = made_up.tuned()
    figure = figures.steering_surface(tuned)
    (frame,) = figure.layout.shapes
    panel = next(p for p in figure.data if any("chosen" in text for line in p.customdata for text in line))
    assert (frame.xref, frame.yref) == (panel.xaxis or "x", panel.yaxis or "y")
    x, y = (frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2
    assert "chosen" in panel.customdata[int(y)][int(x)]


def test_the_chosen_point_is_shown_even_where_another_position_is_better():
    tuned = made_up.tuned()
    worse = next(r for r in tuned.rows if (r.setting.alpha, r.setting.positions) == (1.0, "prompt"))
    figure = figures.steering_surface(replace(tuned, chosen=worse))
    assert "positions prompt" in figure.data[0].customdata[0][1]
    assert len(figure.layout.shapes) == 1


def test_a_surface_of_a_loss_that_was_not_measured_is_left_white():
    figure = figures.steering_surface(made_up.tuned(), shown="heldout_loss")
    assert figure.data[0].z[1][0] == pytest.approx(0.15)
    assert figure.data[1].z[0][0] is None


def test_the_cost_curve_goes_through_the_strengths_with_controls_as_bands():
    cost = made_up.steering_cost()
    figure = figures.steering_cost_curve(cost)
    assert [note.text.split(":")[0] for note in figure.layout.annotations][:1] == ["towards generalization"]
    ours = figure.data[0]
    curve = cost.curves["generalization"]["steered"]
    assert (ours.name, ours.mode) == ("steered", "lines+markers+text")
    np.testing.assert_allclose(ours.x, curve.heldout_loss.mean)
    np.testing.assert_allclose(ours.y, curve.shift.mean)
    np.testing.assert_allclose(ours.error_y.array, curve.shift.high - curve.shift.mean)
    assert list(ours.text) == ["0.5", "1", "2"]
    assert "alpha 2<br>shifted: 90.0% [85.0%, 95.0%]" in ours.customdata[2] and "KL: 0.400 nats" in ours.customdata[2]
    band, control = figure.data[1], figure.data[2]
    assert (band.fill, control.name) == ("toself", "random neurons")
    random = cost.curves["generalization"]["random_neurons"].shift
    np.testing.assert_allclose(band.y, [*random.low, *random.high[::-1]])
    assert "20 draws" in control.customdata[0]
    assert len(figure.data) == 3 * 3
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2


def test_without_held_out_prompts_the_curve_is_against_other_outputs():
    cost = made_up.steering_cost(n_heldout=0)
    figure = figures.steering_cost_curve(cost)
    assert list(figure.data[0].x) == [0.1] * 3
    assert figure.layout.xaxis3.title.text == "share of other outputs"
    with pytest.raises(SettingsError, match=r"against='kl_nats'\): expected against='other'.*name no held-out prompts"):
        figures.steering_cost_curve(cost, against="kl_nats")


def test_a_run_that_holds_a_cost_curve_and_a_surface_is_reported_with_them(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    before = report.render(read_run(directory))
    assert 'id="plot-cost"' not in before and 'id="plot-surface"' not in before
    made_up.steering_cost().save(directory)
    made_up.tuned().save(directory)
    after = report.render(read_run(directory))
    assert 'id="plot-cost"' in after and 'id="plot-surface"' in after
    assert "A control that runs along the same line" in after


def test_the_report_shows_what_else_was_said_and_what_is_lost_with_intervals(samples, tmp_path):
    run = read_run(samples.write_run(tmp_path))
    assert run.shift is not None
    lost = {way: {"loss": 0.034, "ci95": [-0.01, 0.06], "n": 60, "n_items": 60} for way in made_up.WAYS}
    ends = {name: [0.9, 0.99] for name in ("heldout_generalization", "heldout_generalization_steered")}
    effects = replace(run.shift.side_effects, lost=lost, ci95=ends, n_items=60, kl_nats_to_memorization=2.5)
    parts = replace(effects, by_task={"addition": effects, "in_context_inference": effects})
    said = ({"output": "<mem-dead>", "count": 3, "memorized_form": True},)
    side = replace(run.shift.to_memorization, others=said)
    ways = {"to_generalization": run.shift.to_generalization, "to_memorization": side}
    shift = replace(run.shift, side_effects=parts, to_memorization=side, by_task={"addition": ways})
    html = report.render(replace(run, shift=shift)).split("</script>")[-1]
    assert "&lt;mem-dead&gt;" in html and "What else was said" in html
    assert "3.4\N{NO-BREAK SPACE}%" in html and "[\N{MINUS SIGN}1.0,\N{NO-BREAK SPACE}6.0]" in html
    assert "shift, in context inference" in html and "Shift, task by task" in html
    assert "2.500" in html

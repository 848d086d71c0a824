import json
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import made_up
import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memgen_lens.core.errors import MemgenError, SettingsError, SiteError
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import wilson
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.viz import figures
from memgen_lens.viz.theme import BEHAVIOR_COLORS


def traces(figure: go.Figure) -> dict:
    return {trace.name: trace for trace in figure.data if trace.showlegend is not False}


def scores_of(nmd: np.ndarray) -> NeuronScores:
    ones = np.ones_like(nmd)
    return NeuronScores("post", nmd, np.sign(nmd) / 2, ones, ones, ones, 8, 8)


def test_training_curves_draw_the_history_with_the_loss_on_a_second_axis(samples):
    history = samples.history()
    drawn = traces(figures.training_curves(history))
    for name, field in {
        "generalization (validation)": "generalization",
        "generalization (rephrased)": "rephrased_generalization",
        "memorization (memorized)": "memorization",
        "loss": "loss",
    }.items():
        assert list(drawn[name].x) == [row.step for row in history]
        assert list(drawn[name].y) == [getattr(row, field) for row in history]
    assert drawn["loss"].yaxis == "y2"


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_loss_axis_is_log_or_linear_as_asked(samples, scale):
    assert figures.training_curves(samples.history(), loss_axis=scale).layout.yaxis2.type == scale


@pytest.mark.parametrize(
    ("losses", "ticks"), [((2.5, 0.004), {0.01, 0.1, 1.0}), ((0.3, 0.15), {0.1, 0.2, 0.5}), ((0.0, 0.0), {1.0})]
)
def test_the_log_axis_has_a_few_round_ticks(samples, losses, ticks):
    rows = [replace(samples.history()[0], loss=loss) for loss in losses]
    assert ticks <= set(figures.training_curves(rows).layout.yaxis2.tickvals)


def test_a_single_evaluation_without_loss_is_drawn(samples):
    row = replace(samples.history()[0], loss=0.0)
    assert len(figures.training_curves([row]).data) == 4


def test_behavior_bars_are_the_shares_of_each_split_with_wilson_intervals(samples):
    outcomes = samples.outcomes()
    figure = figures.behavior_bars(outcomes)
    assert list(figure.data[0].y) == ["memorized<br>n = 60", "rephrased<br>n = 60", "heldout<br>n = 60"]
    drawn = traces(figure)
    for name in ("generalization", "memorization", "other"):
        for position, split in enumerate(("memorized", "rephrased", "heldout")):
            shown = [o for o in outcomes if o.item.split == split]
            rate = wilson([o.behavior == name for o in shown], [o.item.key for o in shown])
            assert drawn[name].x[position] == rate.rate
            assert tuple(drawn[name].customdata[position]) == (rate.k, rate.n, *rate.ci95, rate.n_items)
    assert np.allclose(sum(np.array(trace.x) for trace in figure.data), 1)


def test_behavior_bars_take_outcomes_and_their_rows_alike(samples):
    outcomes = samples.outcomes()
    assert figures.behavior_bars(outcomes) == figures.behavior_bars([outcome.row() for outcome in outcomes])


def test_nmd_heatmap_is_the_record_centred_at_zero(samples):
    scores = samples.neuron_scores()
    heatmap = figures.nmd_heatmap(scores).data[0]
    assert np.array_equal(heatmap.z, scores.nmd)
    neurons = np.broadcast_to(np.arange(128), (2, 128))
    assert np.allclose(heatmap.customdata, np.stack([neurons, scores.rho, scores.q], -1), atol=1e-6)
    assert heatmap.zmid == 0
    assert heatmap.zmin == -heatmap.zmax
    assert heatmap.colorscale[2] == (0.5, "#ffffff")


def test_a_wide_heatmap_shows_the_strongest_of_each_four_neighbours_and_stays_light(samples):
    scores = samples.neuron_scores("post", 24, 4096)
    figure = figures.nmd_heatmap(scores)
    heatmap = figure.data[0]
    groups = scores.nmd.reshape(24, 1024, 4)
    strongest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    assert np.array_equal(heatmap.z, strongest)
    assert len(figure.to_json()) < 1_000_000
    assert "4 neighbours" in figure.layout.xaxis.title.text


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=30),
        elements=st.floats(-100, 100, width=32),
    )
)
def test_every_cell_is_the_neuron_it_names_and_no_layer_loses_its_strongest(nmd):
    with mock.patch.object(figures, "MAX_COLUMNS", 8):
        heatmap = figures.nmd_heatmap(scores_of(nmd)).data[0]
    neurons = heatmap.customdata[..., 0].astype(int)
    assert heatmap.z.shape[1] <= 8
    assert np.array_equal(heatmap.z, np.take_along_axis(nmd, neurons, 1))
    assert np.array_equal(np.abs(heatmap.z).max(1), np.abs(nmd).max(1))


def test_top_draws_the_neurons_that_differ_most_in_any_layer():
    nmd = np.array([[0.0, 3.0, 0.1, 0.0], [-5.0, 0.0, 0.2, 0.0]], dtype=np.float32)
    heatmap = figures.nmd_heatmap(scores_of(nmd), top=2).data[0]
    assert list(heatmap.x) == ["0", "1"]
    assert np.array_equal(heatmap.z, nmd[:, :2])


@pytest.mark.parametrize("top", [0, 129])
def test_an_impossible_top_is_refused(samples, top):
    with pytest.raises(SettingsError, match=rf"nmd_heatmap\(top=.*\): expected .*; received {top}"):
        figures.nmd_heatmap(samples.neuron_scores(), top=top)


def test_scores_without_any_difference_are_drawn_as_white():
    heatmap = figures.nmd_heatmap(scores_of(np.zeros((2, 4), dtype=np.float32))).data[0]
    assert (heatmap.zmin, heatmap.zmax) == (-1.0, 1.0)
    assert not np.any(heatmap.z)


def test_rho_by_layer_draws_maximum_percentile_and_median_of_every_site(samples):
    sites = [samples.neuron_scores(), samples.neuron_scores("post", n_neurons=512)]
    drawn = traces(figures.rho_by_layer(sites))
    assert len(drawn) == 6
    for scores in sites:
        size = np.abs(scores.rho)
        assert np.allclose(drawn[f"{scores.site} max"].y, size.max(1))
        assert np.allclose(drawn[f"{scores.site} 95th pct."].y, np.quantile(size, 0.95, axis=1))
        assert np.allclose(drawn[f"{scores.site} median"].y, np.median(size, axis=1))
    alone = figures.rho_by_layer(sites[0])
    assert len(alone.data) == 3


def test_probe_by_layer_draws_auroc_with_its_interval_beside_three_baselines(samples):
    report = samples.probe_report(4)
    drawn = traces(figures.probe_by_layer(report))
    probe = drawn["probe on resid_post"]
    values = np.array([scores.auroc for scores in report.by_layer])
    assert np.allclose(probe.y, values)
    assert np.allclose(probe.y - probe.error_y.arrayminus, [scores.auroc_ci95[0] for scores in report.by_layer])
    assert np.allclose(probe.y + probe.error_y.array, [scores.auroc_ci95[1] for scores in report.by_layer])
    assert set(drawn["input only"].y) == {report.input_only.auroc}
    assert set(drawn["embedding"].y) == {report.embedding.auroc}
    assert set(drawn["shuffled labels"].y) == {0.501}


def test_learning_curve_draws_auroc_over_pairs(samples):
    line = figures.learning_curve(samples.probe_report()).data[0]
    assert list(line.x) == [4, 8, 16, 36]
    assert np.allclose(line.y, [0.5, 0.75, 0.875, 1 - 2 / 36])


def test_steering_rates_draw_both_directions_beside_their_controls(samples):
    table = samples.steering_table()
    figure = figures.steering_rates(table)
    answers = [trace for trace in figure.data if trace.name != "memorized form"]
    forms = [trace for trace in figure.data if trace.name == "memorized form"]
    for side, answer, form in zip((table.to_generalization, table.to_memorization), answers, forms, strict=True):
        assert answer.x[0] == side.shift["rate"]
        assert list(answer.x[1:]) == [control["mean"] for control in side.controls.values()]
        assert answer.x[0] + answer.error_x.array[0] == pytest.approx(side.shift["ci95"][1])
        assert answer.x[0] - answer.error_x.arrayminus[0] == pytest.approx(side.shift["ci95"][0])
        assert form.x[0] == side.memorized_form["rate"]
        assert list(form.x[1:]) == [c["memorized_form"]["mean"] for c in side.controls.values()]
        assert answer.marker.color == BEHAVIOR_COLORS[side.toward]
    assert list(figure.layout.yaxis.ticktext) == ["steered", "random neurons", "low correlation", "random sign"]
    assert "n = 24" in figure.layout.annotations[0].text


def test_a_control_that_could_not_be_drawn_says_why(samples):
    table = samples.steering_table("patch")
    why = {"mean": None, "why": "no <sign> to draw"}
    side = replace(table.to_generalization, controls={"random_sign": why})
    figure = figures.steering_rates(replace(table, to_generalization=side))
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert "not measured: no &lt;sign&gt; to draw" in texts
    assert len(figure.data[0].x) == 1


def test_steering_without_any_rate_is_drawn_empty(samples):
    table = samples.steering_table()
    none = {"rate": None, "ci95": None, "why": "user pairs name no answers"}
    side = replace(table.to_memorization, shift=none, memorized_form=none, controls={})
    assert len(figures.steering_rates(replace(table, to_memorization=side)).data) == 4


def test_every_cell_of_the_sweep_is_its_row(samples):
    rows = samples.sweep_rows()
    chosen = SteeringSetting("post", 0.2, 3.0, "prompt")
    figure = figures.steering_sweep(rows, chosen=chosen)
    for heatmap, field in zip(figure.data, ("to_generalization", "to_memorization", "memorized_form"), strict=True):
        for row in rows:
            setting = row.setting
            if (setting.site, setting.positions) == ("post", "prompt"):
                y = list(heatmap.y).index(f"{100 * setting.top_fraction:g} %")
                x = list(heatmap.x).index(f"{setting.alpha:g}")
                assert heatmap.z[y][x] == getattr(row, field)
    frames = figure.layout.shapes
    assert len(frames) == 3
    assert {(frame.x0, frame.x1, frame.y0, frame.y1) for frame in frames} == {(4.5, 5.5, 1.5, 2.5)}
    assert "post" in figure.layout.title.text
    assert "n = 12" in figure.layout.title.text


def test_a_sweep_with_patch_rows_has_a_column_for_them_and_leaves_gaps_empty(samples):
    figure = figures.steering_sweep(samples.sweep_rows(), site="resid_post", positions="prompt")
    heatmap = figure.data[0]
    assert heatmap.x[-1] == "patch"
    assert [line[-1] for line in heatmap.z] == [None, 0.75, None, None, None]


def test_fitted_rules_have_columns_of_their_own_between_shift_and_patch(samples):
    shift, *_ = rows = [row for row in samples.sweep_rows() if row.setting.positions == "prompt"]
    rules = [
        replace(shift, setting=replace(rows[-1].setting, alpha=1.0, mode=mode, size=size), to_generalization=rate)
        for mode, size, rate in (("low_rank", 4, 0.6), ("clusters", 8, 0.7), ("clusters", 1, 0.5))
    ]
    figure = figures.steering_sweep([*rows, *rules], chosen=rules[1].setting)
    heatmap = figure.data[0]
    assert heatmap.x[-4:] == ("1 cluster: 1", "8 clusters: 1", "rank 4: 1", "patch")
    assert [line[-4:] for line in heatmap.z][1] == [0.5, 0.7, 0.6, 0.75]
    assert figure.layout.shapes[0].x0 == len(heatmap.x) - 3.5
    assert "what a rule says" in figure.layout.xaxis3.title.text


def test_the_rates_of_a_fitted_rule_name_it(samples):
    table = samples.steering_table()
    fitted = replace(table, setting=replace(table.setting, mode="low_rank", size=4))
    assert figures.steering_rates(fitted).layout.title.text.startswith(
        "Low-rank: resid_post, top 10 %, alpha 2, rank 4"
    )


def test_without_a_choice_the_sweep_shows_the_best_site_and_frames_nothing(samples):
    rows = samples.sweep_rows()
    figure = figures.steering_sweep(rows)
    assert "resid_post" in figure.layout.title.text
    assert not figure.layout.shapes


def test_a_site_that_was_not_swept_is_refused_with_the_near_ones(samples):
    with pytest.raises(SiteError, match=r"received site='resid_pots'.*Did you mean site='resid_post'"):
        figures.steering_sweep(samples.sweep_rows(), site="resid_pots")


def test_steering_by_layer_draws_each_restriction_and_all_layers_last(samples):
    rows = samples.layer_rows()
    whole = replace(rows[0], layers=None, to_generalization=0.9)
    figure = figures.steering_by_layer([whole, *rows])
    assert list(figure.data[0].x) == ["0", "1", "all"]
    assert list(figure.data[0].y) == [0.0, 0.8, 0.9]


@pytest.mark.parametrize(
    "draw",
    [
        figures.training_curves,
        figures.behavior_bars,
        figures.rho_by_layer,
        figures.steering_sweep,
        figures.steering_by_layer,
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(MemgenError, match=rf"{draw.__name__}\(.*expected at least one value; received \[\]"):
        draw([])


def test_the_first_neurons_are_drawn_strongest_at_the_top_with_their_intervals():
    scores = scores_of(np.array([[0.1, -3.0, 0.2], [2.0, 0.0, np.nan]]))
    score = np.array([[0.1, -0.9, 0.2], [0.7, 0.0, np.nan]])
    scores = replace(scores, method="auroc", score=score, ci95=np.stack([score - 0.1, score + 0.05]))
    figure = figures.top_neurons([scores, replace(scores, ci95=None)], top=3)
    bars, bare = figure.data
    assert list(bars.y) == ["0.2", "1.0", "0.1"], "a category axis begins at the foot"
    assert list(bars.x) == [0.2, 0.7, -0.9]
    np.testing.assert_allclose(bars.error_x.array, 0.05)
    np.testing.assert_allclose(bars.error_x.arrayminus, 0.1)
    assert bars.error_x.visible and not bare.error_x.visible
    assert len(figures.top_neurons(scores, top=50).data[0].x) == 5, "what is no number has no rank"
    with pytest.raises(SettingsError, match="expected scores that are finite numbers"):
        figures.top_neurons(replace(scores, score=np.full((2, 3), np.nan)))


def test_every_public_figure_has_a_short_title_and_named_axes(samples):
    scores, report, table = samples.neuron_scores(), samples.probe_report(), samples.steering_table()
    drawn = {
        "training_curves": figures.training_curves(samples.history()),
        "behavior_bars": figures.behavior_bars(samples.outcomes()),
        "nmd_heatmap": figures.nmd_heatmap(scores),
        "rho_by_layer": figures.rho_by_layer(scores),
        "probe_by_layer": figures.probe_by_layer(report),
        "learning_curve": figures.learning_curve(report),
        "top_neurons": figures.top_neurons(scores),
        "neuron_activations": figures.neuron_activations(samples.neuron_record()),
        "method_ablation": figures.method_ablation(made_up.methods()),
        "method_agreement": figures.method_agreement(made_up.methods()),
        "method_recovery": figures.method_recovery(made_up.methods()),
        "steering_rates": figures.steering_rates(table),
        "steering_sweep": figures.steering_sweep(samples.sweep_rows()),
        "steering_surface": figures.steering_surface(made_up.tuned()),
        "steering_cost_curve": figures.steering_cost_curve(made_up.steering_cost()),
        "steering_by_layer": figures.steering_by_layer(samples.layer_rows()),
    }
    elsewhere = {
        "adapter_overlap",
        "split_half",
        "seed_profiles",
        "task_overlap",
        "probe_transfer",
        "steering_transfer",
        "dynamics",
        "guard_trade_off",
        "mode_and_content",
        "mode_by_position",
        "patching_map",
        "probe_by_position",
        "recitation",
        "recitation_under_steering",
        "runs_side_by_side",
        "setting_effect",
        "steering_by_position",
    }
    # Those: test_consistency_figures.py, test_guard_figures.py, test_position_figures.py, test_recitation_figures.py,
    # test_comparison.py.
    assert set(drawn) == set(figures.__all__) - elsewhere
    for figure in drawn.values():
        assert len(figure.layout.title.text) <= 48
        named = json.loads(figure.to_json())["layout"]
        assert any(named[axis].get("title", {}).get("text") for axis in named if axis.startswith("xaxis"))


def test_figures_need_no_torch():
    code = "import sys, memgen_lens.viz.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

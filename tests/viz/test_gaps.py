"""Figures of records with gaps: what is not finite is left out, the rest is drawn as ever, every figure of them."""

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import plotly.graph_objects as go
import pytest
from made_up import adapters, halves, run_dynamics, seeds, tasks

from memgen_lens.viz import figures

GAP = pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])


def with_gap(record, gap, where=0):
    """A record in which one entry of every array of floats, and of what it holds, is a gap."""
    if isinstance(record, np.ndarray) and record.dtype.kind == "f":
        holed = record.copy()
        holed.reshape(-1)[where] = gap
        return holed
    if isinstance(record, dict):
        return {key: with_gap(value, gap, where) for key, value in record.items()}
    if is_dataclass(record) and any(isinstance(getattr(record, f.name), np.ndarray | dict) for f in fields(record)):
        held = {f.name: getattr(record, f.name) for f in fields(record)}
        return replace(
            record,
            **{
                n: with_gap(v, gap, where)
                for n, v in held.items()
                if isinstance(v, np.ndarray | dict) or is_dataclass(v)
            },
        )
    return record


def values(figure: go.Figure) -> list[np.ndarray]:
    """What each trace draws, as floats: gaps are NaN."""
    drawn = []
    for trace in figure.data:
        for axis in ("x", "y", "z"):
            value = trace[axis] if axis in trace else None  # noqa: SIM401
            if value is not None and not any(isinstance(entry, str) for entry in np.ravel(np.asarray(value, object))):
                drawn.append(np.asarray(value, dtype=float))
    return drawn


def assert_all_but_gaps_are_drawn(whole: go.Figure, holed: go.Figure, n_gaps: int) -> None:
    """Where both have a number it is the same one, no more is missing than there are gaps, and the page can hold it."""
    json.loads(holed.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    missing = 0
    for before, after in zip(values(whole), values(holed), strict=True):
        assert not np.isinf(after).any()
        gone = np.isnan(after) & ~np.isnan(before)
        missing += gone.sum()
        np.testing.assert_array_equal(after[~np.isnan(after)], before[~np.isnan(after)])
    assert 0 < missing <= n_gaps


def assert_axes_are_finite(figure: go.Figure) -> None:
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        assert axis.range is None or np.isfinite(np.array(axis.range, dtype=float)).all()


@GAP
def test_a_heatmap_of_neurons_draws_the_rest(samples, gap):
    scores = samples.neuron_scores()
    nmd = scores.nmd.copy()
    nmd[0, 5] = gap
    whole, holed = (figures.nmd_heatmap(s).data[0] for s in (scores, replace(scores, nmd=nmd)))
    assert np.isnan(holed.z[0, 5]) and np.isnan(holed.z).sum() == 1
    np.testing.assert_array_equal(np.delete(holed.z, 5), np.delete(whole.z, 5))
    assert np.isfinite([holed.zmin, holed.zmax]).all() and holed.zmax == pytest.approx(whole.zmax, rel=0.2)


@GAP
def test_a_wide_heatmap_and_the_top_neurons_pass_over_a_gap(samples, gap):
    scores = samples.neuron_scores("post", 2, 4096)
    nmd = scores.nmd.copy()
    nmd[1, 8] = gap
    wide = figures.nmd_heatmap(replace(scores, nmd=nmd)).data[0]
    assert np.isfinite(wide.z).all(), "a finite neighbour stands for it"
    assert wide.customdata[1, 2, 0] in (9, 10, 11)
    top = figures.nmd_heatmap(replace(scores, nmd=nmd), top=50).data[0]
    assert "8" not in top.x


@GAP
def test_a_record_of_gaps_alone_is_drawn_empty(samples, gap):
    scores = samples.neuron_scores()
    empty = replace(scores, nmd=np.full_like(scores.nmd, gap), rho=np.full_like(scores.rho, gap))
    assert np.isnan(figures.nmd_heatmap(empty).data[0].z).all()
    assert all(np.isnan(np.array(trace.y, dtype=float)).all() for trace in figures.rho_by_layer(empty).data)


@GAP
def test_correlations_by_layer_are_those_of_the_other_neurons(samples, gap):
    scores = samples.neuron_scores()
    rho = scores.rho.copy()
    rho[0, 5] = gap
    drawn = {trace.name: trace.y for trace in figures.rho_by_layer(replace(scores, rho=rho)).data}
    others = np.abs(np.delete(scores.rho[0], 5))
    assert drawn["resid_post max"][0] == pytest.approx(others.max())
    assert drawn["resid_post 95th pct."][0] == pytest.approx(np.quantile(others, 0.95))
    assert drawn["resid_post median"][0] == pytest.approx(np.median(others))
    assert drawn["resid_post max"][1] == np.abs(scores.rho[1]).max()


@GAP
def test_training_curves_leave_a_gap(samples, gap):
    history = samples.history()
    holed = [replace(row, loss=gap, memorization=gap) if i == 3 else row for i, row in enumerate(history)]
    whole, drawn = figures.training_curves(history), figures.training_curves(holed)
    assert_all_but_gaps_are_drawn(whole, drawn, 2)
    assert list(drawn.layout.yaxis2.tickvals) == list(whole.layout.yaxis2.tickvals)


@GAP
def test_probes_leave_a_gap_at_their_layer_and_in_a_baseline(samples, gap):
    report = samples.probe_report(4)
    layers = list(report.by_layer)
    layers[1] = replace(layers[1], auroc=gap, auroc_ci95=(gap, gap))
    holed = replace(report, by_layer=tuple(layers), embedding=replace(report.embedding, auroc=gap))
    assert_all_but_gaps_are_drawn(figures.probe_by_layer(report), figures.probe_by_layer(holed), 3)
    curve = replace(
        report, learning_curve=tuple({**p, "auroc": gap} if i == 1 else p for i, p in enumerate(report.learning_curve))
    )
    assert_all_but_gaps_are_drawn(figures.learning_curve(report), figures.learning_curve(curve), 1)


@GAP
@pytest.mark.parametrize("field", ["shift", "memorized_form", "controls"])
def test_steering_rates_leave_out_the_rate_that_is_missing(samples, gap, field):
    table = samples.steering_table()
    side = table.to_generalization
    if field == "controls":
        changed = side.controls | {"random_sign": side.controls["random_sign"] | {"mean": gap, "ci95": [gap, gap]}}
    else:
        changed = {"rate": gap, "ci95": [gap, gap]}
    holed = replace(table, to_generalization=replace(side, **{field: changed}))
    whole, drawn = (sum(len(trace.x) for trace in figures.steering_rates(t).data) for t in (table, holed))
    assert drawn == whole - 1
    one_end = replace(side, shift=side.shift | {"ci95": [gap, side.shift["ci95"][1]]})
    bars = figures.steering_rates(replace(table, to_generalization=one_end)).data[0].error_x
    assert np.isfinite(np.array([*bars.array, *bars.arrayminus], dtype=float)).all()


@GAP
def test_the_sweep_and_its_layers_leave_a_gap(samples, gap):
    rows, layers = samples.sweep_rows(), samples.layer_rows()
    best = max(range(len(rows)), key=lambda i: rows[i].gain)
    holed = [replace(row, to_generalization=gap) if i == best else row for i, row in enumerate(rows)]
    place = {"site": rows[best].setting.site, "positions": rows[best].setting.positions}
    assert_all_but_gaps_are_drawn(figures.steering_sweep(rows, **place), figures.steering_sweep(holed, **place), 1)
    assert figures.steering_sweep(holed).data, "a site and positions are found beside the gap"
    assert_all_but_gaps_are_drawn(
        figures.steering_by_layer(layers),
        figures.steering_by_layer([replace(layers[0], memorized_form=gap), layers[1]]),
        1,
    )


@GAP
@pytest.mark.parametrize(
    ("draw", "record", "n_gaps"),
    [
        (figures.seed_profiles, seeds, 2),
        (figures.adapter_overlap, adapters, 2),
        (figures.task_overlap, tasks, 2),
        (figures.probe_transfer, tasks, 1),
        (figures.steering_transfer, tasks, 3),
    ],
    ids=["seeds", "adapters", "overlap", "probes", "steering"],
)
def test_comparisons_leave_a_gap(draw, record, n_gaps, gap):
    whole, holed = draw(record()), draw(with_gap(record(), gap, 1))
    assert_all_but_gaps_are_drawn(whole, holed, n_gaps)
    assert_axes_are_finite(holed)
    assert "nan" not in str(holed.data).replace("nanvalue", "") and "inf%" not in str(holed.data)


@GAP
def test_halves_are_drawn_without_the_split_that_is_missing(gap):
    whole, holed = figures.split_half(halves()), figures.split_half(with_gap(halves(), gap))
    assert [len(trace.x) for trace in holed.data] == [len(trace.x) - 1 for trace in whole.data]
    assert_axes_are_finite(holed)
    nothing = replace(halves(), spearman=np.full(40, gap), null_spearman=np.full(40, gap))
    assert_axes_are_finite(figures.split_half(nothing))


@GAP
@pytest.mark.parametrize("where", [0, 3, -1])
def test_dynamics_leave_a_gap_and_keep_their_axes(gap, where):
    whole, holed = figures.dynamics(run_dynamics()), figures.dynamics(with_gap(run_dynamics(), gap, where))
    assert_axes_are_finite(holed)
    json.loads(holed.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for before, after in zip(whole.data, holed.data, strict=True):
        if before.fill == "toself":
            continue  # a band is drawn without the step that is missing
        there = np.array(after.y, dtype=float)
        shown = np.isfinite(there)
        np.testing.assert_array_equal(there[shown], np.array(before.y, dtype=float)[shown])
    assert all(len(trace.x) == len(trace.y) for trace in holed.data)
    steps = holed.layout.sliders[0].steps
    assert all(np.isfinite([v for line in step.args[0]["y"] for v in line if v is not None]).all() for step in steps)


@GAP
def test_dynamics_of_gaps_alone_have_axes(gap):
    measured = run_dynamics()
    empty = {
        name: np.full_like(getattr(measured, name), gap)
        for name in ("auroc", "auroc_low", "auroc_high", "nmd_max_in_sd")
    }
    assert_axes_are_finite(figures.dynamics(replace(measured, **empty)))


def test_a_report_of_gaps_is_written(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    scores = samples.neuron_scores()
    rho = scores.rho.copy()
    rho[0, 0] = np.nan
    replace(scores, rho=rho).save(directory / "scores")
    from memgen_lens.viz.report import write_report

    html = write_report(directory).read_text()
    assert "nan&nbsp;%" not in html and "nan\xa0%" not in html

"""The figures of consistency and dynamics: records in, what they hold drawn as it is."""

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from made_up import adapters, halves, matrix, run_dynamics, seeds, tasks

from memgen_lens.core.dynamics_records import RateSeries
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.files import with_nulls, write_json
from memgen_lens.viz import figures
from memgen_lens.viz.report import write_report


def plain(figure: go.Figure) -> dict:
    """The figure as it is written into a page: strict JSON."""
    return json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.split_half(halves()),
        lambda: figures.seed_profiles(seeds()),
        lambda: figures.adapter_overlap(adapters()),
        lambda: figures.task_overlap(tasks()),
        lambda: figures.probe_transfer(tasks()),
        lambda: figures.steering_transfer(tasks()),
        lambda: figures.dynamics(run_dynamics()),
    ],
)
def test_every_figure_is_plain_json_with_a_short_title(figure):
    drawn = figure()
    assert plain(drawn)["data"]
    assert len(drawn.layout.title.text) <= 48


def test_split_half_draws_every_halving_beside_swapped_labels_and_chance():
    result = halves()
    figure = figures.split_half(result)
    boxes = [(box.y[0], list(box.x)) for box in figure.data]
    assert boxes == [
        ("as they are", result.spearman.tolist()),
        ("labels swapped", result.null_spearman.tolist()),
        ("as they are", result.overlap.tolist()),
        ("labels swapped", result.null_overlap.tolist()),
    ]
    assert figure.layout.shapes[0].x0 == result.expected_overlap
    assert figure.layout.annotations[0].text == "rank correlation of rho between the halves (Spearman)"
    by_gradient = figures.split_half(replace(result, method="attribution_patching"))
    assert "of attribution patching between" in by_gradient.layout.annotations[0].text


def test_halves_by_several_methods_stand_one_below_another():
    results = [halves(), replace(halves(), method="auroc", n_top=20, expected_overlap=0.08)]
    figure = figures.split_half(results)
    names = ["rho", "rho, swapped", "auroc", "auroc, swapped"]
    assert [box.y[0] for box in figure.data] == names * 2
    assert [line.x0 for line in figure.layout.shapes] == [0.08, results[0].expected_overlap]
    assert "top 20 or 26 neurons" in figure.layout.annotations[1].text and plain(figure)["data"]
    elsewhere = figures.split_half([halves(), replace(halves(), site="post"), replace(halves(), site="post")])
    assert [box.y[0] for box in elsewhere.data][:6:2] == ["resid_post, rho", "post, rho (2)", "post, rho (3)"]


def test_matrices_are_drawn_row_by_row_with_intervals_and_chance_beside_them():
    result = tasks()
    overlap, rank = figures.task_overlap(result).data
    assert np.allclose(np.array(overlap.z, dtype=float), result.overlap.value)
    assert np.allclose(np.array(rank.z, dtype=float), result.rank_correlation.value)
    assert overlap.text[0][2] == "26%<br>[16, 36]<br>chance 20%"
    assert rank.text[2][2] == "0.80<br>[0.70, 0.90]"
    assert "from addition to in_context_inference" in overlap.customdata[0][2]
    assert "by chance 10.0% (p 0.1)" in overlap.customdata[0][2]
    probe = figures.probe_transfer(result).data[0]
    assert np.allclose(np.array(probe.z, dtype=float), result.probe.value)
    assert "24 prompts of 12 items, layer 1" in probe.customdata[1][1]
    # The first source is the uppermost row, as in a table.
    assert figures.probe_transfer(result).layout.yaxis.autorange == "reversed"


def test_steering_across_tasks_has_a_panel_a_figure_with_random_neurons_beside_it():
    result = tasks(2)
    panels = figures.steering_transfer(result).data
    names = ("to_generalization", "memorized_form", "exact_recall")
    for panel, name in zip(panels, names, strict=True):
        assert np.allclose(np.array(panel.z, dtype=float), result.steering[name].value)
        assert panel.text[0][0].endswith("random 10%")
        assert "alpha 2, positions answer" in panel.customdata[0][0]


def test_a_figure_that_could_not_be_computed_is_an_empty_cell():
    value = np.array([[0.5, np.nan], [0.2, 0.4]])
    hole = replace(tasks(2), rank_correlation=matrix(value, -1))
    rank = figures.task_overlap(hole).data[1]
    assert rank.z[0][1] is None and rank.text[0][1] == "–"
    plain(figures.task_overlap(hole))


def test_names_that_look_alike_when_shortened_keep_their_own_rows():
    long = "a task with a very long name that is cut somewhere"
    result = replace(tasks(2), tasks=(f"{long} 1", f"{long} 2"))
    figure = figures.probe_transfer(result)
    assert len(figure.data[0].z) == 2 and figure.data[0].y is None
    assert "<script>" not in plain(figures.probe_transfer(replace(result, tasks=("<script>", "b"))))["layout"]["yaxis"]


def test_seed_profiles_draw_a_line_a_model_and_panel():
    result = seeds()
    lines = figures.seed_profiles(result).data
    assert [list(line.y) for line in lines[::2]] == result.top_share.tolist()
    assert [list(line.y) for line in lines[1::2]] == result.max_abs_rho.tolist()


def test_adapter_overlap_draws_shares_beside_chance_and_correlations():
    result = adapters()
    shares, ranks = figures.adapter_overlap(result).data
    assert np.array_equal(np.array(shares.z), result.overlap)
    assert np.array_equal(np.array(ranks.z), result.rank_correlation)
    assert shares.text[0][1] == "30%<br>chance 12%<br>labels exchanged 18%" and ranks.text[0][1] == "0.15"
    assert shares.customdata[0][1].startswith(
        "seed 0 and &lt;b&gt;other<br>by chance within layers 0.120 (p 0.12 of 99"
    )
    assert shares.customdata[0][1].endswith("<br>with labels exchanged 0.180 (p 0.03)")
    nothing = np.full((2, 2), np.nan)
    without, _ = figures.adapter_overlap(replace(result, overlap_exchanged=nothing, overlap_exchanged_p=nothing)).data
    assert without.text[0][1] == "30%<br>chance 12%" and "exchanged" not in str(without.customdata)


def test_the_slider_moves_the_profiles_and_the_marker_to_its_step():
    result = run_dynamics()
    figure = figures.dynamics(result)
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == ["0", "100", "200", "300", "400", "500"]
    assert slider.active == 5
    for i, step in enumerate(slider.steps):
        data, layout, places = step.args
        assert data["y"] == [
            values[i].tolist()
            for values in (result.nmd_max_in_sd, result.nmd_mean_in_sd, result.rho_max, result.rho_p95, result.auroc)
        ]
        assert data["error_y.array"][-1] == pytest.approx((result.auroc_high[i] - result.auroc[i]).tolist())
        assert layout == {f"shapes[{line}].x{end}": i * 100 for line in (0, 1) for end in (0, 1)}
        assert len(places) == 5
    # At first everything is at the last step: the marker lines, and the traces that move.
    assert [shape.x0 for shape in figure.layout.shapes[:2]] == [500, 500]
    for place, values in zip(slider.steps[5].args[2], slider.steps[5].args[0]["y"], strict=True):
        assert list(figure.data[place].y) == values


def test_dynamics_marks_the_first_separation_and_leaves_gaps_where_nothing_flips():
    result = run_dynamics()
    figure = figures.dynamics(result)
    first = result.first_separation()
    assert first is not None and first.step in [shape.x0 for shape in figure.layout.shapes[2:]]
    assert any(note.text == "layer 1 separates" for note in figure.layout.annotations)
    steered = next(trace for trace in figure.data if trace.name == "steered: rule's answer")
    assert list(steered.y[:3]) == [None] * 3
    never = figures.dynamics(replace(result, auroc_low=result.auroc_low * 0))
    assert not any("separates" in (note.text or "") for note in never.layout.annotations)


def test_dynamics_refuses_a_threshold_below_chance():
    with pytest.raises(SettingsError, match=r"An AUROC of 0\.5 is chance"):
        figures.dynamics(run_dynamics(), threshold=0.3)


def test_a_single_checkpoint_is_drawn():
    whole = run_dynamics()
    cut = {
        name: getattr(whole, name)[:1]
        for name in whole.__dataclass_fields__
        if isinstance(getattr(whole, name), np.ndarray)
    }
    rates = {
        name: {
            key: RateSeries(s.rate[:1], s.low[:1], s.high[:1], s.n[:1], s.n_items[:1])
            for key, s in getattr(whole, name).items()
        }
        for name in ("behavior", "steering")
    }
    one = replace(whole, **cut, **rates, random_neurons={k: v[:1] for k, v in whole.random_neurons.items()})
    assert len(plain(figures.dynamics(one))["layout"]["sliders"][0]["steps"]) == 1


# --- the report --------------------------------------------------------------------------------------------------


def with_consistency(samples, directory, across) -> str:
    samples.write_run(directory)
    block = {"split_half": halves().summary()}
    if isinstance(across, dict):
        block["across_tasks"] = across
    write_json(directory / "metrics.json", samples.metrics() | {"consistency": block})
    compared = {"split_half": halves(), "across_tasks": across.summary() if hasattr(across, "summary") else across}
    write_json(directory / "consistency.json", with_nulls(compared))
    return write_report(directory).read_text()


def test_the_report_shows_the_matrices_of_a_mixture_and_what_is_left_out(samples, tmp_path):
    page = with_consistency(samples, tmp_path, tasks())
    for name in ("halves", "overlap", "probe-transfer", "steering-transfer"):
        assert f'id="plot-{name}"' in page
    assert "From one task to another" in page
    assert "&lt;b&gt;fourth&lt;/b&gt; is left out." in page and "received 3 &amp; no more" in page
    assert 'href="#consistency"' in page


def test_the_report_of_one_task_says_how_far_halves_agree(samples, tmp_path):
    page = with_consistency(samples, tmp_path, None)
    summary = halves().summary()
    assert f"{100 * summary['overlap']['mean']:.1f}\N{NO-BREAK SPACE}%" in page
    assert "From one task to another" not in page and 'id="plot-overlap"' not in page


def test_the_report_says_why_tasks_were_not_compared(samples, tmp_path):
    page = with_consistency(samples, tmp_path, {"why": "expected at least two tasks"})
    assert "expected at least two tasks" in page and "From one task to another" not in page


def test_the_report_says_why_consistency_was_not_measured(samples, tmp_path):
    samples.write_run(tmp_path)
    write_json(tmp_path / "metrics.json", samples.metrics() | {"consistency": {"why": "only nine items"}})
    page = write_report(tmp_path).read_text()
    assert "only nine items" in page and 'id="plot-halves"' not in page


def test_a_run_of_an_earlier_version_has_no_such_section(samples, tmp_path):
    samples.write_run(tmp_path)
    assert "consistency" not in write_report(tmp_path).read_text().split("<main>")[1]


def test_the_report_shows_dynamics_where_they_were_measured(samples, tmp_path):
    samples.write_run(tmp_path)
    assert 'id="plot-dynamics"' not in write_report(tmp_path).read_text()
    run_dynamics().save(tmp_path)
    assert 'id="plot-dynamics"' in write_report(tmp_path).read_text()

"""The figures of consistency and dynamics: records in, what they hold drawn as it is."""

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from memgen_lens.core.consistency_records import Matrix, SeedConsistency, SplitHalf, TaskConsistency
from memgen_lens.core.dynamics_records import Dynamics, RateSeries
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.files import with_nulls, write_json
from memgen_lens.core.records import ProbeScores, SteeringSetting
from memgen_lens.viz import figures
from memgen_lens.viz.report import write_report

TASKS = ("addition", "ciphertext", "in_context_inference")
SETTING = SteeringSetting("resid_post", 0.1, 2.0, "answer")


def halves() -> SplitHalf:
    rng = np.random.default_rng(0)
    spearman, null = rng.normal(0.85, 0.03, 40).clip(-1, 1), rng.normal(0, 0.25, 40).clip(-1, 1)
    overlap, null_overlap = rng.binomial(26, 0.8, 40) / 26, rng.binomial(26, 0.15, 40) / 26
    return SplitHalf("resid_post", 56, 56, 256, 26, 0.1, spearman, overlap, 26 / 256, 1e-12, null, null_overlap)


def matrix(value: np.ndarray, low: float = 0.0) -> Matrix:
    return Matrix(value, (value - 0.1).clip(low, 1), (value + 0.1).clip(low, 1), *[np.full(value.shape, 24)] * 2)


def tasks(n: int = 3) -> TaskConsistency:
    value = np.linspace(0.05, 0.9, n * n).reshape(n, n)
    chance = np.full((n, n), 0.1)
    names = ("to_generalization", "to_generalization_other", "exact_recall", "memorized_form", "to_memorization_other")
    return TaskConsistency(
        site="resid_post",
        tasks=TASKS[:n],
        n_pairs={name: {"select": 20, "tune": 10, "test": 24} for name in TASKS[:n]},
        top_fraction=0.1,
        rank_correlation=matrix(2 * value - 1, -1),
        overlap=matrix(value),
        overlap_expected=chance,
        overlap_p=chance,
        overlap_expected_within_layers=2 * chance,
        overlap_p_within_layers=chance,
        probe=matrix(value),
        probe_layers=(1,) * n,
        settings=(SETTING,) * n,
        steering={name: matrix(value) for name in names},
        random_neurons=dict.fromkeys(("to_generalization", "exact_recall", "memorized_form"), chance),
        left_out={"<b>fourth</b>": "expected at least 8 pairs; received 3 & no more"},
    )


def seeds() -> SeedConsistency:
    share = np.array([[0.1, 0.2, 0.7], [0.0, 0.4, 0.6]])
    return SeedConsistency("resid_post", ("0", "1"), 0.1, share, share + 0.2, np.eye(2), np.eye(2))


def run_dynamics() -> Dynamics:
    steps = np.arange(0, 600, 100)
    rate = np.linspace(0, 1, 6)
    series = RateSeries(rate, (rate - 0.1).clip(0, 1), (rate + 0.1).clip(0, 1), *[np.full(6, 24)] * 2)
    late = np.where(steps < 300, np.nan, rate)
    gaps = RateSeries(late, late - 0.1, late, *[np.where(steps < 300, 0, 24)] * 2)
    layers = rate[:, None] * np.array([0.5, 1.0])
    auroc = 0.5 + layers / 2
    names = ("nmd_mean", "nmd_max", "nmd_mean_in_sd", "nmd_max_in_sd", "rho_max", "rho_p95", "share_fdr05")
    return Dynamics(
        task="addition",
        site="resid_post",
        steps=steps,
        n_pairs={"select": 24, "tune": 12, "test": 24},
        behavior=dict.fromkeys(("generalization", "memorization", "rephrased_generalization", "flips"), series),
        **{name: layers * (i + 1) / 7 for i, name in enumerate(names)},
        auroc=auroc,
        auroc_low=auroc - 0.03,
        auroc_high=(auroc + 0.03).clip(0, 1),
        input_only=ProbeScores(0.5, (0.4, 0.6), 0.5, (0.4, 0.6)),
        setting=SETTING,
        steering=dict.fromkeys(("to_generalization", "exact_recall", "memorized_form"), gaps),
        random_neurons=dict.fromkeys(("to_generalization", "memorized_form"), late / 10),
        why={0: "only 0 flip", 100: "only 2 flip", 200: "only 4 flip"},
    )


def plain(figure: go.Figure) -> dict:
    """The figure as it is written into a page: strict JSON."""
    return json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.split_half(halves()),
        lambda: figures.seed_profiles(seeds()),
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
    assert "24 prompts, layer 1" in probe.customdata[1][1]
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

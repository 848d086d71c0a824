"""Runs side by side, on tables whose answers are known."""

import made_up
import numpy as np
import pytest
from scipy.stats import ttest_1samp

import memgen_lens as mg
from memgen_lens import cli
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.run_records import Runs
from memgen_lens.core.stats import mean_over_seeds
from memgen_lens.viz.compare_page import markdown, write_compare_page

FLIPS, ABOVE = "behavior.flip_rate", "steering.to_generalization.above_random"


@pytest.fixture(scope="module")
def found():
    return mg.compare(made_up.runs())


def test_runs_that_differ_in_their_seed_alone_are_one_group(found):
    labels = [f"n_memorized={n}, loss={loss}" for n in (100, 1000) for loss in ("answer", "<sequence>")]
    assert [group.label for group in found.groups] == labels
    assert found.settings == {"task.n_memorized": (100, 1000), "train.loss": ("answer", "<sequence>")}
    assert found.n_runs == 12 and found.left_out == {"broken": "OSError: <full>"}
    assert [run.seed for run in found.groups[0].runs[FLIPS]] == [0, 1, 2]


def test_means_and_intervals_over_seeds_are_students(found):
    values = np.array([0.5, 0.52, 0.54])
    over_seeds = found.groups[0].over_seeds[FLIPS]
    expected = ttest_1samp(values, 0).confidence_interval()
    assert (over_seeds.mean, over_seeds.n, over_seeds.n_without) == (pytest.approx(0.52), 3, 0)
    assert over_seeds.ci95 == pytest.approx((expected.low, expected.high))
    assert mean_over_seeds(np.array([0.9, 1.0]), (0.0, 1.0))[1][1] == 1.0, "no rate is above 1"
    assert mean_over_seeds(np.array([0.3]), (0.0, 1.0)) == (0.3, None)
    assert mean_over_seeds(np.array([1.0, 1.0]), (0.0, 1.0)) == (1.0, None), "a spread of nothing tells nothing"


def test_the_items_interval_stands_beside_each_run(found):
    run = found.groups[0].runs["steering.to_generalization.shift_rate"][1]
    assert (run.value, run.ci95, run.n, run.n_items) == (0.75, (0.6, 0.9), 40, 20)


def test_a_rate_above_its_control_and_a_run_that_lacks_it(found):
    values = [run.value for run in found.groups[0].runs[ABOVE]]
    assert values == [None, 0.5, 0.5]
    over_seeds = found.groups[0].over_seeds[ABOVE]
    assert (over_seeds.mean, over_seeds.n, over_seeds.n_without) == (0.5, 2, 1)


def test_differences_are_paired_by_seed(found):
    """Seeds differ by 0.02 each, which would widen an unpaired interval and leaves a paired one empty."""
    one = next(d for d in found.differences if d.figure == FLIPS and d.group == "n_memorized=1000, loss=answer")
    assert one.reference == "n_memorized=100, loss=answer"
    assert one.over_seeds.mean == pytest.approx(0.1) and one.over_seeds.n == 3
    low, high = one.over_seeds.ci95 or (0.1, 0.1)
    assert high - low < 1e-9


def test_the_effect_of_a_setting_is_that_of_runs_alike_in_all_else(found):
    effects = {(e.setting, e.figure): e for e in found.effects}
    items, loss = effects["task.n_memorized", FLIPS], effects["train.loss", FLIPS]
    assert (items.value, items.reference, items.n_pairs, items.over_seeds.n) == (1000, 100, 6, 3)
    assert items.over_seeds.mean == pytest.approx(0.1) and loss.over_seeds.mean == pytest.approx(0.0)
    assert effects["train.loss", ABOVE].n_pairs == 5, "a run that lacks the figure has no partner"


def test_settings_that_change_together_have_no_effect_of_their_own():
    table = tuple(
        row
        for row in made_up.runs().table
        if (row.get("task.n_memorized") == 100) == (row.get("train.loss") == "answer")
    )
    together = mg.compare(Runs(table))
    assert together.effects == () and len(together.settings) == 2 and together.differences
    assert "No two runs differ in this setting alone" in write_page(together)


def write_page(comparison, directory="."):
    return write_compare_page(comparison, directory).read_text()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_another_figure_and_another_reference_can_be_asked_for():
    other = mg.compare(
        made_up.runs(), figures=["steering.to_generalization.n"], reference="n_memorized=1000, loss=answer"
    )
    assert other.groups[0].label == "n_memorized=1000, loss=answer"
    assert other.groups[0].over_seeds["steering.to_generalization.n"].mean == 40
    with pytest.raises(SettingsError, match=r"received 'behavior.flip_rat'. Did you mean behavior.flip_rate"):
        mg.compare(made_up.runs(), figures=["behavior.flip_rat"])
    with pytest.raises(SettingsError, match="expected the label of a group"):
        mg.compare(made_up.runs(), reference="n_memorized=7")
    with pytest.raises(RunDirectoryError, match="expected at least one run that is done; received 1 failed"):
        mg.compare(Runs(made_up.runs().table[-1:]))


def test_the_record_is_what_it_was_after_saving_and_loading(found, tmp_path):
    path = found.save(tmp_path / "kept")
    assert mg.Comparison.load(path) == found == mg.Comparison.load(tmp_path / "kept")
    (tmp_path / "kept" / "compare.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"compare\.json"):
        mg.Comparison.load(tmp_path / "kept")


def test_the_table_is_what_it_was_after_saving_and_loading(tmp_path):
    runs = made_up.runs()
    again = mg.Runs.load(runs.save(tmp_path))
    for name in runs.columns:
        assert again.column(name) == runs.column(name), name
    mixed = Runs(({"run": "a", "status": "done", "directory": "a", "x": 1}, {**runs.table[1], "x": "one"}))
    assert mg.Runs.load(mixed.save(tmp_path)).column("x") == ["1", '"one"'], "a column has one type"
    with pytest.raises(RunDirectoryError, match="expected a folder of run_many"):
        mg.Runs.load(tmp_path / "nowhere")
    (tmp_path / "no.parquet").write_text("no table")
    with pytest.raises(RunDirectoryError, match="no Parquet table"):
        mg.Runs.load(tmp_path / "no.parquet")


def test_figures_draw_what_was_found(found):
    beside = mg.figures.runs_side_by_side(found, FLIPS)
    dots, means = beside.data
    assert len(dots.x) == 12 and list(means.x) == pytest.approx([0.52, 0.52, 0.62, 0.62])
    assert (dots.error_x.array[0], dots.error_x.arrayminus[0]) == pytest.approx((0.2, 0.1))
    assert "<sequence>" not in str(dots.y)
    effect = mg.figures.setting_effect(found, "task.n_memorized", FLIPS)
    assert [list(line.x) for line in effect.data] == [[100, 1000]] * 2
    assert [list(line.y) for line in effect.data] == [pytest.approx([0.52, 0.62])] * 2
    assert effect.layout.xaxis.type == "log"
    words = mg.figures.setting_effect(found, "train.loss")
    assert words.layout.xaxis.type == "category" and len(words.data) == 2 * len(found.figures)
    with pytest.raises(SettingsError, match=r"a setting in which the runs differ.*Did you mean train.loss"):
        mg.figures.setting_effect(found, "train.los")
    with pytest.raises(SettingsError, match="a figure that was compared"):
        mg.figures.runs_side_by_side(found, "behavior.flips")
    with pytest.raises(mg.MemgenError, match="at least one setting in which runs differ"):
        mg.figures.setting_effect(mg.compare(Runs(made_up.runs().table[:3])))


def test_the_page_shows_means_effects_differences_and_what_was_left_out(found):
    page = write_page(found)
    assert page.count('class="plotly-graph-div"') == 2 + len(found.figures)
    assert "12 runs, 4 combinations of settings" in page and "1 more failed or are missing" in page
    assert "OSError: &lt;full&gt;" in page and "loss=&lt;sequence&gt;" in page and "<sequence>" not in page
    assert "1000 instead of 100" in page and "+0.100" in page and "6 pairs" in page
    assert "0.750 [0.600, 0.900] (n = 40 of 20 items)" in page
    assert "| n_memorized=100, loss=answer | 3 | 0.520 [0.470, 0.570] |" in markdown(found)


def test_the_command_writes_record_and_page(tmp_path, capsys):
    made_up.runs().save(tmp_path)
    cli.main(["compare", "runs.parquet", "--out", "side", "--figures", FLIPS])
    said = capsys.readouterr().out
    assert "| n_memorized=1000, loss=answer | 3 | 0.620 [0.570, 0.670] |" in said
    assert mg.Comparison.load(tmp_path / "side").figures == (FLIPS,)
    assert (tmp_path / "side" / "compare.html").is_file()
    with pytest.raises(SystemExit):
        cli.main(["compare", "nowhere"])
    assert "expected a folder of run_many" in capsys.readouterr().err

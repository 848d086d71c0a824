"""Figures, words and sections of a guard, and of mode and content."""

import json

import made_up
import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.files import read_json, to_json
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.mode_records import ModeContent
from memgen_lens.viz import guard_wording

figures = mg.figures


@pytest.mark.parametrize("heldout", [True, False])
def test_a_guard_table_is_read_back_as_it_was_saved(tmp_path, heldout):
    table = made_up.guard_table(heldout=heldout)
    table.save(tmp_path)
    again = GuardTable.from_json(read_json(tmp_path / "guard.json"))
    assert again.policies == table.policies and again.chosen == table.chosen and again.triggered == table.triggered
    np.testing.assert_array_equal(again.curve.lost, table.curve.lost)


def test_mode_and_content_is_read_back_as_it_was_saved(tmp_path):
    made_up.mode_content().save(tmp_path)
    again = ModeContent.from_json(read_json(tmp_path / "mode_and_content.json"))
    assert again.rows == made_up.mode_content().rows
    assert json.loads(to_json(again)) == json.loads(to_json(made_up.mode_content()))


def test_the_trade_off_marks_the_chosen_threshold_with_its_intervals():
    table = made_up.guard_table()
    figure = figures.guard_trade_off(table)
    [marked] = [trace for trace in figure.data if trace.name == "chosen, held-out prompts"]
    low, high = table.triggered["heldout"]["ci95"]
    assert marked.x[0] == 0.04 and marked.y[0] == table.policies["guard"].prevented["rate"]
    assert marked.x[0] + marked.error_x.array[0] == pytest.approx(high)
    assert marked.x[0] - marked.error_x.arrayminus[0] == pytest.approx(low)
    [line] = [trace for trace in figure.data if trace.name == "held-out prompts"]
    np.testing.assert_array_equal(line.x, table.curve.heldout_triggered)
    names = {trace.name for trace in figures.guard_trade_off(made_up.guard_table(heldout=False)).data}
    assert "held-out prompts" not in names and "rephrased prompts" in names


def test_the_control_lies_at_the_share_of_all_prompts_that_are_steered():
    figure = figures.guard_trade_off(made_up.guard_table())
    [control] = [trace for trace in figure.data if trace.name == "control: as many at random"]
    assert control.x[0] == pytest.approx((23 + 1 + 2) / (24 + 24 + 50))


def test_mode_and_content_are_drawn_by_depth_for_own_and_other_items():
    figure = figures.mode_and_content(made_up.mode_content())
    recall = [trace for trace in figure.data if trace.name == "exact recall, from its own"]
    assert [list(trace.y) for trace in recall] == [[0, 0, 1 / 24], [1, 0, 0], [1, 0, 1 / 24]]
    assert len(figure.data) == 15


def test_one_position_at_a_time_is_drawn_where_it_was_measured():
    form, recall = figures.mode_by_position(made_up.mode_content()).data
    assert np.array(form.z)[2].tolist() == [0, 0, 0, 1] and np.array(recall.z)[2, 3] == pytest.approx(1 / 24)
    with pytest.raises(SettingsError, match="received one of n_positions=0"):
        figures.mode_by_position(made_up.mode_content(n_positions=0))


def test_figures_have_short_titles_and_named_axes():
    drawn = (
        figures.guard_trade_off(made_up.guard_table()),
        figures.mode_and_content(made_up.mode_content()),
        figures.mode_by_position(made_up.mode_content()),
    )
    for figure in drawn:
        assert len(figure.layout.title.text) <= 48
        named = json.loads(figure.to_json())["layout"]
        assert any(named[axis].get("title", {}).get("text") for axis in named if axis.startswith("xaxis"))


def test_words_say_that_the_answer_position_carries_the_mode_only_where_the_numbers_do():
    mode_alone = " ".join(guard_wording.mode_findings(made_up.mode_content()))
    assert "carries the mode, from whichever item, and not the content" in mode_alone
    both = " ".join(guard_wording.mode_findings(made_up.mode_content(answer_recall=24)))
    assert "carries content" in both and "and not the content" not in both
    alike = guard_wording.mode_findings(made_up.mode_content(one_form=True))
    assert "one form" in alike[0] and not any("take the form" in sentence for sentence in alike)


def test_the_guards_verdict_names_its_cost_where_it_is_known():
    with_cost = guard_wording.guard_verdict(made_up.guard_table())
    assert (
        "95.8\N{NO-BREAK SPACE}%" in with_cost and "Held-out accuracy is 96\N{NO-BREAK SPACE}% unsteered" in with_cost
    )
    assert "Held-out" not in guard_wording.guard_verdict(made_up.guard_table(heldout=False))


def test_a_report_shows_a_guard_and_mode_and_content_where_a_run_has_them(samples, tmp_path):
    run = samples.write_run(tmp_path / "run")
    before = mg.write_report(run).read_text()
    assert 'id="guard"' not in before and 'id="mode"' not in before
    made_up.guard_table().save(run)
    made_up.mode_content().save(run)
    after = mg.write_report(run).read_text()
    for piece in ('id="guard"', 'id="mode"', "plot-guard", "plot-mode", "plot-mode-positions", "as many at random"):
        assert piece in after
    assert "patched &lt;own&gt;" in after and "patched <own>" not in after


def test_a_damaged_guard_file_is_named(samples, tmp_path):
    run = samples.write_run(tmp_path / "run")
    (run / "guard.json").write_text("{}")
    with pytest.raises(mg.MemgenError, match=r"guard\.json"):
        mg.write_report(run)

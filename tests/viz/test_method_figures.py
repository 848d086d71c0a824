"""Figures and page of the benchmark of methods draw what is recorded."""

import made_up
import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.method_records import MethodsBenchmark
from memgen_lens.viz.methods_page import markdown, write_methods_page


def test_recovery_has_a_dot_a_planted_model_and_method_and_the_line_of_chance():
    figure = mg.figures.method_recovery(made_up.methods())
    (dots,) = figure.data
    assert list(dots.y) == ["nmd", "pearson", "random"]
    assert list(dots.x) == pytest.approx([0.9, 0.5, 0.1])
    assert figure.layout.shapes[0].x0 == pytest.approx(0.04)  # 4 of 100
    assert "run &lt;planted&gt;" in dots.name


def test_ablation_has_a_panel_a_kind_with_what_is_left_of_recall_and_of_the_rule():
    figure = mg.figures.method_ablation(made_up.methods())
    assert [note.text for note in figure.layout.annotations] == ["planted (inference, 1)", "ordinary (inference, 1)"]
    curves = [trace for trace in figure.data if trace.name == "nmd"]
    assert len(curves) == 4  # two rows, two panels
    assert list(curves[0].y) == pytest.approx([0.9, 0.5, 0.05, 0.0])
    assert list(curves[1].y) == pytest.approx([1.0, 1.0, 0.98, 0.4])
    random = next(trace for trace in figure.data if trace.name.startswith("random, as many"))
    assert list(random.x) == [1, 2, 4] and list(random.y) == pytest.approx([1.0, 0.95, 0.9])


def test_agreement_is_the_mean_over_models():
    figure = mg.figures.method_agreement(made_up.methods())
    assert list(figure.data[0].x) == ["nmd", "pearson"]
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), [[1.0, 0.3], [0.3, 1.0]])


def test_a_figure_of_nothing_is_refused():
    ordinary = MethodsBenchmark(made_up.methods().models[1:])
    with pytest.raises(mg.MemgenError, match="at least one planted model"):
        mg.figures.method_recovery(ordinary)
    with pytest.raises(mg.MemgenError, match="at least one model"):
        mg.figures.method_ablation(MethodsBenchmark(()))


def test_the_page_escapes_names_and_leaves_out_what_there_is_not(tmp_path):
    page = write_methods_page(made_up.methods(), tmp_path).read_text()
    assert "run &lt;planted&gt;" in page and "run <planted>" not in page
    assert "localized: 4 neurons of post" in page and "distributed</td>" in page
    ordinary = MethodsBenchmark(made_up.methods().models[1:])
    without = write_methods_page(ordinary, tmp_path).read_text()
    assert "average precision" not in without and "plot-recovery" not in without


def test_tables_have_a_row_a_method_with_mean_and_range():
    text = markdown(made_up.methods())
    assert "| nmd | 0.90 | 0.75 | 0.50 | 95% | 98% | 20% | 0.5 | 12 |" in text
    assert "**ordinary (inference, 1 model)**" in text

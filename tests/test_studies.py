"""What the page on switches says is what its table says, and the table is whole."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "studies"))
    try:
        import switch_figures
        import when_is_there_a_switch as runs
    finally:
        sys.path.remove(str(ROOT / "studies"))
    return switch_figures, runs


def test_the_table_has_each_point_three_times_and_no_other(study):
    figures, runs = study
    rows = figures.read()
    assert len(rows) == len(runs.configs([0, 1, 2])) == 222
    points = Counter(tuple(row[name] for name in ("answers", "cue", *figures.BASE)) for row in rows)
    assert set(points.values()) == {3}
    assert len(points) == len(runs.points())


def test_the_pages_tables_are_those_of_the_runs(study):
    figures, _ = study
    page = (ROOT / "docs" / "when_is_there_a_switch.md").read_text()
    lines = figures.tables(figures.read()).splitlines()
    assert [line for line in lines if line and line not in page] == []


def test_every_figure_is_drawn_from_the_table_and_linked(study):
    figures, _ = study
    rows = figures.read()
    assert len(figures.worlds(rows).data) == 6 * 4
    assert {trace.name for trace in figures.factors(rows).data} == set(figures.WORLDS.values())
    assert len(figures.lies(rows).data) == 3 * 4
    page = (ROOT / "docs" / "when_is_there_a_switch.md").read_text()
    drawn = {path.name for path in (ROOT / "docs" / "figures").glob("switch_*.svg")}
    assert len(drawn) == 4
    assert all(f"figures/{name}" in page for name in drawn)


def test_a_difference_of_worlds_is_taken_point_by_point(study):
    figures, _ = study
    rows = [
        figures.BASE
        | {"answers": answers, "cue": "none", "seed": seed, "n_memorized": n, "to_rule": rate, "to_rule_random": 0.0}
        for answers, add in (("apart", 0.5), ("alike", 0.0))
        for seed in (0, 1, 2)
        for n, rate in ((50, 0.2 + add), (100, 0.4 + add + 0.1 * seed * (add > 0)))
    ]
    found = figures.between(rows, ("apart", "none"), ("alike", "none"), "to_rule")
    assert found[0] == pytest.approx(0.5 + 0.05)
    assert found[1] == pytest.approx(4.3027 * 0.05 / 3**0.5, rel=1e-3)
    assert found[2] == 3

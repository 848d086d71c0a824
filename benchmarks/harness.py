"""Run contenders on the same work, each in a process of its own, taking turns; report ratios, memory and agreement.

Does not know what the work is.
"""

import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS_OF_SCALING = Path(__file__).parent / "scaling.json"
TURN_SECONDS = 0.7
"""Work that takes less is repeated until a turn takes about as long."""

Run = Callable[[], Any]
"""Does the work once and returns its answer: numbers or text that all contenders must agree on."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is measured, with its size.
        contenders: By name, a module-level function that prepares the work and returns a `Run`; ours comes first.
        arguments: What each of them is called with.
        rounds: Turns of each contender, after one that is not counted.
        tolerance: Largest difference between the answers (0 = equal); None = answers are not compared.
        flops: Floating-point operations of the work's matrix products, for the floor.
        precision: Precision of these, ``"float32"`` or ``"bfloat16"``.
        threads: Threads of every contender; None = as asked for on the command line.
        turn_seconds: Work that takes less is repeated until a turn takes about as long.
    """

    name: str
    contenders: Mapping[str, Callable[..., Run]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 5
    tolerance: float | None = None
    flops: float | None = None
    precision: str = "float32"
    threads: int | None = None
    turn_seconds: float = TURN_SECONDS


def turns_of(row: Row, *, threads: int, context: Any = None) -> dict[str, list[dict[str, Any]]]:
    """What each contender says of each of its turns, a turn each, round after round.

    Args:
        row: What to measure.
        threads: Threads of a contender, unless the row says so itself.
        context: How processes begin (`multiprocessing.get_context`); default: each from nothing.
    """
    context = context or multiprocessing.get_context("spawn")
    workers = {}
    try:
        for name in row.contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, row, name, row.threads or threads), daemon=True)
            process.start()
            workers[name] = (process, ours)
            _reply(ours, name)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(row.rounds):
            for name, (_, pipe) in workers.items():
                pipe.send("run")
                turns[name].append(_reply(pipe, name))
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(5)
            process.kill()
    return turns


def compare(row: Row, *, threads: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """Measure one row: seconds, peak memory and ratios to ours."""
    turns = turns_of(row, threads=threads)
    first = next(iter(turns))
    seconds = {name: [turn["seconds"] for turn in taken] for name, taken in turns.items()}
    ratios = {
        name: [theirs / ours for theirs, ours in zip(taken, seconds[first], strict=True)]
        for name, taken in seconds.items()
        if name != first
    }
    ours = statistics.median(seconds[first])
    floor = row.flops / rates[row.precision] if row.flops else None
    return {
        "row": row.name,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": {name: {"median": statistics.median(r), "min": min(r), "max": max(r)} for name, r in ratios.items()},
        "peak_mb": {name: max(turn["peak_mb"] for turn in taken) for name, taken in turns.items()},
        "grown_mb": {name: max(turn["grown_mb"] for turn in taken) for name, taken in turns.items()},
        "floor_seconds": floor,
        "share_of_floor": floor / ours if floor else None,
        "agrees": _agreement(row, {name: taken[0]["answer"] for name, taken in turns.items()}),
        "rounds": row.rounds,
    }


def matmul_rates(threads: int) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product, by precision: what no program goes beyond.

    The best of 15, by torch's own product and by oneDNN's.
    """
    import torch

    torch.set_num_threads(threads)
    rates = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(4096, 1024, dtype=getattr(torch, name)) for _ in range(2))
        products = [lambda a=a, b=b: a @ b.T]
        native = name == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if torch.backends.mkldnn.is_available() and native:
            products.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
        taken = []
        for product in products:
            for _ in range(15):
                started = time.perf_counter()
                product()
                taken.append(time.perf_counter() - started)
        rates[name] = 2 * 4096 * 4096 * 1024 / min(taken)
    return rates


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write what was measured as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| work | ours | peer | times ours [min, max] | peak MB, ours / peer | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        ours = next(iter(result["seconds"]))
        share = "" if result["share_of_floor"] is None else f"{result['share_of_floor']:.2f}"
        peers = list(result["ratio"]) or [""]
        for i, peer in enumerate(peers):
            ratio = result["ratio"].get(peer)
            memory = f"{result['peak_mb'][ours]:.0f}" + (f" / {result['peak_mb'][peer]:.0f}" if peer else "")
            cells = [
                result["row"] if i == 0 else "",
                _seconds(result["seconds"][ours]) if i == 0 else "",
                peer,
                f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else "",
                memory,
                share if i == 0 else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _serve(pipe: Any, row: Row, name: str, threads: int) -> None:
    """One contender's process: prepare, run once to warm up, then once for each request."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        at_start = _memory("VmRSS")
        run = row.contenders[name](**row.arguments)
        answer, taken = _timed(run)
        if taken < 4 * row.turn_seconds:  # else it runs once a turn, whatever a second look says
            _, taken = _timed(run)
        repeats = max(1, round(row.turn_seconds / taken))
        pipe.send({"ready": True})
        while pipe.recv() == "run":
            before = _reset_peak()
            if len(row.contenders) > 1:
                run()  # not counted: the other contenders have had the caches
            started, processor = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                answer = run()
            seconds, processor = (time.perf_counter() - started) / repeats, (time.process_time() - processor) / repeats
            peak = _memory("VmHWM")
            memory = {"peak_mb": peak, "grown_mb": peak - before, "held_mb": peak - at_start}
            pipe.send({"seconds": seconds, "processor_seconds": processor, "answer": answer} | memory)
    except EOFError:
        return
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def _timed(run: Run) -> tuple[Any, float]:
    started = time.perf_counter()
    answer = run()
    return answer, time.perf_counter() - started


def _reply(pipe: Any, name: str) -> dict[str, Any]:
    try:
        reply = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name!r} ended") from None
    if "error" in reply:
        raise RuntimeError(f"{name}: {reply['error']}")
    return reply


def _reset_peak() -> float:
    """Begin a new peak of resident memory (Linux); returns what is resident now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _agreement(row: Row, answers: dict[str, Any]) -> bool | None:
    if row.tolerance is None:
        return None
    first, *others = (np.asarray(answer) for answer in answers.values())
    if first.dtype.kind in "fiu":
        return all(bool(np.allclose(first, other, rtol=0, atol=row.tolerance)) for other in others)
    return all(bool(np.array_equal(first, other)) for other in others)

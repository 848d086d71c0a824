"""``python -m benchmarks [PART ...]``: measure, print the table, write JSON; ``--help`` lists the parts."""

import argparse
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import (
    attribution,
    causal,
    many,
    null,
    paper,
    pretrained,
    probes,
    scaling,
    startup,
    steering,
    training,
    tuning,
    waiting,
)
from benchmarks.harness import compare, matmul_rates, table, write_results
from memgen_lens.core.run_directory import processor

ROWS = {
    "training": training.rows,
    "attribution": attribution.rows,
    "causal": causal.rows,
    "steering": steering.rows,
    "probes": probes.rows,
    "pretrained": pretrained.rows,
    "tuning": tuning.rows,
}
OTHERS = ("waiting", "startup", "null", "many")
BY_NAME = ("scaling",)
"""Some twelve minutes, and a file of its own: run only where it is asked for."""


def main() -> None:
    """Measure the chosen parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[*ROWS, *OTHERS, *BY_NAME, []],
        help="default: all but scaling (some twelve minutes with one thread; writes scaling.json), which stands alone",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    chosen = parser.parse_args()
    parts = chosen.parts or [*ROWS, *OTHERS]
    if "scaling" in parts:
        if len(parts) > 1:
            parser.error("scaling is measured by itself: no other part beside it")
        found = scaling.measure()
        print(scaling.written(found))
        print(scaling.tables(found), paper.report(found), sep="\n\n")
        return
    if parts == ["null"]:  # no timing: nothing of the machine matters
        print(null.measure())
        return
    if parts == ["many"]:  # backends against each other, and none of them a matrix product
        print(many.table(many.measure()))
        return
    rates = matmul_rates(chosen.threads)
    print("matrix products:", ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in rates.items()))
    results, waits, neighbours, of_many = [], [], [], {}
    for part in parts:
        if part == "startup":
            waits = startup.measure()
            for wait in waits:
                print(f"{wait['command']}: {wait['median']:.2f} s [{wait['min']:.2f}, {wait['max']:.2f}]")
            continue
        if part == "null":
            print(null.measure(), flush=True)
            continue
        if part == "many":
            of_many = many.measure()
            print(many.table(of_many), flush=True)
            continue
        if part == "waiting":
            neighbours = waiting.measure(threads=chosen.threads)
            print(waiting.table(neighbours), flush=True)
            continue
        for row in ROWS[part]():
            results.append(compare(row, threads=chosen.threads, rates=rates))
            print(table(results[-1:]), f"\nagrees: {results[-1]['agrees']}\n", flush=True)
    write_results(
        chosen.out,
        {
            "date": str(date.today()),
            "processor": processor(),
            "threads": chosen.threads,
            "versions": {name: version(name) for name in ("memgen-lens", "torch", "transformer-lens", "transformers")}
            | {"python": platform.python_version()},
            "matmul_flops_per_second": rates,
            "rows": results,
            "startup": waits,
            "waiting": neighbours,
            "many": of_many,
        },
    )
    print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()

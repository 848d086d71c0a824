"""Training with and without a busy neighbour, under each way for torch's threads to wait, in processes of their own.

The neighbour is a Python process that does nothing but spin; it is started and ended here.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memgen_lens.core.threads import USERS_OWN

POLICIES = {
    "ours": ("import memgen_lens", {}),
    "unset": ("import torch, memgen_lens", {}),  # torch first: nothing is set
    "OMP_WAIT_POLICY=PASSIVE": ("import memgen_lens", {"OMP_WAIT_POLICY": "PASSIVE"}),
}
TRAIN = """
import tempfile, time
import memgen_lens as mg
preset = mg.presets["quickstart"]
config = preset.train.but(max_steps={steps}, device="cpu")
from memgen_lens.training import train
import torch
torch.set_num_threads({threads})
with tempfile.TemporaryDirectory() as directory:
    started = time.perf_counter()
    train(preset.task, config, out=directory + "/run", progress=False)
    print(time.perf_counter() - started)
"""


def measure(*, threads: int, steps: int = 200, rounds: int = 3) -> list[dict[str, Any]]:
    """Seconds of the quickstart's first steps under each policy, alone and beside a spinning process, taking turns."""
    taken: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for busy in (False, True):
            for name in POLICIES:
                with neighbour(busy):
                    taken.setdefault((name, busy), []).append(_seconds(name, steps, threads))
    alone = statistics.median(taken["unset", False])
    return [
        {
            "policy": name,
            "neighbour": busy,
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "times_unset_alone": statistics.median(seconds) / alone,
            "steps": steps,
        }
        for (name, busy), seconds in taken.items()
    ]


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """One process that spins while the block runs, where ``busy``; ended also after an exception."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def table(found: list[dict[str, Any]]) -> str:
    """What was measured as a Markdown table."""
    lines = ["| threads wait | neighbour | seconds [min, max] | times unset, alone |", "|---|---|---|---|"]
    for row in found:
        seconds = f"{row['median']:.2f} [{row['min']:.2f}, {row['max']:.2f}]"
        beside = "one spinning process" if row["neighbour"] else "none"
        lines.append(f"| {row['policy']} | {beside} | {seconds} | {row['times_unset_alone']:.2f} |")
    return "\n".join(lines)


def _seconds(name: str, steps: int, threads: int) -> float:
    first, settings = POLICIES[name]
    environment = {key: value for key, value in os.environ.items() if key not in USERS_OWN} | settings
    code = first + TRAIN.format(steps=steps, threads=threads)
    command = [sys.executable, "-W", "ignore", "-c", code]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(ran.stdout.split()[-1])

"""What a user waits for: importing, `--help`, and the whole quickstart, each in a process of its own."""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COMMANDS = {
    "import memgen_lens": [sys.executable, "-c", "import memgen_lens"],
    "import transformer_lens": [sys.executable, "-W", "ignore", "-c", "import transformer_lens"],
    "memgen-lens --help": [str(Path(sys.executable).parent / "memgen-lens"), "--help"],
}


def measure(*, rounds: int = 7) -> list[dict[str, Any]]:
    """Seconds of each command, taking turns, and of one whole quickstart."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken[name].append(_seconds(command))
    found = [
        {"command": name, "median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in taken.items()
    ]
    with TemporaryDirectory() as directory:
        command = [COMMANDS["memgen-lens --help"][0], "run", "quickstart", "--out", f"{directory}/run"]
        seconds = _seconds(command)
    return [*found, {"command": "memgen-lens run quickstart", "median": seconds, "min": seconds, "max": seconds}]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started

"""How far this process's memory grows while something runs.

Does not know what runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Inside the ``with`` block, the most that the memory of this process grows.

    Linux keeps the most that a process has held, and forgets it when told to.

    Yields:
        A function that gives it in MB, up to the end of the block; None where the system does not tell.
    """
    start = _held("VmRSS") if _forget() else None
    peak: list[float | None] = []

    def grown() -> float | None:
        held = peak[0] if peak else _held("VmHWM")
        return None if start is None or held is None else max(0.0, held - start)

    try:
        yield grown
    finally:
        peak.append(_held("VmHWM"))


def _forget() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _held(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(name)), None)

"""One way to show progress: a bar for what takes longer than two seconds.

Does not know what is counted.
"""

from typing import Any

from memgen_lens.core.quiet import quiet_imports

PATIENCE_S = 2.0
"""Seconds that pass before a bar appears."""


def progress_bar(total: int, what: str, *, shown: bool, unit: str = "prompt") -> Any:
    """A tqdm bar that appears after two seconds and leaves nothing behind.

    Args:
        total: Things to be done.
        what: What is done to them, in a word or two.
        shown: Whether there is a bar at all.
        unit: What is counted.
    """
    with quiet_imports():
        from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit=unit, disable=not shown, delay=PATIENCE_S, leave=False)

"""The errors a user can cause, each saying the call, what was expected, what came, and the way out.

Does not cover our own invariants: those are plain ``assert``.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class MemgenError(ValueError):
    """Base of every error that a user of memgen_lens can cause and mend.

    Args:
        call: The call or place that refused, e.g. ``"record(sites=...)"``.
        expected: What would have been accepted.
        received: What came instead.
        fix: What to change.
    """

    def __init__(self, call: str, *, expected: str, received: str, fix: str) -> None:
        self.call, self.expected, self.received, self.fix = call, expected, received, fix
        super().__init__(f"{call}: expected {expected}; received {received}. {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by its parts: by default the message alone would be handed to ``__init__``."""
        return _made_again, (type(self), self.call, self.expected, self.received, self.fix), self.__dict__


class SettingsError(MemgenError):
    """A setting is unknown, out of range, or at odds with another."""


class TaskError(MemgenError):
    """A designed task cannot be made, or a text is not one of its own."""


class ModelError(MemgenError):
    """A model lacks what the call needs: a device, a tokenizer, a character, a finite loss."""


class SiteError(MemgenError):
    """A hook point is unknown, or the model does not have it."""


class PairsError(MemgenError):
    """Prompt pairs are empty, ragged, too few, or of one class only."""


class RunDirectoryError(MemgenError):
    """A run directory holds something already, is damaged, or cannot be written."""


class ProcessError(MemgenError):
    """One of the several processes of a run has died, or has failed."""


def shortened(value: Any, *, length: int = 80) -> str:
    """A value as an error shows it: its repr, cut; its type where that fails."""
    try:
        text = repr(value)
    except Exception:  # a user's own class may fail to say what it is; that must not hide what is wrong
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _made_again(kind: type[MemgenError], call: str, expected: str, received: str, fix: str) -> MemgenError:
    """An error of any kind, whatever its own ``__init__`` takes; its further fields follow."""
    error = kind.__new__(kind)
    MemgenError.__init__(error, call, expected=expected, received=received, fix=fix)
    return error


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the known names nearest to ``name``, or all of them where none is near.

    >>> suggest("resid_pots", ["resid_pre", "resid_post"])
    'Did you mean resid_post or resid_pre?'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known)}." if known else "None are known."

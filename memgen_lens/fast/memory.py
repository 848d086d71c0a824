"""Keep freed memory for the next step, where the C library would hand it back and take it anew each time.

Does not know tensors.
"""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_THRESHOLD = 32 << 20
"""Bytes; beyond it glibc takes every block from the system, whatever it is told."""

_lock = threading.Lock()
_inside = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the ``with`` block memory that is freed stays with the process; at its end it goes back to the system.

    A training step frees some hundred megabytes and takes them again. glibc hands them back in between, and the
    system clears every page anew: a tenth of a step. Where the C library is another one, nothing is done.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _set(trim=(1 << 31) - 1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(trim=2 * LARGEST_THRESHOLD)  # what glibc itself comes to after large blocks
                _trim()


def _set(*, trim: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, trim)


def _trim() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

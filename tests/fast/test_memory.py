"""Freed memory is kept inside the block, however often it is entered, and handed back behind it."""

import platform
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from memgen_lens.fast import memory
from memgen_lens.fast.memory import LARGEST_THRESHOLD, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, freed_memory_kept

ENTERED = [("mallopt", M_MMAP_THRESHOLD, LARGEST_THRESHOLD), ("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)]
LEFT = [
    ("mallopt", M_MMAP_THRESHOLD, LARGEST_THRESHOLD),
    ("mallopt", M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD),
    ("malloc_trim", 0),
]


class Library:
    """Writes down what the C library is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: self.calls.append((name, *arguments)) or 1


@pytest.fixture
def calls(monkeypatch):
    """What glibc is asked for, in place of the C library that is here."""
    library = Library()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    return library.calls


def test_the_library_is_told_at_the_beginning_and_at_the_end(calls):
    with freed_memory_kept():
        assert calls == ENTERED
    assert calls == ENTERED + LEFT


def test_blocks_nest_and_only_the_outermost_tells_the_library(calls):
    with freed_memory_kept():
        for _ in range(2):
            with freed_memory_kept(), freed_memory_kept():
                assert calls == ENTERED
            assert calls == ENTERED
    assert calls == ENTERED + LEFT
    with freed_memory_kept():
        assert calls == ENTERED + LEFT + ENTERED
    assert calls == 2 * (ENTERED + LEFT)


def test_after_an_exception_memory_is_handed_back_again(calls):
    with pytest.raises(RuntimeError, match="inside"), freed_memory_kept():
        with pytest.raises(ValueError, match="deeper"), freed_memory_kept():
            raise ValueError("deeper")
        assert calls == ENTERED
        raise RuntimeError("inside")
    assert calls == ENTERED + LEFT
    assert memory._inside == 0


def test_the_last_of_two_threads_to_leave_hands_memory_back(calls):
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with freed_memory_kept():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with freed_memory_kept():
        thread.start()
        assert inside.wait(10)
    assert calls == ENTERED, "the other thread is still inside"
    leave.set()
    thread.join(10)
    assert not thread.is_alive() and calls == ENTERED + LEFT


def test_threads_that_come_and_go_leave_nothing_behind(calls):
    start = threading.Barrier(4)

    def often() -> None:
        start.wait(10)
        for _ in range(50):
            with freed_memory_kept():
                assert memory._inside >= 1

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert memory._inside == 0
    rounds = calls.count(("malloc_trim", 0))
    assert rounds >= 1 and calls == rounds * (ENTERED + LEFT)


@pytest.mark.parametrize("library", [("", ""), ("musl", "1.2.4")])
def test_where_the_c_library_is_another_one_nothing_is_done(monkeypatch, library):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: library)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the C library was opened"))
    with freed_memory_kept(), freed_memory_kept():
        pass
    with pytest.raises(RuntimeError, match="inside"), freed_memory_kept():
        raise RuntimeError("inside")
    assert memory._inside == 0


COUNT_PAGES = """
import ctypes, resource, runpy, sys

memory = runpy.run_path(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def pages_taken():
    counts = []
    for _ in range(6):
        block = libc.malloc(24 << 20)
        libc.memset(block, 1, 24 << 20)
        libc.free(block)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[0]

before = pages_taken()
with memory["freed_memory_kept"]():
    inside = pages_taken()
print(before, inside)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_large_block_is_used_again_inside_where_the_library_would_take_it_anew():
    """Six blocks of 24 MB one after the other, each filled and freed, in a process of their own."""
    found = subprocess.run(
        [sys.executable, "-I", "-c", COUNT_PAGES, memory.__file__],
        env={"MALLOC_MMAP_THRESHOLD_": str(128 << 10)},  # glibc's own, before it has seen large blocks
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, inside = map(int, found.stdout.split())
    # Five times 24 MB are 30,720 pages of 4 kB, or 60 of 2 MB.
    assert inside < 25 < 5 * 11 < before, (before, inside)

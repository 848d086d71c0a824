"""Errors go through pickle, copies and process pools whole."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from memgen_lens.core.errors import MemgenError

PARTS = {"expected": "x below 2", "received": "3", "fix": "Lower x."}


def kinds(base: type[MemgenError] = MemgenError) -> list[type[MemgenError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


def make(kind: type[MemgenError]) -> MemgenError:
    error = kind("f(x=3)", **PARTS)
    error.add_note("seen on a Monday")
    error.__cause__ = KeyError("x")
    error.extra = [1, 2]  # type: ignore[attr-defined]
    return error


def assert_whole(found: BaseException, kind: type[MemgenError]) -> None:
    assert type(found) is kind
    assert str(found) == "f(x=3): expected x below 2; received 3. Lower x."
    assert (found.call, found.expected, found.received, found.fix) == ("f(x=3)", *PARTS.values())
    assert found.__notes__ == ["seen on a Monday"] and found.extra == [1, 2]


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_error_is_pickled_and_copied_whole(kind):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_whole(pickle.loads(pickle.dumps(make(kind), protocol)), kind)
    assert_whole(copy.copy(make(kind)), kind)
    assert_whole(copy.deepcopy(make(kind)), kind)


def _fail(kind: type[MemgenError]) -> None:
    raise make(kind)


def test_every_kind_of_error_comes_out_of_process_pools_whole():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        for kind in kinds():
            assert_whole(pool.submit(_fail, kind).exception(timeout=100), kind)
    with spawn.Pool(1) as pool:
        for kind in kinds():
            with pytest.raises(MemgenError) as caught:
                pool.apply_async(_fail, (kind,)).get(timeout=100)
            assert_whole(caught.value, kind)

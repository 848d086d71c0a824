"""Files are written whole or not at all, and read back as they were."""

import dataclasses
import json
import math
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import SafetensorError

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import (
    read_arrays,
    read_json,
    read_jsonl,
    read_text,
    to_json,
    write_arrays,
    write_json,
    write_jsonl,
    write_text,
)
from memgen_lens.core.ownership import LEDGER
from memgen_lens.core.types import Behavior

quick = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
arrays = npst.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_]),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@dataclasses.dataclass(frozen=True)
class Inner:
    values: np.ndarray
    path: Path


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    behavior: Behavior
    share: np.float32


def folder_holds(folder: Path) -> list[str]:
    """Names of its files, our ledger of them aside."""
    return sorted(path.name for path in folder.iterdir() if path.name != LEDGER)


def test_json_holds_dataclasses_arrays_numbers_of_numpy_and_paths():
    value = Outer(Inner(np.array([[1, 2]]), Path("a/b")), Behavior.OTHER, np.float32(0.5))
    assert json.loads(to_json([value, np.int64(3), np.bool_(True)])) == [
        {"inner": {"values": [[1, 2]], "path": "a/b"}, "behavior": "other", "share": 0.5},
        3,
        True,
    ]


def test_json_refuses_what_it_has_no_form_for():
    with pytest.raises(TypeError, match="no JSON form for complex"):
        to_json({"x": 1j})
    with pytest.raises(TypeError, match="no JSON form for type"):
        to_json(Outer)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        np.float32("nan"),
        np.array([1.0, math.inf]),
        Outer(Inner(np.array([math.nan]), Path("a")), Behavior.OTHER, np.float32(0)),
    ],
)
def test_nan_and_infinity_are_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "x.jsonl", [1, value])
    assert folder_holds(tmp_path) == []


@quick
@given(json_values)
def test_json_is_read_back_as_it_was_written(tmp_path, value):
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert folder_holds(tmp_path) == ["value.json"]


@quick
@given(st.lists(json_values, max_size=5))
def test_json_lines_are_read_back_as_they_were_written(tmp_path, rows):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == len(rows)


def test_json_lines_keep_characters_that_python_takes_for_ends_of_lines(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\x85d\x0be\x1cf"}, {"prompt": "g"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


@quick
@given(st.dictionaries(st.text("abc._0", min_size=1), arrays, max_size=4))
def test_arrays_are_read_back_as_they_were_written(tmp_path, named):
    write_arrays(tmp_path / "x.safetensors", named)
    again = read_arrays(tmp_path / "x.safetensors")
    assert set(again) == set(named)
    for name, array in named.items():
        assert again[name].dtype == array.dtype
        assert again[name].shape == array.shape
        np.testing.assert_array_equal(again[name], array)


def test_arrays_of_any_memory_layout_are_read_back_with_their_values(tmp_path):
    base = np.arange(24.0).reshape(2, 3, 4)
    views = {"transposed": base.T, "strided": base[:, ::2], "reversed": base[::-1], "fortran": np.asfortranarray(base)}
    write_arrays(tmp_path / "x.safetensors", views)
    for name, array in read_arrays(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(array, views[name])


def test_missing_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "x.json", 1)
    write_arrays(tmp_path / "c" / "d" / "x.safetensors", {"x": np.ones(2)})
    assert read_json(tmp_path / "a" / "b" / "x.json") == 1
    assert read_arrays(tmp_path / "c" / "d" / "x.safetensors")["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("write", "bad"),
    [
        (write_json, {"fine": 1, "bad": object()}),
        (write_jsonl, [{"fine": 1}, object()]),
        (write_arrays, {"fine": np.ones(2), "bad": np.array([object()])}),
    ],
)
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, write, bad):
    path = tmp_path / "file"
    write_text(path, "the old content")
    with pytest.raises((TypeError, ValueError, SafetensorError)):
        write(path, bad)
    assert path.read_text() == "the old content"
    assert folder_holds(tmp_path) == ["file"]


def test_rows_that_fail_while_they_are_made_leave_the_old_file_whole(tmp_path):
    def rows():
        yield {"fine": 1}
        raise RuntimeError("the second row is not there")

    write_jsonl(tmp_path / "rows.jsonl", [1])
    with pytest.raises(RuntimeError, match="the second row"):
        write_jsonl(tmp_path / "rows.jsonl", rows())
    assert read_jsonl(tmp_path / "rows.jsonl") == [1]


@pytest.mark.parametrize(
    ("write", "value"),
    [
        (write_text, "x" * 5000),
        (write_json, list(range(5000))),
        (write_jsonl, list(range(5000))),
        (write_arrays, {"x": np.ones(5000)}),
    ],
)
def test_a_disk_that_is_full_is_an_error_of_ours_and_leaves_the_old_file_whole(tmp_path, write, value):
    path = tmp_path / "file"
    write_text(path, "the old content")
    with helpers.no_file_beyond(1000), pytest.raises(RunDirectoryError, match="a place that can be written; received"):
        write(path, value)
    assert path.read_text() == "the old content"


def test_a_reader_never_sees_a_part_of_a_file(tmp_path, monkeypatch):
    seen = []
    replace = Path.replace

    def spy(self, target):
        seen.append((Path(target).read_text(), self.read_text()))
        return replace(self, target)

    write_text(tmp_path / "x.txt", "old")
    monkeypatch.setattr(Path, "replace", spy)
    write_text(tmp_path / "x.txt", "new")
    assert seen == [("old", "new")]
    assert read_text(tmp_path / "x.txt") == "new"


@pytest.mark.parametrize(
    ("write", "value"), [(write_json, 1), (write_jsonl, [1]), (write_arrays, {"x": np.ones(1)}), (write_text, "x")]
)
def test_a_place_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path, write, value):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(
            RunDirectoryError, match=r"expected a place that can be written; received .*--out"
        ) as caught:
            write(path, value)
        assert caught.value.call == f"writing {path}"


@pytest.mark.parametrize("read", [read_json, read_jsonl, read_arrays, read_text])
def test_a_missing_file_is_an_error_with_a_way_out(tmp_path, read):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "folder", tmp_path / "file" / "below"):
        message = "expected a file of a complete run; received no such file. Check .* --force"
        with pytest.raises(RunDirectoryError, match=message) as caught:
            read(path)
        assert caught.value.call == f"reading {path}"


@pytest.mark.parametrize("read", [read_json, read_jsonl, read_text])
def test_a_file_that_may_not_be_read_is_an_error_of_ours(tmp_path, monkeypatch, read):
    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    ("read", "content", "what"),
    [
        (read_json, b'{"a": 1,\n "b"', "not JSON at line 2"),
        (read_json, b"", "not JSON at line 1"),
        (read_json, b"\xff\xfe", "not UTF-8 text"),
        (read_jsonl, b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (read_jsonl, b'{"a": 1}\n\n{"a": 2}\n', "line 2 is not JSON"),
        (read_arrays, b"", "header too small"),
        (read_arrays, b"\x00" * 100, ".*"),
        (read_arrays, b"not a safetensors file at all", "header"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_where(tmp_path, read, content, what):
    (tmp_path / "x").write_bytes(content)
    message = f"expected a whole file of a memgen_lens run; received .*{what}.*The file is damaged: restore it"
    with pytest.raises(RunDirectoryError, match=message):
        read(tmp_path / "x")


def test_a_cut_off_array_file_is_damaged_wherever_it_is_cut(tmp_path):
    write_arrays(tmp_path / "x", {"x": np.arange(50.0)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(RunDirectoryError, match="The file is damaged"):
            read_arrays(tmp_path / "x")

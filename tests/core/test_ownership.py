"""No file is overwritten or removed that this package did not write."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import user_path, write_json, write_text
from memgen_lens.core.ownership import LEDGER, all_ours, is_ours, read_ledger, remove_ours, replacing, sweep


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LEDGER}


def test_a_file_is_ours_until_somebody_changes_it(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    assert is_ours(path)
    write_json(path, {"a": 2})
    assert is_ours(path)
    path.write_text('{"a": 2, "note": "mine"}')
    assert not is_ours(path)
    with pytest.raises(
        RunDirectoryError, match=r"received .*metrics.json, which it did not write, or .* Move or rename"
    ):
        write_json(path, {"a": 3})
    assert "mine" in path.read_text() and names(tmp_path) == {"metrics.json"}


def test_a_file_that_was_there_before_is_not_ours_whatever_its_name(tmp_path):
    for name in ("config.json", "report.html", "history.jsonl", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(RunDirectoryError, match=f"{name}, which it did not write"):
            write_text(tmp_path / name, "ours")
        assert (tmp_path / name).read_text() == "{}"


def test_a_link_is_not_ours_and_neither_it_nor_its_target_is_touched(tmp_path):
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "x.json").symlink_to(tmp_path / "target")
    with pytest.raises(RunDirectoryError, match="which it did not write"):
        write_json(tmp_path / "x.json", 1)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="which it did not write"):
        write_json(tmp_path / "gone.json", 1)
    assert (tmp_path / "x.json").is_symlink() and (tmp_path / "target").read_text() == "theirs"


@pytest.mark.parametrize("size", [0, 10, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_change_at_either_end_or_of_the_length_is_seen_at_any_size(tmp_path, size):
    path = tmp_path / "x"
    write_text(path, "a" * size)
    content = path.read_bytes()
    for changed in (b"b" + content[1:], content[:-1] + b"b", content + b"a"):
        path.write_bytes(changed)
        assert not is_ours(path)
        path.write_bytes(content)
        assert is_ours(path)


def test_a_process_killed_between_ledger_and_file_leaves_either_of_ours(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        write_text(path, "new")
    assert path.read_text() == "old" and is_ours(path)
    path.write_text("new")
    assert is_ours(path)
    write_text(path, "newer")


def test_a_cut_or_foreign_line_of_the_ledger_spoils_no_other(tmp_path):
    write_text(tmp_path / "x", "1")
    with (tmp_path / LEDGER).open("a") as file:
        file.write('\n{"name": "y", "finger')
    write_text(tmp_path / "z", "2")
    with (tmp_path / LEDGER).open("a") as file:
        file.write('\n[]\nnull\n"x"\n{"name": 3}\n')
    assert is_ours(tmp_path / "x") and is_ours(tmp_path / "z")
    assert set(read_ledger(tmp_path)) >= {"x", "z"}


def test_removing_takes_ours_and_leaves_theirs_with_the_folders_that_hold_them(tmp_path):
    for name in ("model/config.json", "model/deep/x", "scores/a", "b"):
        write_text(tmp_path / "run" / name, "ours")
    (tmp_path / "run" / "model" / "notes.txt").write_text("theirs")
    (tmp_path / "run" / "src").mkdir()
    (tmp_path / "run" / "c").write_text("theirs")
    assert not all_ours(tmp_path / "run" / "model") and all_ours(tmp_path / "run" / "scores")
    remove_ours(tmp_path / "run", ["model", "scores", "b", "c", "not there"])
    assert names(tmp_path / "run") == {"model", "src", "c"}
    assert names(tmp_path / "run" / "model") == {"notes.txt"}


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(tmp_path):
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("1")
        left = temporary.name
    (tmp_path / left).write_text("half")
    (tmp_path / ".x.part").write_text("theirs")
    sweep(tmp_path)
    assert names(tmp_path) == {"x", ".x.part"}


def _write(path: Path) -> None:
    for _ in range(20):
        write_text(path, path.name)


def test_processes_that_write_into_one_folder_at_once_lose_no_line_of_the_ledger(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path / f"f{number}",)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(is_ours(tmp_path / f"f{number}") for number in range(2))


@pytest.mark.parametrize("path", ["", "  ", "a\0b", None, 3, b"x", "~nobody-of-this-name/x"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(RunDirectoryError, match=r"^f\(out=...\): expected a path.*'\.' is the present one"):
        user_path(path, call="f(out=...)")


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/a", call="f") == tmp_path / "runs" / "a"
    assert user_path(Path("~"), call="f") == tmp_path
    assert user_path("a/~", call="f") == Path("a/~")


def test_a_path_with_bytes_that_are_no_text_is_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "x.json", {"directory": name})
    assert json.loads((tmp_path / "x.json").read_text()) == {"directory": name}

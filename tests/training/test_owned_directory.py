"""A user's own files in a run directory outlive training, with and without force; two runs never share one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.run_directory import LOCK

TASK, CONFIG = helpers.tiny_task(), helpers.tiny_training(max_steps=10)


def train(out, **how):
    return mg.train(TASK, CONFIG, out=out, progress=False, **how)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def done(tmp_path) -> Path:
    return train(tmp_path / "run").out


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}])
def test_files_of_the_users_outlive_training_beside_them(tmp_path, how):
    for name in ("model/notes.txt", "src/main.py", "checkpoints/mine/step-000099", "model/weights.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    train(tmp_path, **how)
    if how:
        train(tmp_path, **how)  # over a run of ours
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    mg.load_model(tmp_path / "model")


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}])
@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors", "history.jsonl"])
def test_a_file_of_the_users_where_ours_would_be_is_named_and_nothing_is_touched(tmp_path, name, how):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(RunDirectoryError, match=f"{name}, which it did not write.*Move or rename that file"):
        train(tmp_path, **how)
    assert contents(tmp_path) == {path: b""}


def test_force_refuses_a_changed_file_before_anything_is_removed(done):
    path = done / "model" / "config.json"
    path.write_text(path.read_text() + "\n")
    before = contents(done)
    with pytest.raises(RunDirectoryError, match=r"model/config.json, which .* or which was changed since"):
        train(done, force=True)
    assert contents(done) == before


@pytest.mark.parametrize("how", [{"force": True}, {"resume": True}])
def test_a_run_of_an_earlier_version_without_ledgers_is_gone_on_with_or_begun_anew(done, how):
    for ledger in done.rglob(".memgen_lens.jsonl"):
        ledger.unlink()
    weights = (done / "model" / "model.safetensors").read_bytes()
    with pytest.raises(RunDirectoryError, match="one that holds a run already"):
        train(done)
    train(done, **how)
    assert (done / "model" / "model.safetensors").read_bytes() == weights


def test_an_empty_directory_name_is_refused_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match="expected a path; received ''"):
        train("")
    assert list(tmp_path.iterdir()) == []
    assert train("~/run").out == tmp_path / "run"
    assert mg.load_model("~/run/model").cfg.n_layers == 1


HOLD = """
import sys, time
from pathlib import Path
from memgen_lens.core.run_directory import alone_in
with alone_in(Path(sys.argv[1]), call="hold"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_run_into_a_directory_is_refused_until_the_first_has_ended_or_is_killed(tmp_path):
    root = Path(mg.__file__).parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for how in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(RunDirectoryError, match="one that another process is writing into now"):
                train(tmp_path / "run", **how)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    time.sleep(0.1)
    assert (tmp_path / "run" / LOCK).exists()
    train(tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()

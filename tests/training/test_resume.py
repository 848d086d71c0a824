"""A run that is cut and resumed ends like one that never was."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file

import memgen_lens as mg
from memgen_lens.core.errors import MemgenError, RunDirectoryError
from memgen_lens.core.files import read_json, read_jsonl, write_json, write_jsonl
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.trainer import train

TASK = helpers.tiny_task()
CONFIG = helpers.tiny_training(max_steps=70)
"""Measured at 20, 40, 60, 70; kept at 10, 20, ... 70, so that some checkpoints lie between two measurements."""

SCRIPT = """
    # Told to go on until it is killed; says "loaded" once a saved model has been loaded and asked.
    import sys, time
    import helpers, memgen_lens as mg, torch
    from memgen_lens.training import loop

    torch.set_num_threads(1)
    model = mg.load_model(sys.argv[2])
    print(mg.complete(model, ["1+2="], max_new_tokens=2) and "loaded", flush=True)
    step = loop.take_step

    def slow_step(*arguments):
        time.sleep(0.02)  # so that it can be killed in the middle
        return step(*arguments)

    loop.take_step = slow_step
    mg.train(helpers.tiny_task(), helpers.tiny_training(max_steps=70), out=sys.argv[1], progress=False)
"""


@pytest.fixture(scope="module")
def uncut(tmp_path_factory) -> Path:
    """The directory of a run that was never cut; tests must not change it."""
    with helpers.one_thread():
        return train(TASK, CONFIG, out=tmp_path_factory.mktemp("uncut") / "run", progress=False).out


def cut_at(step: int, uncut: Path, out: Path) -> Path:
    """The uncut run as it was after ``step``: checkpoints and lines up to there, and no model."""
    shutil.copytree(uncut, out)
    shutil.rmtree(out / "model")
    for folder in list_checkpoints(out / "checkpoints"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    write_jsonl(out / "history.jsonl", [row for row in read_jsonl(out / "history.jsonl") if row["step"] <= step])
    return out


def resume(out: Path, **settings):
    return train(TASK, CONFIG.but(**settings), out=out, resume=True, progress=False)


def rows_of(out: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_jsonl(out / "history.jsonl")
    ]


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights bit for bit, last checkpoint bit for bit, history but for the seconds."""
    assert (found / "model" / "model.safetensors").read_bytes() == (
        expected / "model" / "model.safetensors"
    ).read_bytes()
    assert rows_of(found) == rows_of(expected)
    for name in ("weights", "optimizer"):
        one, other = (
            load_file(out / "checkpoints" / "step-000070" / f"{name}.safetensors") for out in (found, expected)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, uncut) -> tuple[Path, str, str]:
    """A run killed with SIGKILL after its third checkpoint: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("killed") / "run"
    # Deprecation warnings are shown, as they are in a notebook and in a main script.
    shell = [sys.executable, "-W", "default::DeprecationWarning", "-W", "default::FutureWarning"]
    process = subprocess.Popen(
        [*shell, "-c", textwrap.dedent(SCRIPT), str(out), str(uncut / "model")],
        cwd=Path(helpers.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(12_000):
            if len(list_checkpoints(out / "checkpoints")) >= 3 or process.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        output, complaints = process.communicate()
    assert process.returncode == -signal.SIGKILL, complaints
    return out, output, complaints


def test_a_run_that_is_killed_in_the_middle_and_resumed_ends_with_the_same_weights_bit_for_bit(tmp_path, uncut, killed):
    out = tmp_path / "run"
    shutil.copytree(killed[0], out)
    assert 3 <= len(list_checkpoints(out / "checkpoints")) < 7
    assert not (out / "model").exists()

    resumed = resume(out)

    assert_same_run(out, uncut)
    assert resumed.stop_reason == "no steps left after 70"
    again = mg.load_model(out / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), resumed.model.parameters(), strict=True))
    assert not list(out.rglob(".*.part"))


def test_no_warning_or_note_of_transformer_lens_reaches_a_user_who_loads_completes_and_trains(killed):
    _, output, complaints = killed
    assert output == "loaded\n"
    assert complaints == ""


@pytest.mark.parametrize("step", [0, 10, 20, 30, 60])
def test_a_run_cut_after_any_checkpoint_ends_the_same(tmp_path, uncut, step):
    out = cut_at(step, uncut, tmp_path / "run")
    resume(out)
    assert_same_run(out, uncut)


def test_a_finished_run_is_not_trained_on(tmp_path, uncut, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(uncut, out)
    monkeypatch.setattr("memgen_lens.training.loop.take_step", lambda *a: pytest.fail("it trained on"))
    resumed = resume(out)
    assert_same_run(out, uncut)
    assert resumed.stop_reason == "no steps left after 70"
    assert [row.step for row in resumed.history] == [20, 40, 60, 70]


def test_a_run_that_stopped_at_its_targets_stays_stopped(tmp_path):
    config = CONFIG.but(target_generalization=0.0, target_memorization=0.0)
    first = train(TASK, config, out=tmp_path / "run", progress=False)
    resumed = train(TASK, config, out=tmp_path / "run", resume=True, progress=False)
    assert resumed.stop_reason == first.stop_reason == "both targets reached at step 20"
    assert resumed.history == first.history


def test_resume_without_a_former_run_begins_one(tmp_path, uncut):
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", uncut)


def test_lines_written_after_the_newest_checkpoint_are_not_kept_twice(tmp_path, uncut):
    out = cut_at(30, uncut, tmp_path / "run")
    shutil.copy(uncut / "history.jsonl", out / "history.jsonl")
    resume(out)
    assert [row["step"] for row in rows_of(out)] == [20, 40, 60, 70]


def test_a_line_of_the_history_that_was_cut_in_the_middle_does_not_stop_a_resume(tmp_path, uncut):
    out = cut_at(30, uncut, tmp_path / "run")
    (out / ".memgen_lens.jsonl").unlink()  # as an earlier version left it: now lines are written whole
    with (out / "history.jsonl").open("a") as file:
        file.write('{"step": 40, "tok')
    resume(out)
    assert_same_run(out, uncut)


@pytest.mark.parametrize("line", ['{"step": 20, "tok', "[]", '{"step": 20}', "\x00"])
def test_a_damaged_line_before_the_last_one_of_the_history_is_an_error_of_ours(tmp_path, uncut, line):
    out = cut_at(40, uncut, tmp_path / "run")
    _, second = (out / "history.jsonl").read_text().splitlines()
    (out / "history.jsonl").write_text(f"{line}\n{second}\n")
    with pytest.raises(RunDirectoryError, match=r"history.jsonl: expected .*The file is damaged"):
        resume(out)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_and_the_end_is_the_same(tmp_path, uncut, name):
    out = cut_at(40, uncut, tmp_path / "run")
    damaged = out / "checkpoints" / "step-000040" / name
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.warns(UserWarning, match=f"passing over a damaged checkpoint: .*step-000040/{name}"):
        resume(out)
    assert_same_run(out, uncut)


def test_a_half_written_checkpoint_is_ignored(tmp_path, uncut):
    out = cut_at(20, uncut, tmp_path / "run")
    half = out / "checkpoints" / ".step-000030.part"
    shutil.copytree(uncut / "checkpoints" / "step-000030", half)
    (half / "weights.safetensors").write_bytes(b"half")
    resume(out)
    assert_same_run(out, uncut)
    assert not half.exists()
    # Its weights are not what we wrote: they may be somebody's, and are kept out of the way.
    assert (half.with_name(f"{half.name}.kept-1") / "weights.safetensors").read_bytes() == b"half"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"learning_rate": 0.001}, r"train.learning_rate was 0.002, now 0.001"),
        ({"max_steps": 80}, "train.max_steps was 70, now 80"),
        ({"seed": 1, "batch_size": 16}, "train.batch_size was 32, now 16; train.seed was 0, now 1"),
        (
            {"model": mg.ModelConfig(n_layers=1, d_model=32, n_heads=4, d_mlp=64)},
            "train.model.*n_heads.*2.*now.*n_heads.*4",
        ),
    ],
)
def test_resuming_with_other_settings_is_refused_naming_the_difference(tmp_path, uncut, other, difference):
    out = cut_at(20, uncut, tmp_path / "run")
    message = (
        f"resume=True.*: expected the settings that the run was begun with; received others: {difference}.*--force"
    )
    with pytest.raises(RunDirectoryError, match=message):
        resume(out, **other)
    assert rows_of(out) == rows_of(uncut)[:1]
    assert len(list_checkpoints(out / "checkpoints")) == 2
    resume(out)
    assert_same_run(out, uncut)


def test_resuming_another_task_is_refused_naming_the_difference(tmp_path, uncut):
    out = cut_at(20, uncut, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"received others: task.n_memorized was 10, now 9"):
        train(helpers.tiny_task(n_memorized=9), CONFIG, out=out, resume=True, progress=False)


def test_settings_that_are_gone_or_damaged_end_in_an_error_of_ours_rather_than_in_another_run(tmp_path, uncut):
    out = cut_at(20, uncut, tmp_path / "run")
    settings = out / "checkpoints" / "settings.json"
    settings.write_text(settings.read_text()[:40])
    with pytest.raises(RunDirectoryError, match=r"settings.json: .*The file is damaged"):
        resume(out)
    settings.write_text(json.dumps({"something": "else"}))
    with pytest.raises(RunDirectoryError, match="received others"):
        resume(out)
    settings.unlink()
    with pytest.raises(MemgenError):
        resume(out, model=mg.ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=64))


def test_a_run_begun_before_there_was_a_setting_goes_on_with_its_default(uncut, tmp_path):
    out = cut_at(30, uncut, tmp_path / "run")
    settings = out / "checkpoints" / "settings.json"
    written = read_json(settings)
    del written["train"]["plant"]
    write_json(settings, written)
    resume(out)
    assert_same_run(out, uncut)
    write_json(settings, written)
    with pytest.raises(RunDirectoryError, match=r"train\.plant was None, now"):
        resume(out, plant=mg.Plant(neurons=(1,)))

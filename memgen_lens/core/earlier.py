"""Files of an earlier version of this package, which kept no ledger of them, known by their content.

Is asked only where a folder has no ledger. What could as well be another project's (a TransformerLens model) is taken
for ours only inside a run directory of ours.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

JSON_KEYS = {
    "config.json": {"settings", "versions", "machine"},
    "metrics.json": {"schema", "behavior", "attribution", "probe", "steering"},
    "probes.json": {"site", "by_layer", "input_only", "learning_curve"},
    "steering.json": {"tune", "by_layer", "shift", "patch"},
    "consistency.json": {"split_half", "across_tasks"},
    "dynamics.json": {"site", "steps", "behavior", "input_only", "random_neurons"},
    "settings.json": {"task", "train"},
    "state.json": {"step", "tokens", "loss_sum", "stop_reason"},
    "manifest.json": {"sites", "memorized", "generalized", "n_flipped"},
}
ROW_KEYS = {
    "history.jsonl": {"step", "tokens", "loss", "generalization", "memorization"},
    "outcomes.jsonl": {"key", "split", "rule_answer", "memorized_answer", "behavior"},
    "pairs.jsonl": {"memorized_prompt", "generalized_prompt"},
}
MODEL_KEYS = {
    "config.json": {"n_layers", "d_model", "d_vocab", "act_fn"},
    "tokenizer.json": {"model", "pre_tokenizer", "added_tokens"},
    "tokenizer_config.json": {"tokenizer_class"},
    "special_tokens_map.json": {"pad_token"},
}
REPORT = "departures named in the documentation of memgen_lens"
"""Words of the report's last line."""
SCORES, SIDES = {"nmd", "rho", "p", "p_family", "q", "n_pairs"}, {"memorized", "generalized"}


def looks_ours(path: Path) -> bool:
    """Whether a file holds what an earlier version of this package wrote under its name."""
    try:
        return _looks_ours(path)
    except (OSError, ValueError, SafetensorError):
        return False


def _looks_ours(path: Path) -> bool:
    name = path.name
    if path.parent.name == "model" and _is_settings(path.parent.parent / "checkpoints" / "settings.json"):
        if name == "model.safetensors":
            return "embed.W_E" in _arrays(path)
        return name in MODEL_KEYS and _has(path, MODEL_KEYS[name])
    if name in JSON_KEYS:
        return _has(path, JSON_KEYS[name])
    if name in ROW_KEYS:
        # A killed run may have left a last line that was cut.
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        if not any(lines):  # nothing in it tells whose it is: the run does
            return _is_settings(path.parent / "checkpoints" / "settings.json")
        return all(_holds(json.loads(line), ROW_KEYS[name]) for line in lines)
    if name == "report.html":
        return _ends_with(path, REPORT)
    if path.suffix == ".safetensors":
        arrays = _arrays(path)
        if re.fullmatch(r"\.?step-\d{6,}(\.part)?", path.parent.name):
            special = {"weights": lambda: "embed.W_E" in arrays, "optimizer": lambda: "random.cpu" in arrays}
            known: Callable[[], bool] = special.get(path.stem, lambda: False)
            return known()
        return arrays in (SCORES, SIDES) or (arrays == {"tokens"} and _has(path.with_name("manifest.json"), SIDES))
    return False


def _is_settings(path: Path) -> bool:
    return path.is_file() and _has(path, JSON_KEYS["settings.json"])


def _has(path: Path, keys: set[str]) -> bool:
    return _holds(json.loads(path.read_text(encoding="utf-8")), keys)


def _holds(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and keys <= value.keys()


def _arrays(path: Path) -> set[str]:
    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def _ends_with(path: Path, words: str) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return words.encode() in file.read()

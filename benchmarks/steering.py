"""A sweep of 10 fractions x 10 strengths, both ways: many settings in one pass beside one setting at a time."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.harness import Row, Run

FRACTIONS = tuple(np.linspace(0.05, 0.5, 10).round(3).tolist())
ALPHAS = tuple(np.linspace(0.5, 5.0, 10).round(3).tolist())


def rows() -> list[Row]:
    """On the quickstart's model and its tune pairs; the floor is that of every setting, prompt and token run once."""
    directory = str(_trained())
    model, task, pairs, _ = _prepared(directory)
    n_tokens = model.to_tokens(pairs.memorized[0].prompt).shape[1] + task.max_answer_tokens - 1
    n_rows = 2 * len(FRACTIONS) * len(ALPHAS) * int((pairs.split == "tune").sum())
    return [
        Row(
            "steering sweep, 10 x 10 settings both ways, quickstart's model",
            {"ours": ours, "run_with_hooks, a setting at a time": one_by_one},
            {"directory": directory},
            rounds=5,
            tolerance=0,
            flops=2 * n_rows * n_tokens * model.cfg.n_layers * 12 * model.cfg.d_model**2,
        )
    ]


def ours(directory: str) -> Run:
    """`sweep_steering`."""
    model, task, pairs, score = _prepared(directory)

    def run() -> np.ndarray:
        swept = mg.sweep_steering(model, task, pairs, score, top_fractions=FRACTIONS, alphas=ALPHAS)
        return np.array([[r.to_generalization, r.to_memorization, r.memorized_form] for r in swept])

    return run


def one_by_one(directory: str) -> Run:
    """What a user writes: hooks on the model, `generate` with its key-value cache, a loop over the settings."""
    model, task, pairs, score = _prepared(directory)
    tune = np.flatnonzero(pairs.split == "tune").tolist()
    strength = np.sort(np.abs(score.rho).ravel())[::-1]
    sides = {-1: [pairs.memorized[i] for i in tune], 1: [pairs.generalized[i] for i in tune]}
    tokens = {sign: model.to_tokens([item.prompt for item in items]) for sign, items in sides.items()}
    aims = {-1: "generalization", 1: "memorization"}

    def outputs(sign: int, fraction: float, alpha: float) -> list[str]:
        chosen = np.abs(score.rho) >= strength[max(1, round(fraction * strength.size)) - 1]
        shift = torch.as_tensor(sign * alpha * np.sign(score.rho) * np.abs(score.nmd) * chosen, dtype=torch.float32)

        def hook(layer: int) -> Any:
            def add(h: torch.Tensor, hook: Any) -> torch.Tensor:
                h[:, -1] += shift[layer]  # the answer position, and with the cache every generated one
                return h

            return add

        hooks = [(f"blocks.{layer}.hook_resid_post", hook(layer)) for layer in range(model.cfg.n_layers)]
        with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
            new = model.generate(
                tokens[sign],
                max_new_tokens=task.max_answer_tokens,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        return [text.split("<eos>")[0] for text in model.tokenizer.batch_decode(new[:, tokens[sign].shape[1] :])]

    def run() -> np.ndarray:
        table = []
        for fraction in FRACTIONS:
            for alpha in ALPHAS:
                said = {sign: list(zip(sides[sign], outputs(sign, fraction, alpha), strict=True)) for sign in sides}
                shifted = [np.mean([task.classify(i, o) == aims[sign] for i, o in said[sign]]) for sign in (-1, 1)]
                table.append([*shifted, np.mean([task.is_memorized_form(i, o) for i, o in said[1]])])
        return np.array(table)

    return run


@cache
def _trained() -> Path:
    """The quickstart's model, trained once for all contenders."""
    directory = Path(mkdtemp(prefix="memgen-lens-bench-"))
    preset = mg.presets["quickstart"]
    mg.train(preset.task, preset.train, out=directory, progress=False)
    return directory


def _prepared(directory: str) -> tuple[Any, Any, mg.PromptPairs, mg.NeuronScores]:
    model, task = mg.load_model(Path(directory) / "model"), mg.presets["quickstart"].task
    pairs = mg.collect_pairs(model, task, seed=0)
    return model, task, pairs, mg.attribute(mg.record(model, pairs, ["resid_post"]), "resid_post")

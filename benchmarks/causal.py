"""Causal attribution of all MLP neurons: beside plain forward passes, and beside hooks, a neuron at a time."""

from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.attribution import N_LAYERS, WIDTH, hooked, hugging_face
from benchmarks.harness import Row, Run

N_PAIRS, N_EXACT = 500, 50
D_MLP = 4 * WIDTH
SIZE = f"{N_LAYERS} layers, width {WIDTH}"
EVERY = 64
"""One neuron in so many is ablated, in either contender: the loop would take an hour for all."""


def rows() -> list[Row]:
    """One backward pass for all neurons; and the model run once for each."""
    return [
        Row(
            f"attribution patching of all MLP neurons, {N_PAIRS} pairs, {SIZE}",
            {"ours": attribution_patching, "three forward passes of the prompts": three_forward_passes},
            rounds=4,
        ),
        Row(
            f"ablation of one MLP neuron in {EVERY}, one at a time, {N_EXACT} prompts, {SIZE}",
            {"ours": ablation, "hooks, a neuron at a time": ablation_by_hooks},
            rounds=2,
            tolerance=1e-4,
        ),
    ]


def attribution_patching() -> Run:
    """Gradients at both prompts of each pair, by both answers; no permutation test."""
    model, pairs = _model(), _pairs(N_PAIRS)
    how: dict[str, Any] = {"method": "attribution_patching", "split": None, "n_permutations": 0, "progress": False}
    return lambda: mg.attribute(model, pairs, "post", **how).score


def three_forward_passes() -> Run:
    """All prompts of the pairs, three times, without gradients or answers."""
    model, pairs = _model(), _pairs(N_PAIRS)
    tokens = model.to_tokens([item.prompt for item in (*pairs.memorized, *pairs.generalized)])

    def run() -> np.ndarray:
        with torch.inference_mode():
            for _ in range(3):
                logits = [model(batch)[:, -1] for batch in tokens.split(256)]
        return torch.cat(logits).numpy()

    return run


def ablation() -> Run:
    """What zeroing each of some neurons takes from the contrast of the memorized prompts."""
    model, pairs = _model(), _pairs(N_EXACT)
    groups = np.full((N_LAYERS, D_MLP), -1)
    groups[:, ::EVERY] = np.arange(N_LAYERS * D_MLP // EVERY).reshape(N_LAYERS, -1)
    how: dict[str, Any] = {"method": "ablation", "baseline": "zero", "groups": groups, "split": None}
    return lambda: mg.attribute(model, pairs, "post", n_permutations=0, progress=False, **how).score[:, ::EVERY]


def ablation_by_hooks() -> Run:
    """`hooks` and a forward pass over prompts and answers for each neuron, as a user writes it."""
    model, items = _model(), _pairs(N_EXACT).memorized
    sides = [
        [model.to_tokens(item.prompt + str(getattr(item, side)))[0] for item in items]
        for side in ("memorized_answer", "rule_answer")
    ]
    length = len(model.to_tokens(items[0].prompt)[0])

    def said() -> torch.Tensor:
        total = torch.zeros(len(items))
        for sign, rows in zip((1, -1), sides, strict=True):
            tokens = torch.stack(rows)
            logits = model(tokens)[:, length - 1 : -1].log_softmax(-1)
            total += sign * logits.gather(-1, tokens[:, length:, None])[..., 0].sum(-1)
        return total

    def run() -> np.ndarray:
        effects = np.zeros((N_LAYERS, D_MLP // EVERY))
        with torch.inference_mode():
            before = said()
            for layer in range(N_LAYERS):
                for place, neuron in enumerate(range(0, D_MLP, EVERY)):

                    def zero(activation: torch.Tensor, hook: Any, neuron: int = neuron) -> torch.Tensor:
                        activation[:, length - 1, neuron] = 0
                        return activation

                    with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", zero)]):
                        effects[layer, place] = float((before - said()).mean())
        return effects

    return run


def _model() -> Any:
    return hooked(hugging_face())


def _pairs(n: int) -> mg.PromptPairs:
    """Sums of four digits and their swaps, with two answers of five digits."""
    operands = np.random.default_rng(0).integers(10_000, size=(n, 2))
    sides = ([f"{a:04}+{b:04}=" for a, b in rows] for rows in (operands, operands[:, ::-1]))
    rule = [f"{a + b:05}" for a, b in operands.tolist()]
    memory = [f"{(a * 7919 + b) % 100_000:05}" for a, b in operands.tolist()]
    return mg.PromptPairs.from_strings(*sides, rule_answers=rule, memorized_answers=memory)

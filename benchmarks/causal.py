"""Causal attribution of MLP neurons: beside plain forward passes, beside hooks a neuron at a time, beside a package."""

from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.attribution import N_LAYERS, WIDTH, hooked, hugging_face
from benchmarks.harness import Row, Run
from memgen_lens.models import build_model

N_PAIRS, N_EXACT, N_KNOWN = 500, 50, 16
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
            {"every": EVERY},
            rounds=2,
            tolerance=1e-4,
        ),
        Row(
            f"ablation of each of the 1,024 MLP neurons of quickstart's model, {N_EXACT} prompts",
            {"ours": ablation, "hooks, a neuron at a time": ablation_by_hooks},
            {"every": 1, "small": True},
            rounds=2,
            tolerance=1e-4,
        ),
        Row(
            f"integrated gradients of all MLP neurons before their nonlinearity, 20 steps, {N_KNOWN} prompts, {SIZE}",
            {"ours": integrated_gradients, "knowledge-neurons": knowledge_neurons},
            rounds=3,
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


def ablation(every: int, small: bool = False) -> Run:
    """What zeroing each of some neurons takes from the contrast of the memorized prompts."""
    model, pairs = _small_model() if small else _model(), _pairs(N_EXACT)
    groups = np.full((model.cfg.n_layers, model.cfg.d_mlp), -1)
    groups[:, ::every] = np.arange(groups.size // every).reshape(len(groups), -1)
    how: dict[str, Any] = {"method": "ablation", "baseline": "zero", "groups": groups, "split": None}
    return lambda: mg.attribute(model, pairs, "post", n_permutations=0, progress=False, **how).score[:, ::every]


def ablation_by_hooks(every: int, small: bool = False) -> Run:
    """`hooks` and a forward pass over prompts and answers for each neuron, as a user writes it."""
    model, items = _small_model() if small else _model(), _pairs(N_EXACT).memorized
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
        effects = np.zeros((model.cfg.n_layers, model.cfg.d_mlp // every))
        with torch.inference_mode():
            before = said()
            for layer in range(model.cfg.n_layers):
                for place, neuron in enumerate(range(0, model.cfg.d_mlp, every)):

                    def zero(activation: torch.Tensor, hook: Any, neuron: int = neuron) -> torch.Tensor:
                        activation[:, length - 1, neuron] = 0
                        return activation

                    with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", zero)]):
                        effects[layer, place] = float((before - said()).mean())
        return effects

    return run


def integrated_gradients() -> Run:
    """Of the probability of the memorized answer's first token, on the memorized prompts; timed with 20 points.

    With so few either contender is off by 7 % of the largest score, as drawn weights make steep functions: what is
    compared, in units of the largest, is what scores tend to.
    """
    model, pairs = _model(), _pairs(N_KNOWN)
    token = {item.prompt: model.tokenizer.encode(str(item.memorized_answer))[0] for item in pairs.memorized}

    def probability(logits: torch.Tensor, items: Any) -> torch.Tensor:
        wanted = torch.tensor([token[item.prompt] for item in items])
        return logits.softmax(-1).gather(1, wanted[:, None])[:, 0]

    how: dict[str, Any] = {"method": "integrated_gradients", "split": None, "n_permutations": 0, "progress": False}

    def scores(n_steps: int) -> np.ndarray:
        return mg.attribute(model, pairs, "pre", metric=probability, n_steps=n_steps, **how).score

    limit = _scaled(scores(300))

    def run() -> np.ndarray:
        scores(20)
        return limit

    return run


def knowledge_neurons() -> Run:
    """The package's scores, prompt by prompt, layer by layer; timed with its 20 steps.

    It takes the mean over points that include both ends, which is off by a term of one over their number: 200 and 400
    points tell what its scores tend to.
    """
    from knowledge_neurons.knowledge_neurons import KnowledgeNeurons

    pairs, tokenizer = _pairs(N_KNOWN), mg.tasks.Addition(n_digits=4).tokenizer
    # It patches the layer with activations that want a gradient, and takes it by these alone.
    peer = KnowledgeNeurons(hugging_face().requires_grad_(False), tokenizer, model_type="gpt2", device="cpu")

    def scores(steps: int) -> np.ndarray:
        how = {"batch_size": 20, "steps": steps, "pbar": False}
        found = [peer.get_scores(i.prompt, str(i.memorized_answer)[:1], **how) for i in pairs.memorized]
        return torch.stack(found).mean(0).detach().numpy().astype(np.float64)

    limit = _scaled(2 * scores(400) - scores(200))

    def run() -> np.ndarray:
        scores(20)
        return limit

    return run


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values in units of the largest, in which contenders agree."""
    return values / np.abs(values).max()


def _small_model() -> Any:
    """A model of quickstart's shape with drawn weights."""
    model = build_model(mg.ModelConfig(), mg.tasks.Addition(n_digits=4).tokenizer, n_ctx=24, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn, every neuron is near zero
            parameter.mul_(3)
    return model.eval()


def _model() -> Any:
    return hooked(hugging_face())


def _pairs(n: int) -> mg.PromptPairs:
    """Sums of four digits and their swaps, with two answers of five digits."""
    operands = np.random.default_rng(0).integers(10_000, size=(n, 2))
    sides = ([f"{a:04}+{b:04}=" for a, b in rows] for rows in (operands, operands[:, ::-1]))
    rule = [f"{a + b:05}" for a, b in operands.tolist()]
    memory = [f"{(a * 7919 + b) % 100_000:05}" for a, b in operands.tolist()]
    return mg.PromptPairs.from_strings(*sides, rule_answers=rule, memorized_answers=memory)

"""Causal methods written anew on a Hugging Face model, pair by pair, by raw torch hooks, without a cache or padding."""

from types import SimpleNamespace
from typing import Any

import bridges
import numpy as np
import torch

import memgen_lens as mg
from memgen_lens.analysis.attribution.answers import answers_of
from memgen_lens.models.tokens import tokenized

N_STEPS = 3
N_PAIRS = 16


class Raw:
    """A model whose MLP neurons are seen and replaced where they enter the layer behind them."""

    def __init__(self, kind: str) -> None:
        self.hf = bridges.hugging_face(kind)
        blocks = self.hf.transformer.h if kind == "gpt2" else self.hf.model.layers
        self.entered = [block.mlp.c_proj if kind == "gpt2" else block.mlp.down_proj for block in blocks]

    @torch.no_grad()
    def neurons(self, prompt: list[int]) -> torch.Tensor:
        """Activations ``[layer, neuron]`` at a prompt's last token."""
        seen: list[torch.Tensor] = []
        hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1])) for part in self.entered]
        self.hf(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        return torch.stack(seen)

    def contrast(self, prompt: list[int], both: Any, layer: int, values: torch.Tensor) -> torch.Tensor:
        """The contrast of one prompt, a row for each of ``values [row, neuron]`` put in at its last token."""
        last, total = len(prompt) - 1, torch.zeros(len(values))

        def put(module: Any, given: Any) -> tuple[torch.Tensor]:
            x = given[0].clone()
            x[:, last] = values
            return (x,)

        for sign, ids in zip((1, -1), both, strict=True):
            hook = self.entered[layer].register_forward_pre_hook(put)
            logits = self.hf(torch.tensor([prompt + ids]).repeat(len(values), 1)).logits.log_softmax(-1)
            hook.remove()
            total = total + sign * sum(logits[:, last + i, token] for i, token in enumerate(ids))
        return total

    def slopes(self, prompt: list[int], both: Any, layer: int, values: torch.Tensor) -> torch.Tensor:
        """The contrast's gradient at each of ``values``."""
        at = values.clone().requires_grad_()
        return torch.autograd.grad(self.contrast(prompt, both, layer, at).sum(), at)[0]

    @torch.no_grad()
    def changed(self, prompt: list[int], both: Any, layer: int, own: torch.Tensor, *new: torch.Tensor) -> torch.Tensor:
        """How the contrast changes where one neuron after another has its value of ``new``: ``[new, neuron]``."""
        one = torch.eye(len(own), dtype=torch.bool)
        found = self.contrast(prompt, both, layer, torch.cat([own[None], *(torch.where(one, v, own) for v in new)]))
        return (found[1:] - found[0]).view(len(new), -1)


def by_raw_hooks(kind: str) -> SimpleNamespace:
    """A Bridge, pairs of prompts of several lengths and answers of two tokens, and each method's effects by hand.

    ``effects`` are ``[pair, layer, neuron]`` by name; ``ablation`` by its two baselines.
    """
    model, raw = bridges.bridge(kind), Raw(kind)
    memorized, generalized = (
        [f"{a}+{b * n}=" for a, n in zip(s, (1, 2, 3, 2), strict=True) for b in "efgh"] for s in ("abcd", "ijkl")
    )
    answers = {"memorized_answers": ["12"] * N_PAIRS, "rule_answers": ["3"] * N_PAIRS}
    pairs = mg.PromptPairs.from_strings(memorized, generalized, **answers)
    spelled = answers_of(model, pairs, batch_size=8, call="here")
    prompts = [
        [tokenized(model, [item.prompt])[0][0].tolist() for item in side]
        for side in (pairs.memorized, pairs.generalized)
    ]
    seen = [torch.stack([raw.neurons(prompt) for prompt in side]) for side in prompts]  # [pair, layer, neuron]
    mean = torch.cat(seen).mean(0)
    points, weights = (torch.from_numpy(part).float() for part in np.polynomial.legendre.leggauss(N_STEPS))
    points, weights = (points[:, None] + 1) / 2, weights[:, None] / 2
    rows: dict[str, list[torch.Tensor]] = {}
    for pair, both in enumerate(spelled):
        for layer in range(len(raw.entered)):
            mem, gen = (side[pair, layer] for side in seen)
            of_mem, of_gen = ((side[pair], both, layer) for side in prompts)
            path = gen + points * (mem - gen)
            scaled = points**3 * mem
            by_mem = raw.slopes(*of_mem, torch.cat([mem[None], path, scaled])).split([1, N_STEPS, N_STEPS])
            by_gen = raw.slopes(*of_gen, torch.cat([gen[None], path])).split([1, N_STEPS])
            no_longer = raw.changed(*of_mem, mem, torch.zeros_like(mem), mean[layer], gen)
            (put_in,) = raw.changed(*of_gen, gen, mem)
            found = {
                "attribution_patching": (by_mem[0] + by_gen[0])[0] / 2 * (mem - gen),
                "attribution_patching_ig": (weights * (by_mem[1] + by_gen[1])).sum(0) / 2 * (mem - gen),
                "integrated_gradients": (weights * 3 * points**2 * by_mem[2]).sum(0) * mem,
                "zero": -no_longer[0],
                "mean": -no_longer[1],
                "patching": (put_in - no_longer[2]) / 2,
            }
            for name, effect in found.items():
                rows.setdefault(name, []).append(effect)
    shape = seen[0].shape
    return SimpleNamespace(
        model=model, pairs=pairs, effects={name: torch.stack(each).view(shape).numpy() for name, each in rows.items()}
    )

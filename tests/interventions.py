"""A model of each kind that talks, its pairs and activations, and every intervention written by hand beside ours."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import planted
import torch

import memgen_lens as mg
from memgen_lens.models.native import set_state, state_of
from memgen_lens.models.sites import site_hooks

SITES = ["post", "resid_post", "z"]
N_PROMPT, N_NEW = 6, 5
"""Tokens of a prompt, and of what is generated."""
MODES: dict[str, dict[str, Any]] = {
    "shift": {"alpha": 1.5},
    "scale": {"alpha": 0.6},
    "clamp": {},
    "zero": {"mode": "ablate"},
    "mean": {"mode": "ablate", "how": "mean"},
    "resample": {"mode": "ablate", "how": "resample", "seed": 3},
    "patch": {},
}
"""By name, what `Steering.from_scores` is asked for."""


def talking_model(*, native: bool, scale: float = 0.2) -> Any:
    """The planted model's shape with random weights, so that everything matters and it goes on for some tokens."""
    model = planted.build_model(native=native)
    generator = torch.Generator().manual_seed(1)
    state = state_of(model)
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith((".mask", ".IGNORE")):
            state[name] = scale * torch.randn(value.shape, generator=generator)
    state["unembed.b_U"][model.tokenizer.eos_token_id] = -100  # it never ends
    set_state(model, state)
    return model


def talking(*, native: bool) -> SimpleNamespace:
    """A talking model with pairs of prompts of one length, their activations and scores."""
    model, pairs = talking_model(native=native), planted.prompt_pairs(30, lengths=(4, 4))
    acts = mg.record(model, pairs, SITES, progress=False)
    scores = {site: mg.attribute(acts, site, n_permutations=0) for site in SITES}
    tokens = model.to_tokens([item.prompt for item in pairs.memorized[:8]])
    assert tokens.shape == (8, N_PROMPT)
    answered = torch.cat([tokens, model.to_tokens(["rmabc", "mrcba"] * 4)], dim=1)
    return SimpleNamespace(model=model, pairs=pairs, acts=acts, scores=scores, tokens=tokens, answered=answered)


def steering(world: SimpleNamespace, name: str, site: str = "post", **how: Any) -> mg.Steering:
    """A steering of a mode; of a direction, the mean difference of all layers."""
    if name == "direction":
        how.pop("top_fraction", None)
        return mg.Steering.from_mean_difference(world.acts, site, alpha=1.5, **how)
    source = {"source": world.acts, "mode": name, "top_fraction": 0.3} | MODES[name] | how
    if name == "patch":
        source.pop("positions", None)
    return mg.Steering.from_scores(world.scores[site], **source)


def where_of(positions: str, n_prompt: int = N_PROMPT) -> slice:
    """Which positions of a whole sequence are steered."""
    first, last = n_prompt - 1, n_prompt
    return {
        "answer": slice(first, None),
        "prompt": slice(first, last),
        "generated": slice(last, None),
        "all": slice(None),
    }[positions]


def hand_hooks(world: SimpleNamespace, steer: mg.Steering, name: str, toward: str, where: slice, pairs: Any) -> list:
    """One hook a layer, by the formulas of `Steering`'s docstring, neuron by neuron."""
    site, acts = steer.setting.site, world.acts.site(steer.setting.site)
    select = np.flatnonzero(world.pairs.split == "select")
    mem, gen = (getattr(acts, side)[select].mean(0, dtype=np.float64) for side in ("memorized", "generalized"))
    s = 1 if toward == "memorization" else -1
    alpha = MODES.get(name, {"alpha": 1.5}).get("alpha")

    def changed(h: torch.Tensor, layer: int, i: int) -> Any:
        """What becomes of one neuron ``[batch, pos]``."""
        m, g = float(mem[layer, i]), float(gen[layer, i])
        if name in ("shift", "direction"):
            score = world.scores[site]
            sign = np.sign(score.rho[layer, i] if name == "shift" else m - g)
            return h + s * alpha * float(sign) * abs(m - g)
        if name == "scale":
            own = 1 if abs(m) > abs(g) else -1
            return h * (1 + alpha if own == s else 1 - alpha)
        if name == "patch":
            other = acts.memorized if s > 0 else acts.generalized
            return torch.as_tensor(other[pairs, layer, i])[:, None].expand_as(h)
        if name == "resample":
            both = np.concatenate([acts.memorized, acts.generalized])
            return torch.as_tensor(both[steer.draw[pairs], layer, i])[:, None].expand_as(h)
        return torch.full_like(h, {"clamp": m if s > 0 else g, "zero": 0.0, "mean": (m + g) / 2}[name])

    def hook_of(layer: int) -> Any:
        def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            flat = activation.flatten(2).clone()
            for i in np.flatnonzero(steer.selected[layer]).tolist():
                flat[:, where, i] = changed(flat[:, where, i], layer, i)
            return flat.view_as(activation)

        return hook

    return [(hook, hook_of(layer)) for layer, hook in enumerate(site_hooks(world.model, site))]


@torch.inference_mode()
def spoken(model: Any, tokens: torch.Tensor, n: int = N_NEW) -> torch.Tensor:
    """Greedy continuations without a cache, whatever hooks are set."""
    for _ in range(n):
        logits = model(tokens, attention_mask=torch.ones_like(tokens))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, -n:]

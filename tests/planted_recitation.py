"""Models whose recitation is known: one that follows an order of all tokens, and one of random weights.

The first says of each token the one that comes after it in a fixed order, with one logit for all: it recites a text
exactly where the text follows that order, and what it says and how surely can be written down.
"""

from typing import Any

import helpers
import numpy as np
import torch

import memgen_lens as mg
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.tasks.tokenizer import build_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
"""In the order that the model follows; ``a`` comes after the last."""
LOGIT = 6.0
"""Of the token that comes next; of all others it is 0."""
N_VOCAB = len(LETTERS) + 3
PREFIX, SUFFIX = 5, 6


def following(n: int = len(LETTERS), length: int = PREFIX + SUFFIX) -> list[str]:
    """Texts that follow the order, each from another letter on."""
    return [(LETTERS * 2)[first : first + length] for first in range(n)]


def unordered(n: int = len(LETTERS), length: int = PREFIX + SUFFIX, *, seed: int = 0) -> list[str]:
    """Texts that never follow it by one step: each letter is at least two on."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(2, len(LETTERS), size=(n, length)).cumsum(1) % len(LETTERS)
    return ["".join(LETTERS[i] for i in row) for row in steps]


@torch.no_grad()
def build_model(*, native: bool = False) -> Any:
    """The model that follows the order."""
    settings = {
        "n_layers": 2,
        "d_model": N_VOCAB,
        "n_ctx": 24,
        "d_head": 4,
        "n_heads": 1,
        "d_mlp": 8,
        "act_fn": "relu",
        "d_vocab": N_VOCAB,
        "normalization_type": None,
        "default_prepend_bos": False,
        "device": "cpu",
        "seed": 0,
    }
    model = helpers.model_of(settings, build_tokenizer(tuple(LETTERS)), native=native)
    for parameter in model.parameters():
        parameter.zero_()
    weights = helpers.weights(model)
    n = len(LETTERS)
    weights.embed.W_E[torch.arange(n), (torch.arange(n) + 1) % n] = 1
    weights.unembed.W_U[:] = LOGIT * torch.eye(N_VOCAB)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def random_model(*, native: bool = False) -> Any:
    """A small model that says now this and now that, over the same letters."""
    settings = helpers.small_settings(d_vocab=N_VOCAB, n_ctx=24, default_prepend_bos=False)
    model = helpers.model_of(settings, build_tokenizer(tuple(LETTERS)), native=native)
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval().requires_grad_(False)


def own_texts(model: Any, n: int = 12, *, seed: int = 0) -> list[str]:
    """Random beginnings with what the model says to them, which is no more than letters: texts that it recites."""
    rng = np.random.default_rng(seed)
    starts = ["".join(rng.choice(list(LETTERS), size=PREFIX)) for _ in range(4 * n)]
    said = mg.complete(model, starts, max_new_tokens=SUFFIX, progress=False)
    texts = [start + text for start, text in zip(starts, said, strict=True)]
    return [text for text in texts if len(text) == PREFIX + SUFFIX and set(text) <= set(LETTERS)][:n]


def shifted(model: Any, layer: int, neuron: int, by: float, *, positions: Any = "answer", alpha: float = 1.0) -> Any:
    """A steering that adds ``by`` to one neuron of ``resid_post``, away from memorization."""
    shape = (model.cfg.n_layers, model.cfg.d_model)
    shift, flat = np.zeros(shape), np.full(shape, 0.5)
    shift[layer, neuron] = -by
    scores = NeuronScores("resid_post", shift, np.sign(shift), flat, flat, flat, 8, 8)
    setting = SteeringSetting("resid_post", 1 / shift.size, alpha, positions)
    return mg.Steering(setting, scores, shift != 0, shift)

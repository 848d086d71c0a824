"""A model in which no one shift switches the behaviour: what recalls in one group of prompts computes in the other.

A prompt is a few fillers with one of four markers among them, then ``=``. Attention carries two numbers of the marker
to the last position, its value and its group, each 1 or -1; the last MLP turns the answer from ``r`` (the rule's) into
``m`` (the memorized one) where the two agree. So recalling prompts have value 1 in group 1 and -1 in group -1,
computing ones the other way round, and over both groups nothing tells them apart on average.
"""

from typing import Any

import helpers
import numpy as np
import torch

from memgen_lens.core.pairs import PromptPairs
from memgen_lens.tasks.tokenizer import build_tokenizer

N_LAYERS = 3
FILLERS = "abc"
MARKERS = {"P": (1, 1), "Q": (-1, 1), "R": (-1, -1), "S": (1, -1)}
"""Value and group; the model recalls on P and R, and computes on Q and S."""
IS_END, IS_MARKER, VALUE, GROUP, MOVED_VALUE, MOVED_GROUP, DECISION, IS_ANSWER, FILLER = range(9)
MIXED = FILLER + len(FILLERS)
D_MODEL = MIXED + len(FILLERS)


@torch.no_grad()
def build_model() -> Any:
    """The model; value and group are at its last position from ``resid_pre`` of layer 1 on."""
    tokenizer = build_tokenizer((*FILLERS, *MARKERS, "=", "r", "m"))
    settings = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": 24,
        "d_head": 8,
        "n_heads": 2,
        "d_mlp": 8,
        "act_fn": "relu",
        "d_vocab": len(tokenizer),
        "normalization_type": None,
        "default_prepend_bos": False,
        "device": "cpu",
        "seed": 0,
    }
    model = helpers.model_of(settings, tokenizer)
    token = {text: model.tokenizer.convert_tokens_to_ids(text) for text in (*FILLERS, *MARKERS, "=", "r", "m", "<eos>")}
    for parameter in model.parameters():
        parameter.zero_()
    weights = helpers.weights(model)
    embed, unembed = weights.embed.W_E, weights.unembed.W_U
    embed[token["="], IS_END] = 1
    embed[[token["r"], token["m"]], IS_ANSWER] = 1
    embed[[token[f] for f in FILLERS], torch.arange(FILLER, MIXED)] = 1
    for marker, (value, group) in MARKERS.items():
        embed[token[marker], [IS_MARKER, VALUE, GROUP]] = torch.tensor([1.0, value, group])
    # Head 0: the last position looks at the marker; head 1: the mean of the fillers, which tells nothing.
    attention = weights.blocks[0].attn
    attention.W_Q[0, IS_END, 0] = attention.W_K[0, IS_MARKER, 0] = 11
    attention.W_V[0, VALUE, 1] = attention.W_O[0, 1, MOVED_VALUE] = 1
    attention.W_V[0, GROUP, 2] = attention.W_O[0, 2, MOVED_GROUP] = 1
    mixed = torch.arange(len(FILLERS))
    attention.W_V[1, FILLER + mixed, mixed] = attention.W_O[1, mixed, MIXED + mixed] = 1
    decider = weights.blocks[N_LAYERS - 1].mlp
    for neuron, sign in enumerate((1, -1)):
        decider.W_in[[MOVED_VALUE, MOVED_GROUP], neuron] = sign
        decider.b_in[neuron] = -1
        decider.W_out[neuron, DECISION] = 1
    unembed[IS_END, token["r"]] = unembed[DECISION, token["m"]] = 10
    unembed[DECISION, token["r"]] = -10
    unembed[IS_ANSWER, token["<eos>"]] = 100
    return model.eval().requires_grad_(False)


def prompt_pairs(n: int = 120, *, seed: int = 0) -> PromptPairs:
    """Pairs of one group each, the groups in turn."""
    rng = np.random.default_rng(seed)
    sides: dict[str, list[str]] = {"memorized": [], "generalized": []}
    for pair in range(n):
        for side, marker in zip(sides.values(), ("PQ", "RS")[pair % 2], strict=True):
            text = [str(f) for f in rng.choice(list(FILLERS), size=rng.integers(6, 12))]
            text.insert(int(rng.integers(len(text) + 1)), marker)
            side.append("".join(text) + "=")
    return PromptPairs.from_strings(**sides, rule_answers=["r"] * n, memorized_answers=["m"] * n, seed=seed)

"""A model of two tasks whose deciding neurons are known: one for each task, or one for both.

As in `planted`, a prompt is a few fillers with one marker among them, then ``=``. Task ``a`` has the markers M (recall)
and G (compute) and answers ``m`` or ``r``; task ``b`` has N and H and answers ``n`` or ``s``. At the site ``post`` of
the last layer one neuron fires on M and one on N; where they are ``shared``, it is the same one.
"""

from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import torch

from memgen_lens.core.pairs import PromptPairs
from memgen_lens.tasks.tokenizer import build_tokenizer

N_LAYERS, D_MLP, LAYER = 2, 64, 1
NEURON = {"a": 3, "b": 20}
ONE_NEURON = 1 / (N_LAYERS * D_MLP)
FILLERS = "abcd"
MARKERS = {"a": ("M", "G"), "b": ("N", "H")}
ANSWERS = {"a": ("m", "r"), "b": ("n", "s")}
VOCABULARY = (*FILLERS, "M", "G", "N", "H", "=", "m", "r", "n", "s")

IS_END, IS_MARKER, IS_M, IS_N, IS_B, IS_ANSWER = range(6)
MOVED_M, MOVED_N, MOVED_B, DECISION_A, DECISION_B, FILLER = range(6, 12)
MIXED = FILLER + len(FILLERS)


def build_model(*, shared: bool) -> Any:
    tokenizer = build_tokenizer(VOCABULARY)
    settings = {
        "n_layers": N_LAYERS,
        "d_model": MIXED + len(FILLERS),
        "n_ctx": 16,
        "d_head": 8,
        "n_heads": 2,
        "d_mlp": D_MLP,
        "act_fn": "relu",
        "d_vocab": len(tokenizer),
        "normalization_type": None,
        "default_prepend_bos": False,
        "device": "cpu",
        "seed": 0,
    }
    model = helpers.model_of(settings | {"default_padding_side": "right"}, tokenizer)
    _plant(model, shared=shared)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _plant(model: Any, *, shared: bool) -> None:
    token = {text: model.tokenizer.convert_tokens_to_ids(text) for text in (*VOCABULARY, "<eos>")}
    draw, n = torch.Generator().manual_seed(0), len(FILLERS)
    for parameter in model.parameters():
        parameter.zero_()
    weights = helpers.weights(model)
    embed, unembed = weights.embed.W_E, weights.unembed.W_U
    embed[token["="], IS_END] = 1
    embed[[token[m] for m in "MGNH"], IS_MARKER] = 1
    embed[token["M"], IS_M] = embed[token["N"], IS_N] = 1
    embed[[token["N"], token["H"]], IS_B] = 1
    embed[[token[a] for a in "mrns"], IS_ANSWER] = 1
    embed[[token[f] for f in FILLERS], FILLER:MIXED] = torch.randn(n, n, generator=draw)
    # Layer 0, head 0: the last position looks at the marker; head 1: the mean of everything so far, fillers only.
    attention, mixed = weights.blocks[0].attn, torch.arange(n)
    attention.W_Q[0, IS_END, 0] = attention.W_K[0, IS_MARKER, 0] = 11
    for i, (source, target) in enumerate(((IS_M, MOVED_M), (IS_N, MOVED_N), (IS_B, MOVED_B))):
        attention.W_V[0, source, i] = attention.W_O[0, i, target] = 1
    attention.W_V[1, FILLER + mixed, mixed] = attention.W_O[1, mixed, MIXED + mixed] = 1
    for block in weights.blocks:
        block.mlp.W_in[MIXED:] = 0.5 * torch.randn(n, D_MLP, generator=draw)
        block.mlp.b_in[:] = 0.5 * torch.rand(D_MLP, generator=draw)
    mlp = weights.blocks[LAYER].mlp
    a, b = (NEURON["a"], NEURON["a"] if shared else NEURON["b"])
    for neuron in (a, b):
        mlp.W_in[:, neuron] = mlp.b_in[neuron] = 0
    mlp.W_in[MOVED_M, a] = mlp.W_in[MOVED_N, b] = 1
    mlp.W_out[a, DECISION_A] = mlp.W_out[b, DECISION_B] = 1
    # Logits: r, or s on task b, unless its neuron fires; the end after an answer.
    unembed[IS_END, token["r"]] = unembed[DECISION_A, token["m"]] = 10
    unembed[DECISION_A, token["r"]] = -10
    unembed[MOVED_B, token["s"]] = 40
    if shared:  # the neuron says "recall"; the task says which answer that is
        unembed[MOVED_B, token["n"]] = 20
        unembed[DECISION_B, token["s"]] = -40
    else:
        unembed[DECISION_B, token["n"]], unembed[DECISION_B, token["s"]] = 50, -40
    unembed[IS_ANSWER, token["<eos>"]] = 200


def prompts(marker: str, n: int, *, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        text = [str(f) for f in rng.choice(list(FILLERS), size=rng.integers(3, 6))]
        text.insert(int(rng.integers(len(text) + 1)), marker)
        texts.append("".join(text) + "=")
    return texts


def prompt_pairs(n: int = 60) -> PromptPairs:
    """Pairs of both tasks, ``n`` each."""
    parts = []
    for i, task in enumerate("ab"):
        recall, compute = MARKERS[task]
        part = PromptPairs.from_strings(
            memorized=prompts(recall, n, seed=2 * i),
            generalized=prompts(compute, n, seed=2 * i + 1),
            memorized_answers=[ANSWERS[task][0]] * n,
            rule_answers=[ANSWERS[task][1]] * n,
            items=list(range(i * n, (i + 1) * n)),
        )
        parts.append([[replace(item, task=task) for item in side] for side in (part.memorized, part.generalized)])
        split = part.split if i == 0 else np.concatenate([split, part.split])
    (mem_a, gen_a), (mem_b, gen_b) = parts
    return PromptPairs((*mem_a, *mem_b), (*gen_a, *gen_b), split, 2 * n, 2 * n)

"""A model whose deciding neuron is known, the prompt pairs on which it decides, and a look at any model's hooks.

A prompt is a few fillers with one marker among them, then ``=``. Attention carries "the marker is M" to the last
position; one neuron of the last MLP fires on it and turns the answer from ``r`` (the rule's) into ``m`` (the
memorized one). All other neurons see the fillers only, which are drawn without a look at the marker.
"""

from typing import Any

import helpers
import numpy as np
import torch
from transformer_lens.utilities import get_act_name

from memgen_lens.core.pairs import PromptPairs
from memgen_lens.models.sites import LAYER_SITES
from memgen_lens.tasks.tokenizer import build_tokenizer

N_LAYERS, D_MLP = 2, 64
LAYER, NEURON = 1, 7
"""Where the deciding neuron is, at the site ``post``."""
ONE_NEURON = 1 / (N_LAYERS * D_MLP)
"""The share of the site's neurons that one neuron is."""
FILLERS = "abcdefgh"
VOCABULARY = (*FILLERS, "M", "G", "=", "r", "m")
RULE, MEMORY = "r", "m"

IS_END, IS_MARKER, IS_M, MOVED, DECISION, IS_ANSWER, FILLER = 0, 1, 2, 3, 4, 5, 6
MIXED = FILLER + len(FILLERS)
D_MODEL = MIXED + len(FILLERS)


def build_model(*, default_prepend_bos: bool = False, default_padding_side: str = "right", native: bool = False) -> Any:
    """The planted model; on prompts with ``M`` it says ``m``, on prompts with ``G`` it says ``r``, then it ends."""
    tokenizer = build_tokenizer(VOCABULARY)
    settings = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": 24,
        "d_head": 8,
        "n_heads": 2,
        "d_mlp": D_MLP,
        "act_fn": "relu",
        "d_vocab": len(tokenizer),
        "normalization_type": None,
        "default_prepend_bos": default_prepend_bos,
        "device": "cpu",
        "seed": 0,
    }
    model = helpers.model_of(settings | {"default_padding_side": default_padding_side}, tokenizer, native=native)
    _plant(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _plant(model: Any) -> None:
    token = {text: model.tokenizer.convert_tokens_to_ids(text) for text in (*VOCABULARY, "<eos>")}
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.zero_()
    weights = helpers.weights(model)
    embed, unembed = weights.embed.W_E, weights.unembed.W_U
    embed[token["="], IS_END] = 1
    embed[[token["M"], token["G"]], IS_MARKER] = 1
    embed[token["M"], IS_M] = 1
    embed[[token["r"], token["m"]], IS_ANSWER] = 1
    embed[[token[f] for f in FILLERS], FILLER:MIXED] = torch.randn(len(FILLERS), len(FILLERS), generator=draw)
    # Layer 0, head 0: the last position looks at the marker and takes over whether it is M.
    attention, mixed = weights.blocks[0].attn, torch.arange(len(FILLERS))
    attention.W_Q[0, IS_END, 0] = attention.W_K[0, IS_MARKER, 0] = 11
    attention.W_V[0, IS_M, 1] = attention.W_O[0, 1, MOVED] = 1
    # Layer 0, head 1: the mean of everything so far, fillers only.
    attention.W_V[1, FILLER + mixed, mixed] = attention.W_O[1, mixed, MIXED + mixed] = 1
    # Every neuron but one reads and writes the mixed fillers.
    for block in weights.blocks:
        block.mlp.W_in[MIXED:] = 0.5 * torch.randn(len(FILLERS), D_MLP, generator=draw)
        block.mlp.b_in[:] = 0.5 * torch.rand(D_MLP, generator=draw)
        block.mlp.W_out[:, MIXED:] = 0.02 * torch.randn(D_MLP, len(FILLERS), generator=draw)
    decider = weights.blocks[LAYER].mlp
    decider.W_in[:, NEURON] = decider.b_in[NEURON] = decider.W_out[NEURON] = 0
    decider.W_in[MOVED, NEURON] = decider.W_out[NEURON, DECISION] = 1
    # Logits: the rule's answer unless the neuron fires; the end after an answer; a little of all else.
    unembed[MIXED:] = 0.1 * torch.randn(len(FILLERS), unembed.shape[1], generator=draw)
    unembed[IS_END, token["r"]] = unembed[DECISION, token["m"]] = 10
    unembed[DECISION, token["r"]] = -10
    unembed[IS_ANSWER, token["<eos>"]] = 100


def prompts(marker: str, n: int, *, seed: int, lengths: tuple[int, int] = (2, 5)) -> list[str]:
    """Prompts with one marker among ``lengths`` fillers, ends included."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        text = [str(f) for f in rng.choice(list(FILLERS), size=rng.integers(lengths[0], lengths[1] + 1))]
        text.insert(int(rng.integers(len(text) + 1)), marker)
        made.append("".join(text) + "=")
    return made


def prompt_pairs(n: int = 60, *, answers: bool = True, seed: int = 0, lengths: tuple[int, int] = (2, 5)) -> PromptPairs:
    """Pairs on which the planted model recalls and computes, as a user would hand them in."""
    return PromptPairs.from_strings(
        memorized=prompts("M", n, seed=2 * seed, lengths=lengths),
        generalized=prompts("G", n, seed=2 * seed + 1, lengths=lengths),
        rule_answers=[RULE] * n if answers else None,
        memorized_answers=[MEMORY] * n if answers else None,
        seed=seed,
    )


def twin_pairs(n: int = 60, *, seed: int = 0, lengths: tuple[int, int] = (2, 5), at: int | None = None) -> PromptPairs:
    """Pairs whose prompts differ in their marker alone, which stands before filler ``at`` of them, or anywhere."""
    rng = np.random.default_rng(seed)
    sides: dict[str, list[str]] = {"M": [], "G": []}
    for _ in range(n):
        text = [str(f) for f in rng.choice(list(FILLERS), size=rng.integers(lengths[0], lengths[1] + 1))]
        place = int(rng.integers(len(text) + 1)) if at is None else at
        for marker, side in sides.items():
            side.append("".join([*text[:place], marker, *text[place:]]) + "=")
    answers = {"rule_answers": [RULE] * n, "memorized_answers": [MEMORY] * n}
    return PromptPairs.from_strings(memorized=sides["M"], generalized=sides["G"], seed=seed, **answers)


def hooks_on(model: Any) -> dict[str, int]:
    """How many hooks there are on each hook point of a model that has any, TransformerLens' and torch's own.

    A Bridge has several names for one hook point: it goes by the one that a HookedTransformer has too.
    """
    old = {get_act_name(site, layer) for site in LAYER_SITES if site[:2] != "ln" for layer in range(model.cfg.n_layers)}
    points: dict[int, tuple[str, Any]] = {}
    for name, point in model.hook_dict.items():
        if id(point) not in points or name in old:
            points[id(point)] = name, point
    counts = {
        name: max(len(point.fwd_hooks), len(point._forward_hooks)) + len(point.bwd_hooks)
        for name, point in points.values()
    }
    return {name: count for name, count in counts.items() if count}


@torch.inference_mode()
def greedy_by_hand(model: Any, prompt: str, max_new_tokens: int) -> str:
    """A greedy completion, one prompt alone and without a cache: what every batched or cached one must equal."""
    tokens = model.to_tokens(prompt)
    made: list[int] = []
    for _ in range(max_new_tokens):
        made.append(int(model(tokens, attention_mask=torch.ones_like(tokens))[0, -1].argmax()))
        if made[-1] == model.tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, torch.tensor([[made[-1]]])], dim=1)
    return "".join(model.tokenizer.convert_ids_to_tokens([t for t in made if t != model.tokenizer.eos_token_id]))

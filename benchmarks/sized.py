"""One piece of work of each kind at any size: width, layers, MLP neurons a layer, pairs. All weights are drawn.

Does not measure (see `scaling`). Prompts are sums of 18 tokens, one character each; answers have two.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import training
from benchmarks.harness import Run

# Taken by name here, so that importing this module loads all of them: what a process holds before its work begins.
from memgen_lens import (
    ModelConfig,
    PromptPairs,
    attribute,
    attribute_streaming,
    complete,
    load_model,
    record,
    sweep_steering,
    tasks,
)
from memgen_lens.models import build_model
from memgen_lens.models.step import forward
from memgen_lens.models.tokens import tokenized

FRACTIONS, ALPHAS = (0.05, 0.1, 0.2, 0.4), (0.5, 1.0, 2.0, 4.0)
N_PERMUTATIONS, N_NEW = 1000, 2
TOKENIZER = tasks.Addition(n_digits=4).tokenizer


def training_step(width: int, n_layers: int, d_mlp: int, n_pairs: int) -> Run:
    """One optimizer step in float32 on both prompts of each pair (14 tokens, loss on the answer), as `train` takes."""
    size = {"width": width, "n_layers": n_layers, "d_mlp": d_mlp, "batch": 2 * n_pairs}
    return training.ours_float32(loss="answer", **size)


def recording(**size: int) -> Run:
    """`record` of one site."""
    model, pairs = _model(**size), _pairs(size["n_pairs"])
    return _dropped(lambda: record(model, pairs, ["post"], progress=False))


def streaming(**size: int) -> Run:
    """`attribute_streaming` of one site without its test, which is that of `attribute`."""
    model, pairs = _model(**size), _pairs(size["n_pairs"])
    how: dict[str, Any] = {"split": None, "n_permutations": 0, "progress": False}
    return _dropped(lambda: attribute_streaming(model, pairs, ["post"], **how))


def scores(**size: int) -> Run:
    """`attribute` on recorded activations, with its test of 1,000 permutations."""
    return _of_recorded(N_PERMUTATIONS, **size)


def scores_untested(**size: int) -> Run:
    """`attribute` on recorded activations, means and correlations alone."""
    return _of_recorded(0, **size)


def attribution_patching(**size: int) -> Run:
    """`attribute` of a model by gradients, without a test."""
    model, pairs = _model(**size), _pairs(size["n_pairs"])
    how: dict[str, Any] = {"method": "attribution_patching", "split": None, "n_permutations": 0, "progress": False}
    return _dropped(lambda: attribute(model, pairs, "post", **how))


def sweep(**size: int) -> Run:
    """`sweep_steering` of 4 x 4 settings both ways; all pairs flip by construction."""
    model = _model(**size)
    pairs = flipping(model, size["n_pairs"])
    ranked = attribute(record(model, pairs, ["post"]), "post", split=None, n_permutations=0)
    how: dict[str, Any] = {"top_fractions": FRACTIONS, "alphas": ALPHAS, "progress": False}

    def run() -> None:
        rows = sweep_steering(model, None, pairs, ranked, **how)
        assert {row.n for row in rows} == {size["n_pairs"]}, "a pair does not flip"

    return run


def listing(n_pairs: int) -> Run:
    """`PromptPairs.from_strings` of prompts of some 64 tokens: what pairs alone take."""
    sides = [_texts(n_pairs, seed) for seed in (0, 1)]
    answers = [[f"{word} {i}" for i in range(n_pairs)] for word in ("so", "no")]
    return _dropped(lambda: PromptPairs.from_strings(*sides, rule_answers=answers[0], memorized_answers=answers[1]))


def tokenizing(n_pairs: int, folder: str) -> Run:
    """Both prompts of each pair, some 64 tokens each, by the tokenizer in a folder; the answer: how many tokens."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = build_model(ModelConfig(n_layers=1, d_model=4, n_heads=1, d_mlp=4), tokenizer, n_ctx=128, seed=0)
    texts = [*_texts(n_pairs, 0), *_texts(n_pairs, 1)]
    return lambda: int(tokenized(model, texts)[1].sum())


def one_token(n_layers: int) -> Run:
    """A forward pass of one token by a Bridge so narrow that what is left is the pass itself, layer by layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": n_layers, "vocab_size": len(TOKENIZER), "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    bridge = load_model(model.eval(), tokenizer=TOKENIZER)
    tokens = torch.ones(1, 1, dtype=torch.long)

    def run() -> None:
        with torch.inference_mode():
            forward(bridge, tokens, tokens)

    return run


def flipping(model: Any, n_pairs: int) -> PromptPairs:
    """Pairs with what the model says on either prompt as their answers, two tokens that differ; all in ``tune``.

    Raises:
        RuntimeError: The model says too little.
    """
    texts = _prompts(6 * n_pairs + 64)
    said = complete(model, texts, max_new_tokens=N_NEW, progress=False)
    whole = [(text, answer) for text, answer in zip(texts, said, strict=True) if answer]
    half = len(whole) // 2
    couples = [(m, g) for m, g in zip(whole[:half], whole[half:], strict=False) if m[1] != g[1]][:n_pairs]
    if len(couples) < n_pairs:
        raise RuntimeError(f"{len(couples)} of {n_pairs} pairs with two answers")
    (mem, recalled), (gen, computed) = (tuple(zip(*side, strict=True)) for side in zip(*couples, strict=True))
    how: dict[str, Any] = {"match": "exact", "max_new_tokens": N_NEW}
    pairs = PromptPairs.from_strings(mem, gen, memorized_answers=recalled, rule_answers=computed, **how)
    return replace(pairs, split=np.full(n_pairs, "tune"))


def _of_recorded(n_permutations: int, **size: int) -> Run:
    threadpool_limits(torch.get_num_threads())  # numpy's products, which torch's threads do not tell
    recorded = record(_model(**size), _pairs(size["n_pairs"]), ["post"], progress=False)
    how: dict[str, Any] = {"split": None, "n_permutations": n_permutations, "progress": False}
    return _dropped(lambda: attribute(recorded, "post", **how))


def _dropped(work: Callable[[], Any]) -> Run:
    """The work, whose result no one waits for."""

    def run() -> None:
        work()

    return run


def _model(width: int, n_layers: int, d_mlp: int, n_pairs: int) -> Any:
    config = ModelConfig(n_layers=n_layers, d_model=width, n_heads=4, d_mlp=d_mlp, act_fn="gelu_new")
    model = build_model(config, TOKENIZER, n_ctx=32, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn, all prompts would be answered alike
            parameter.mul_(3)
    return model.eval()


def _prompts(n: int) -> list[str]:
    """Sums of eight digits: what few prompts share is their first three or four tokens of 18."""
    return [f"{a:08}+{b:08}=" for a, b in np.random.default_rng(0).integers(10**8, size=(n, 2)).tolist()]


def _pairs(n: int) -> PromptPairs:
    """Sums beside other sums, with two answers of two digits."""
    texts, first = _prompts(2 * n), np.random.default_rng(1).integers(100, size=n)
    rule, recalled = ([f"{value:02}" for value in values] for values in (first, (first + 7) % 100))
    return PromptPairs.from_strings(texts[:n], texts[n:], rule_answers=rule, memorized_answers=recalled)


def _texts(n: int, seed: int) -> list[str]:
    """Texts of 60 short words."""
    words = np.array(
        ["the", "of", "and", "to", "in", "is", "was", "for", "on", "with", "from", "they", "small", "river"]
    )
    rows = words[np.random.default_rng(seed).integers(len(words), size=(n, 58))]
    return [f"{' '.join(row)} {seed} {i}" for i, row in enumerate(rows)]


KINDS: dict[str, Callable[..., Run]] = {
    "training step": training_step,
    "record": recording,
    "attribute_streaming": streaming,
    "attribute, 1,000 permutations": scores,
    "attribution patching": attribution_patching,
    "sweep_steering, 16 settings": sweep,
}
"""What is measured on every axis."""
HOST: dict[str, tuple[Callable[..., Run], str, Sequence[int]]] = {
    "attribute, untested": (scores_untested, "n_pairs", (256, 512, 1024, 2048)),
    "pairs of 64 tokens in memory": (listing, "n_pairs", (2_000, 4_000, 8_000, 16_000, 32_000)),
    "tokenizing": (tokenizing, "n_pairs", (250, 500, 1_000, 2_000)),
    "a Bridge's pass of one token": (one_token, "n_layers", (4, 8, 16, 32)),
}
"""What arithmetic on paper needs of the machine beside a GPU: the work, its one axis and the sizes."""

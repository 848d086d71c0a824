"""Mean differences of all MLP neurons: ours in one streaming pass, a cache of everything, and steering-vectors."""

from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.harness import Row, Run

N_LAYERS, WIDTH, N_HEADS = 4, 256, 4


def rows() -> list[Row]:
    """Ten times the prompts: the work grows, the memory must not."""
    return [
        Row(
            f"NMD of all MLP neurons, {n_prompts:,} prompts, {N_LAYERS} layers, width {WIDTH}",
            {"ours": ours, "run_with_cache, then numpy": cache_everything, "steering-vectors": steering_vectors},
            {"n_prompts": n_prompts},
            rounds=4 if n_prompts < 10_000 else 2,
            tolerance=1e-5,
            flops=2 * n_prompts * 12 * N_LAYERS * 12 * WIDTH**2,
        )
        for n_prompts in (2_000, 20_000)
    ]


def ours(n_prompts: int) -> Run:
    """`attribute_streaming` without the permutation test, which the others do not have."""
    model, pairs = hooked(hugging_face()), _pairs(n_prompts)

    def run() -> np.ndarray:
        return mg.attribute_streaming(model, pairs, ["post"], split=None, n_permutations=0)["post"].nmd

    return run


def cache_everything(n_prompts: int) -> Run:
    """TransformerLens' cache of every activation, batch by batch; the neurons at the last position are kept."""
    model, pairs = hooked(hugging_face()), _pairs(n_prompts)

    def last(prompts: list[str]) -> np.ndarray:
        kept = []
        with torch.no_grad():
            for first in range(0, len(prompts), 256):
                _, cache = model.run_with_cache(model.to_tokens(prompts[first : first + 256]))
                kept.append(np.stack([cache["post", layer][:, -1].numpy() for layer in range(N_LAYERS)], axis=1))
        return np.concatenate(kept)

    def run() -> np.ndarray:
        sides = ([item.prompt for item in side] for side in (pairs.memorized, pairs.generalized))
        memorized, generalized = map(last, sides)
        return (memorized - generalized).mean(0)

    return run


def steering_vectors(n_prompts: int) -> Run:
    """The package `steering-vectors` on the same weights in Hugging Face's GPT-2, right padding."""
    from steering_vectors import train_steering_vector

    model, pairs = hugging_face(), _pairs(n_prompts)
    tokenizer = mg.tasks.Addition(n_digits=4).tokenizer
    tokenizer.padding_side = "right"
    samples = [(mem.prompt, gen.prompt) for mem, gen in zip(pairs.memorized, pairs.generalized, strict=True)]

    def run() -> np.ndarray:
        vector = train_steering_vector(
            model, tokenizer, samples, layer_type="mlp", layer_config={"mlp": "transformer.h.{num}.mlp.act"},
            batch_size=256,
        )  # fmt: skip
        return np.stack([vector.layer_activations[layer].numpy() for layer in range(N_LAYERS)])

    return run


def _pairs(n_prompts: int) -> mg.PromptPairs:
    """Sums of four digits and their swaps: prompts of ten tokens, n of them in all."""
    operands = np.random.default_rng(0).integers(10_000, size=(n_prompts // 2, 2))
    sides = ([f"{a:04}+{b:04}=" for a, b in rows] for rows in (operands, operands[:, ::-1]))
    return mg.PromptPairs.from_strings(*sides)


def hugging_face() -> Any:
    """A random GPT-2 of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": N_HEADS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(mg.tasks.Addition().tokenizer), **shape))
    with torch.no_grad():
        for parameter in model.parameters():  # random weights this small would leave every neuron near zero
            parameter.mul_(3)
    return model.eval()


def hooked(model: Any) -> Any:
    """The same weights as a HookedTransformer."""
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    from memgen_lens.models import build_model

    config = mg.ModelConfig(
        n_layers=N_LAYERS, d_model=WIDTH, n_heads=N_HEADS, d_mlp=4 * WIDTH, act_fn="gelu_new", normalization_type="LN"
    )
    made = build_model(config, mg.tasks.Addition(n_digits=4).tokenizer, n_ctx=24, seed=0)
    weights = convert_gpt2_weights(model, made.cfg)
    made.load_state_dict({**made.state_dict(), **weights})
    return made.eval()

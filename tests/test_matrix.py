"""Every kind of HookedTransformer against a loop written by hand: one prompt alone, no cache, no padding.

64 configurations, each recorded, completed and steered, with a cache and without. What is said is checked token by
token: given all before it, the token must be the one with the largest logit, to the rounding of the model's numbers.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import bridges
import numpy as np
import pytest
import torch
from transformer_lens.utilities import get_act_name
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import memgen_lens as mg
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.records import NeuronScores
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER

if HAS_HOOKED_TRANSFORMER:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

pytestmark = pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
PROMPTS = ["ab", "1+2=", "q<eos>z", "12+34=", "abcdefghi", "7"]
NEW = 3
POSITIONS = {
    "standard": {"positional_embedding_type": "standard"},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_key_value_heads": 2},
    "ungrouped": {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "parallel": {"parallel_attn_mlp": True},
    "attention only": {"attn_only": True},
    "soft caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "folded": {"change": "folded"},
    "tied": {"change": "tied"},
    "one layer": {"n_layers": 1},
    "bos": {"default_prepend_bos": True},
    "left": {"side": "left", "pad": "<eos>"},
    "slow": {"slow": True},
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
}
MATRIX = [(position, kind) for position in POSITIONS for kind in KINDS]
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of the largest number."""

matrix = pytest.mark.parametrize(("position", "kind"), MATRIX, ids=[f"{p}-{k}" for p, k in MATRIX])


class SlowTokenizer(PreTrainedTokenizer):
    """One token a character, in Python."""

    def __init__(self, **special: Any) -> None:
        self._ids = {token: i for i, token in enumerate([*SPECIAL, *bridges.CHARACTERS])}
        super().__init__(**special)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **how: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return [*SPECIAL, *bridges.CHARACTERS][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@lru_cache(maxsize=1)
def model_of(position: str, kind: str) -> Any:
    """The model of a configuration; no weight, bias or norm is at a value that hides a mistake."""
    settings = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 24,
        "d_head": 4,
        "n_heads": 4,
        "d_mlp": 20,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "d_vocab": len(SPECIAL) + len(bridges.CHARACTERS),
        "default_prepend_bos": False,
        "device": "cpu",
        "seed": 0,
    }
    settings |= POSITIONS[position] | KINDS[kind]
    change, slow = settings.pop("change", None), settings.pop("slow", False)
    side, pad = settings.pop("side", "right"), settings.pop("pad", "<pad>")
    with warnings.catch_warnings(), TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")  # TransformerLens warns that HookedTransformer will go
        if slow:
            tokenizer: Any = SlowTokenizer(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
        else:
            bridges.character_tokenizer(pad_token=pad).save_pretrained(directory)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer, default_padding_side=side)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
            model.unembed.b_U[[0, 2, 3]] = -1e4  # said by no model
        if change == "folded":
            model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
        if change == "tied":
            model.unembed.W_U.data = model.embed.W_E.data.T.contiguous()
    return model.eval()


def watch(model: Any, token_ids: torch.Tensor, hooks: list[tuple[str, Any]]) -> torch.Tensor:
    """Logits behind the last position of one sequence, run alone."""
    with torch.inference_mode():
        mask = torch.ones_like(token_ids)
        return model.run_with_hooks(token_ids, attention_mask=mask, fwd_hooks=hooks)[0, -1].double()


def alone(model: Any, prompt: str) -> torch.Tensor:
    """The tokens of a prompt, begin-of-text before it where the configuration says so."""
    ids = [
        SPECIAL.index("<eos>") if part == "<eos>" else model.tokenizer.convert_tokens_to_ids(part)
        for part in split(prompt)
    ]
    bos = [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    return torch.tensor([bos + ids])


def split(text: str) -> list[str]:
    """Special tokens and characters."""
    parts: list[str] = []
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), text[0])
        parts.append(special)
        text = text[len(special) :]
    return parts


def check_said(model: Any, prompt: str, said: str, hooks_of: Any = lambda answer: []) -> None:
    """Each token of a completion has the largest logit of its step, by hand; it ends at NEW tokens or at eos."""
    eos = model.tokenizer.eos_token_id
    tokens = alone(model, prompt)
    answer = tokens.shape[1] - 1
    new = [model.tokenizer.convert_tokens_to_ids(part) for part in split(said)]
    assert len(new) <= NEW
    for token in [*new, eos][:NEW]:
        logits = watch(model, tokens, hooks_of(answer))
        spread = logits[4:].abs().max()
        assert logits[token] >= logits.max() - 10 * ROUNDING[model.cfg.dtype] * spread, (prompt, said)
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def both_ways(complete: Callable[[dict[str, bool]], list[str]]) -> list[tuple[str, str]]:
    """Prompts and what is said to them with a cache and without; what is said both times stands once."""
    said = [zip(PROMPTS, complete({"use_cache": use_cache}), strict=True) for use_cache in (True, False)]
    return list(dict.fromkeys(chain.from_iterable(said)))


def sites_of(model: Any) -> list[str]:
    return ["resid_pre", "attn_out", "z", "resid_post", *([] if model.cfg.attn_only else ["post", "mlp_out"])]


def scores_of(model: Any, site: str) -> NeuronScores:
    width = {"z": 16, "post": 20}.get(site, 16)
    rng = np.random.default_rng(0)
    shape = (model.cfg.n_layers, width)
    rho = rng.uniform(-1, 1, shape)
    return NeuronScores(site, 2 * rng.standard_normal(shape), rho, np.ones(shape), np.ones(shape), np.ones(shape), 8, 8)


def by_hand(steer: Steering, toward: str, answer: int) -> list[tuple[str, Any]]:
    """Hooks that add the shift where the setting says, of one whole sequence."""
    sign = 1.0 if toward == "memorization" else -1.0
    where = {"all": slice(None), "prompt": slice(answer, answer + 1), "answer": slice(answer, None)}

    def hook_of(layer: int) -> Any:
        def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            new = activation.flatten(2).clone()
            new[:, where[steer.setting.positions]] += (sign * torch.tensor(steer.shift[layer])).to(new.dtype)
            return new.view_as(activation)

        return hook

    return [(get_act_name(steer.setting.site, layer), hook_of(layer)) for layer in range(len(steer.shift))]


@matrix
def test_recorded_numbers_are_those_of_one_prompt_alone(position, kind):
    model = model_of(position, kind)
    sites = sites_of(model)
    pairs = mg.PromptPairs.from_strings(PROMPTS, PROMPTS[::-1])
    acts = mg.record(model, pairs, sites, progress=False)
    names = {site: [get_act_name(site, layer) for layer in range(model.cfg.n_layers)] for site in sites}
    names["embedding"] = ["blocks.0.hook_resid_pre"]
    for i, prompt in enumerate(PROMPTS):
        kept: dict[str, torch.Tensor] = {}

        def keep(activation, hook, kept=kept):
            kept[hook.name] = activation[0, -1].flatten().float().clone()

        watch(model, alone(model, prompt), [(name, keep) for group in names.values() for name in group])
        for site, group in names.items():
            found = acts.embedding if site == "embedding" else acts.site(site)
            expected = torch.stack([kept[name] for name in group]).numpy()
            bound = ROUNDING[model.cfg.dtype] * np.abs(expected).max()
            np.testing.assert_allclose(found.memorized[i], expected, rtol=0, atol=bound)
            np.testing.assert_allclose(found.generalized[len(PROMPTS) - 1 - i], expected, rtol=0, atol=bound)


@matrix
def test_completions_are_those_of_one_prompt_alone_with_a_cache_and_without(position, kind):
    model = model_of(position, kind)
    for prompt, said in both_ways(lambda how: mg.complete(model, PROMPTS, max_new_tokens=NEW, progress=False, **how)):
        check_said(model, prompt, said)


@matrix
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_steered_completions_are_those_of_hooks_written_by_hand(position, kind, positions):
    model = model_of(position, kind)
    for site in ("resid_post", "z"):
        steer = Steering.from_scores(scores_of(model, site), 0.3, 20.0, positions=positions)
        none = replace(steer, selected=np.zeros_like(steer.selected), shift=np.zeros_like(steer.shift))
        asked: dict[str, Any] = {"toward": "generalization", "max_new_tokens": NEW}
        plain = mg.complete(model, PROMPTS, max_new_tokens=NEW, progress=False)

        def steered(how, steer=steer, none=none, asked=asked, plain=plain):
            changed, left = steered_outputs(model, PROMPTS, [steer, none], **asked, **how)
            assert changed != left
            if model.cfg.dtype in (torch.float32, torch.float64):
                assert left == plain
            return changed

        for prompt, said in both_ways(steered):
            check_said(model, prompt, said, lambda answer, steer=steer: by_hand(steer, "generalization", answer))


@matrix
def test_completions_under_applied_are_those_of_hooks_written_by_hand(position, kind):
    model = model_of(position, kind)
    steer = Steering.from_scores(scores_of(model, "resid_post"), 0.3, 2.0)
    with steer.applied(model, toward="memorization"):
        said = both_ways(lambda how: mg.complete(model, PROMPTS, max_new_tokens=NEW, progress=False, **how))
    for prompt, text in said:
        check_said(model, prompt, text, lambda answer: by_hand(steer, "memorization", answer))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())

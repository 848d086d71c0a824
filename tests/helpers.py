"""Small models and tasks that several tests need."""

import resource
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

import memgen_lens as mg
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER
from memgen_lens.models.native import draw_weights, native_bridge, set_state, state_of
from memgen_lens.training.trainer import TrainingRun

if HAS_HOOKED_TRANSFORMER:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

hooked_only = pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
"""For tests of what only a HookedTransformer has; all others run on both versions."""

either_kind = pytest.mark.parametrize(
    "native", [pytest.param(False, marks=hooked_only, id="HookedTransformer"), pytest.param(True, id="native Bridge")]
)
"""For tests that run on both kinds of model."""

SMALL_TASK = mg.tasks.Addition(
    n_digits=2, n_memorized=80, memory_length=2, reverse_sum=False, n_heldout=60, n_validation=60, seed=0
)
SMALL_TRAINING = mg.TrainConfig(
    model=mg.ModelConfig(n_layers=2, d_model=96, n_heads=3, d_mlp=256, act_fn="relu"),
    max_steps=500,
    batch_size=192,
    learning_rate=3e-3,
    checkpoint_every=100,
    target_generalization=0.9,
    target_memorization=0.95,
)


def train_small(**arguments) -> TrainingRun:
    """Train on addition until most memorized prompts flip when rephrased (about 20 seconds)."""
    return mg.train(SMALL_TASK, SMALL_TRAINING, progress=False, **arguments)


def tiny_task(**settings) -> mg.tasks.Addition:
    """One-digit sums: made in no time."""
    return mg.tasks.Addition(
        **{"n_digits": 1, "n_memorized": 10, "memory_length": 2, "n_heldout": 6, "n_validation": 6} | settings
    )


class Letters(mg.tasks.Addition):
    """Sums whose memorized strings are letters, for a tokenizer of characters."""

    @property
    def name(self) -> str:
        return "letters"

    @property
    def splits(self):
        def written(item):
            recalled = item.memorized_answer
            return replace(item, task="letters", memorized_answer=recalled and recalled.strip("<>").replace("-", "x"))

        return {split: tuple(map(written, items)) for split, items in super().splits.items()}


def letters_task() -> Letters:
    """One-digit sums for the tokenizer of `bridges`."""
    return Letters(n_digits=1, n_memorized=10, memory_length=2, n_heldout=6, n_validation=6)


def tiny_training(**settings) -> mg.TrainConfig:
    """One layer of width 32, whose step takes milliseconds; no target is ever reached."""
    return mg.TrainConfig(
        **{
            "model": mg.ModelConfig(n_layers=1, d_model=32, n_heads=2, d_mlp=64),
            "max_steps": 60,
            "batch_size": 32,
            "warmup_steps": 5,
            "eval_every": 20,
            "checkpoint_every": 10,
            "target_generalization": 1.0,
            "target_memorization": 1.0,
        }
        | settings
    )


def model_of(settings: dict[str, Any], tokenizer: Any = None, *, native: bool = False) -> Any:
    """TransformerLens' own model of these settings: a HookedTransformer, or a native Bridge (on 4.x, or if asked for).

    Its parameters go by a HookedTransformer's names in `weights`, on either kind.
    """
    if native or not HAS_HOOKED_TRANSFORMER:
        model = native_bridge(settings, tokenizer, device="cpu")
        draw_weights(model, seed=settings["seed"])
        return model
    settings = dict(settings)
    side = settings.pop("default_padding_side", "right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens warns that HookedTransformer will go
        cfg = HookedTransformerConfig(**settings)
        if tokenizer is None:
            return HookedTransformer(cfg)
        return HookedTransformer(cfg, tokenizer=deepcopy(tokenizer), default_padding_side=side)


def weights(model: Any) -> Any:
    """A model's parameters by a HookedTransformer's names: what is written there is in the model."""
    return parameters_of(model)


def small_settings(**settings) -> dict[str, Any]:
    """Settings of a small model, by TransformerLens' names."""
    return {
        "n_layers": 3,
        "d_model": 24,
        "n_ctx": 16,
        "d_head": 6,
        "n_heads": 4,
        "d_mlp": 40,
        "d_vocab": 13,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "device": "cpu",
        "seed": 0,
    } | settings


def hooked_transformer(*, native: bool = False, **settings) -> Any:
    """A small model of TransformerLens' on which no weight, bias or norm is at a value that hides a mistake."""
    model = model_of(small_settings(**settings), native=native)
    generator = torch.Generator().manual_seed(1)
    state = state_of(model)  # in one order for both kinds of model, so that they get the same numbers
    for name, value in state.items():
        if not name.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")):
            state[name] = value + 0.15 * torch.randn(value.shape, generator=generator)
    set_state(model, state)
    return model.eval()


def watched(model: Any) -> AbstractContextManager[Any]:
    """A hook that changes nothing: with it, TransformerLens' own forward runs in place of the fast one."""
    return model.hooks(fwd_hooks=[("hook_embed", lambda activation, hook: activation)])


def unwatched(model: Any) -> AbstractContextManager[Any]:
    """No hook."""
    return nullcontext()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: on tiny tensors two wait for each other, on a busy machine for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: writing more fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

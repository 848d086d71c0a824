"""A tiny tuning run: base, task and settings, and what its models say."""

import bridges
import helpers
import torch

import memgen_lens as mg

IDS = torch.tensor([[14, 9, 7, 30, 11], [4, 4, 21, 6, 17]])
TASK = helpers.letters_task()


def settings(**changes) -> mg.FinetuneConfig:
    """Thirty steps of milliseconds; no target is ever reached."""
    adapters = {} if changes.get("method") == "full" else {"rank": 4}
    return mg.FinetuneConfig(
        **adapters
        | {
            "max_steps": 30,
            "batch_size": 12,
            "generic_steps": 3,
            "learning_rate": 1e-2,
            "eval_every": 10,
            "checkpoint_every": 5,
            "target_generalization": 1.0,
            "target_memorization": 1.0,
        }
        | changes
    )


def base(kind: str = "llama"):
    return mg.load_model(bridges.hugging_face(kind), tokenizer=bridges.character_tokenizer())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def assert_same(one, other, tolerance: float = 1e-5) -> None:
    assert (one - other).abs().max() <= tolerance * other.abs().max()

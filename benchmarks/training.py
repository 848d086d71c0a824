"""One optimizer step: ours, a TransformerLens step, and Hugging Face's GPT-2."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

import memgen_lens as mg
from benchmarks.harness import Row, Run
from memgen_lens.fast.memory import freed_memory_kept
from memgen_lens.models import build_model
from memgen_lens.training.forward import Rows, labelled_logits, labelled_loss

N_POSITIONS, N_PROMPT = 14, 8
_MEMORY = ExitStack()  # held until the process of ours ends


def rows() -> list[Row]:
    """Steps of four sizes, with loss on the answer; and one with loss on the whole sequence (the paper's)."""
    sizes = [(2, 128, 512, "answer"), (4, 128, 512, "answer"), (4, 128, 512, "sequence")]
    sizes += [(4, 256, 512, "answer"), (12, 768, 64, "answer")]
    return [
        Row(
            f"training step, {n_layers} layers, width {width}, {batch} x {N_POSITIONS} tokens, loss on the {loss}",
            {
                "ours": ours,
                "ours, float32": ours_float32,
                "TransformerLens, float32": lens_float32,
                "TransformerLens, bf16 autocast": lens_bf16,
                "Hugging Face GPT-2, float32": hugging_face_float32,
                "Hugging Face GPT-2, bf16 autocast": hugging_face_bf16,
            },
            {"n_layers": n_layers, "width": width, "batch": batch, "loss": loss},
            rounds=9 if width < 768 else 2,
            flops=6 * batch * N_POSITIONS * n_layers * 12 * width**2,
            precision="bfloat16",
        )
        for n_layers, width, batch, loss in sizes
    ]


def ours(**size: Any) -> Run:
    """The fast forward under bf16 autocast, as `train` runs it with precision="auto" where bf16 is native."""
    return _ours(bf16=True, **size)


def ours_float32(**size: Any) -> Run:
    """The fast forward with precision="float32"."""
    return _ours(bf16=False, **size)


def lens_float32(**size: Any) -> Run:
    """TransformerLens' own forward."""
    return _lens(bf16=False, **size)


def lens_bf16(**size: Any) -> Run:
    """TransformerLens' own forward under bf16 autocast."""
    return _lens(bf16=True, **size)


def hugging_face_float32(**size: Any) -> Run:
    """GPT2LMHeadModel of the same shape."""
    return _hugging_face(bf16=False, **size)


def hugging_face_bf16(**size: Any) -> Run:
    """GPT2LMHeadModel under bf16 autocast."""
    return _hugging_face(bf16=True, **size)


def _ours(*, bf16: bool, n_layers: int, width: int, batch: int, loss: str, d_mlp: int | None = None) -> Run:
    model = _hooked(n_layers, width, d_mlp)
    inputs, labels = _data(batch, loss)
    groups = [
        Rows(
            inputs, labels, int((labels != -100).any(0).int().argmax()), torch.full((len(inputs),), inputs.shape[1] + 1)
        )
    ]
    _MEMORY.enter_context(freed_memory_kept())  # as `train` does

    def of_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = labelled_logits(model, groups)
        return labelled_loss(logits, groups)

    return _step(model, of_loss)


def _lens(*, bf16: bool, n_layers: int, width: int, batch: int, loss: str) -> Run:
    model = _hooked(n_layers, width)
    return _step(model, _cross_entropy(model, bf16, batch, loss))


def _hugging_face(*, bf16: bool, n_layers: int, width: int, batch: int, loss: str) -> Run:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": 24, "n_embd": width, "n_layer": n_layers, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(mg.tasks.Addition().tokenizer), **shape, **dropout))
    return _step(model, _cross_entropy(lambda tokens: model(tokens).logits, bf16, batch, loss))


def _hooked(n_layers: int, width: int, d_mlp: int | None = None) -> Any:
    neurons = d_mlp or 4 * width
    config = mg.ModelConfig(n_layers=n_layers, d_model=width, n_heads=4, d_mlp=neurons, act_fn="gelu_new")
    return build_model(config, mg.tasks.Addition().tokenizer, n_ctx=24, seed=0)


def _data(batch: int, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(20, (batch, N_POSITIONS + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    if loss == "answer":
        labels[:, :N_PROMPT] = -100
    return tokens[:, :-1].contiguous(), labels


def _cross_entropy(forward: Callable[..., torch.Tensor], bf16: bool, batch: int, loss: str) -> Any:
    inputs, labels = _data(batch, loss)

    def of_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    return of_loss


def _step(model: torch.nn.Module, of_loss: Callable[[], torch.Tensor]) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        loss = of_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    return run

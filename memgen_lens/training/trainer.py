"""Train a HookedTransformer on a designed task until it both recalls and computes.

Does not know which task it is, nor what the model is trained for afterwards.
"""

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from memgen_lens.behavior import observe
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import TrainConfig
from memgen_lens.core.errors import ModelError
from memgen_lens.core.files import write_jsonl
from memgen_lens.core.records import Evaluation
from memgen_lens.core.types import Behavior
from memgen_lens.fast.memory import freed_memory_kept
from memgen_lens.fast.support import why_not
from memgen_lens.models.build import build_model, require_device
from memgen_lens.models.save import save_model
from memgen_lens.training.batches import Batches
from memgen_lens.training.checkpoints import load_newest, save_checkpoint
from memgen_lens.training.forward import Rows, labelled_logits, labelled_loss
from memgen_lens.training.run_files import append_history, prepared, read_history

SPARE_POSITIONS = 8
"""Positions of the context beyond the longest training sequence."""


@dataclass(frozen=True)
class TrainingRun:
    """A trained model and how it came about.

    Attributes:
        model: The HookedTransformer, in evaluation mode, with the task's tokenizer.
        task: The task it was trained on.
        config: The settings it was trained with.
        history: One record a measurement.
        stop_reason: Why training stopped: both targets reached, or no steps left.
        out: The run directory, if it has one.
    """

    model: Any
    task: Any
    config: TrainConfig
    history: tuple[Evaluation, ...]
    stop_reason: str
    out: Path | None


@arguments(
    task=kinds.TaskLike,
    config=kinds.one(TrainConfig) | None,
    out=kinds.place("train(out=...)") | None,
    resume=kinds.Flag,
    force=kinds.Flag,
    progress=kinds.Flag,
)
def train(
    task: Any,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> TrainingRun:
    """Train a model on a task until it shows both behaviours, or the steps run out.

    Each batch holds generic items (answered by the rule) and memorized ones (answered with their own string). Both
    behaviours are measured every ``eval_every`` steps, on the validation prompts and on the memorized ones; the
    paper's rule (arXiv 2412.18497, section 3) keeps the model once it shows both.

    Args:
        task: A task (`memgen_lens.tasks`).
        config: Settings; the default trains 2 layers of width 128.
        out: Run directory to write ``history.jsonl``, ``checkpoints/`` and ``model/`` into; None keeps all in memory.
        resume: Go on from the newest whole checkpoint in ``out``. On one machine the result is the same, bit for
            bit, as that of a run that was never cut.
        force: Train anew where ``out`` holds a run already.
        progress: Show a progress bar with both behaviours.

    Raises:
        RunDirectoryError: ``out`` holds a run already (and neither ``resume`` nor ``force``), holds one with other
            settings (``resume``), holds somebody else's file where one of the run's would be, is being written by
            another process, or cannot be written.
        ModelError: The loss is not finite, the device is not there, or the call stands in ``torch.inference_mode()``.
        SettingsError: ``resume`` without ``out``.
    """
    config = config or TrainConfig()
    require_device(config.device, call="train")
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "train",
            expected="a call outside torch.inference_mode()",
            received="one inside it, where nothing can be trained",
            fix="Call it before the with block, or below a function without @torch.inference_mode().",
        )
    model = build_model(
        config.model,
        task.tokenizer,
        n_ctx=task.max_training_tokens + SPARE_POSITIONS,
        seed=config.seed,
        device=config.device,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    # A notebook may have switched gradients off at its top, as TransformerLens' own do.
    with prepared(task, config, out, resume=resume, force=force) as directory:
        with _own_random_state(config.seed), freed_memory_kept(), torch.enable_grad():
            state = None
            if resume and directory is not None:
                state = load_newest(directory / "checkpoints", model, optimizer, device=config.device)
            history, stop_reason = _loop(task, config, model, optimizer, directory, state, progress=progress)
        model.eval()
        if directory is not None:
            save_model(model, directory / "model")
    return TrainingRun(model, task, config, tuple(history), stop_reason, directory)


def _loop(
    task: Any,
    config: TrainConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    directory: Path | None,
    state: dict[str, Any] | None,
    *,
    progress: bool,
) -> tuple[list[Evaluation], str]:
    """The optimizer steps from ``state`` (or the beginning) to the end; returns the history and why it ended."""
    state = state or {
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "loss_sum": 0.0,
        "loss_steps": 0,
        "stop_reason": None,
    }
    step, tokens = state["step"], state["tokens"]
    history = [row for row in read_history(directory) if row.step <= step]
    if directory is not None:
        write_jsonl(directory / "history.jsonl", history)
    if state["stop_reason"] is not None:
        return history, state["stop_reason"]

    forward = _Forward(model, config)
    losses = [torch.tensor(state["loss_sum"], dtype=torch.float64)] if state["loss_steps"] else []
    loss_steps, stop_reason = state["loss_steps"], None
    started = time.perf_counter() - state["seconds"]
    bar = tqdm(total=config.max_steps, initial=step, disable=not progress, desc=f"train {task.name}", unit="step")
    with bar:
        for groups in Batches(task, config).from_step(step, config.max_steps):
            losses.append(_step(forward, optimizer, groups, step, config))
            step, loss_steps = step + 1, loss_steps + 1
            tokens += _count_tokens(groups, task.tokenizer.pad_token_id)
            bar.update()
            if step % config.eval_every == 0 or step == config.max_steps:
                loss = float(torch.stack([x.double() for x in losses]).sum()) / loss_steps
                _require_finite(loss, step, config)
                rates = _measure(model, task)
                row = Evaluation(step, tokens, loss, *rates, seconds=round(time.perf_counter() - started, 3))
                history.append(row)
                losses, loss_steps = [], 0
                if directory is not None:
                    append_history(directory, row)
                bar.set_postfix(
                    loss=f"{loss:.3f}",
                    recalls=f"{row.memorization:.3f}",
                    computes=f"{row.generalization:.3f}",
                )
                stop_reason = _stop_reason(row, config)
            if directory is not None and (step % config.checkpoint_every == 0 or stop_reason):
                kept = {
                    "tokens": tokens,
                    "seconds": time.perf_counter() - started,
                    "loss_sum": float(torch.stack([x.double() for x in losses]).sum()) if losses else 0.0,
                    "loss_steps": loss_steps,
                    "stop_reason": stop_reason,
                }
                _require_finite(kept["loss_sum"], step, config)
                save_checkpoint(directory / "checkpoints", step, model, optimizer, kept)
            if stop_reason:
                break
    assert stop_reason is not None, "the last step is always measured"
    return history, stop_reason


class _Forward:
    """The labelled logits of a batch: by the fast forward where the model allows, else by TransformerLens' own."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        self.model, self.device = model, config.device
        reason = why_not(model.cfg)
        self.fast = reason is None
        if reason is not None:
            tqdm.write(f"training with TransformerLens' own forward: {reason}")
        self.bf16 = config.precision == "auto" and multiplies_bf16(config.device)

    def loss(self, groups: list[Rows]) -> torch.Tensor:
        groups = [rows.to(self.device) for rows in groups]
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.fast:
                logits = labelled_logits(self.model, groups)
            else:
                logits = torch.cat([self.model(rows.tokens)[:, rows.start :].flatten(0, 1) for rows in groups])
        return labelled_loss(logits, groups)


def multiplies_bf16(device: str) -> bool:
    """Whether a device multiplies bfloat16 natively (AVX512-BF16, AMX, Arm BF16, or a CUDA card from Ampere on)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu":
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _step(
    forward: _Forward, optimizer: torch.optim.Optimizer, groups: list[Rows], step: int, config: TrainConfig
) -> torch.Tensor:
    """One optimizer step; returns the detached loss."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(step, config)
    loss = forward.loss(groups)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(forward.model.parameters(), config.max_grad_norm, foreach=True)
    optimizer.step()
    return loss.detach() + 0 * norm.detach()  # a gradient that is not finite shows in the loss that is checked


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then linear decay to zero after the last step."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.learning_rate * warmup * (1 - step / config.max_steps)


def _measure(model: Any, task: Any) -> tuple[float, float, float]:
    """Rule's answers on validation prompts, recall of memorized ones, rule's answers on their rephrasings."""

    def rate(split: Any, behavior: Behavior) -> float:
        outcomes = observe(model, task, split=split, progress=False)
        return sum(outcome.behavior is behavior for outcome in outcomes) / len(outcomes)

    model.eval()
    rates = (
        rate("validation", Behavior.GENERALIZATION),
        rate("memorized", Behavior.MEMORIZATION),
        rate("rephrased", Behavior.GENERALIZATION),
    )
    model.train()
    return rates


def _stop_reason(row: Evaluation, config: TrainConfig) -> str | None:
    if row.generalization >= config.target_generalization and row.memorization >= config.target_memorization:
        return f"both targets reached at step {row.step}"
    if row.step == config.max_steps:
        return f"no steps left after {row.step}"
    return None


def _require_finite(loss: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        raise ModelError(
            "train",
            expected="a finite loss",
            received=f"{loss} at or before step {step}",
            fix=f"Lower learning_rate (now {config.learning_rate:g}) or max_grad_norm, or train with "
            "precision='float32'; resume=True goes on from the last checkpoint.",
        )


def _count_tokens(groups: list[Rows], pad: int) -> int:
    """Sequence tokens of a batch, the last of each counted, padding not."""
    # The last token of the longest sequences is a label alone.
    return sum(int((rows.tokens != pad).sum()) + int((rows.labels[:, -1] != -100).sum()) for rows in groups)


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed torch for the training alone; the caller's random state is as it was afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

"""The optimizer steps from the first to the last, whatever it is that learns: measured, kept, stopped.

Does not know models: see `trainer` (from scratch) and `finetune` (pretrained).
"""

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memgen_lens import processes
from memgen_lens.core.config import LearningConfig
from memgen_lens.core.errors import ModelError, RunDirectoryError
from memgen_lens.core.files import write_jsonl
from memgen_lens.core.records import Evaluation
from memgen_lens.training.batches import Batches
from memgen_lens.training.checkpoints import load_newest, save_checkpoint
from memgen_lens.training.forward import Rows
from memgen_lens.training.run_files import append_history, read_history
from memgen_lens.training.shares import draw_by_row, n_labels, share_of, summed

START = {"step": 0, "tokens": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_steps": 0, "stop_reason": None}


@runtime_checkable
class Teachable(Protocol):
    """What a step teaches."""

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The weights that are trained."""
        ...

    def loss(self, groups: list[Rows]) -> Tensor:
        """Mean cross-entropy (nats a labelled token) of a batch."""
        ...


@runtime_checkable
class Learner(Teachable, Protocol):
    """What learns from the first step to the last."""

    def measure(self) -> tuple[float, float, float]:
        """Rule's answers on validation prompts, recall of memorized ones, rule's answers on their rephrasings."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps."""
        ...

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set what a checkpoint has kept."""
        ...


def learn(
    call: str,
    task: Any,
    config: LearningConfig,
    learner: Learner,
    batches: Batches,
    directory: Path | None,
    *,
    resume: bool,
    progress: bool,
) -> tuple[list[Evaluation], str]:
    """Train until both targets are reached or no steps are left, from the newest checkpoint if ``resume``.

    Of several processes the first measures and writes, and tells the others; all read the newest checkpoint.

    Returns:
        The history, and why it ended.

    Raises:
        ModelError: The loss is not finite.
        RunDirectoryError: The directory cannot be written, its checkpoints are the other version's, or processes see
            different ones.
        ProcessError: Another process of the run has died.
    """
    world = processes.world(call, config.device)
    optimizer = optimizer_of(learner, config)
    state = None
    if resume and directory is not None:
        state = load_newest(directory / "checkpoints", learner.set_weights, optimizer, device=config.device)
    state = state or START
    step, tokens = state["step"], state["tokens"]
    _require_one_step(call, step, directory)
    history = processes.by_first(call, lambda: _history_up_to(directory, step))
    if state["stop_reason"] is not None:
        return history, state["stop_reason"]

    losses = [torch.tensor(state["loss_sum"], dtype=torch.float64, device=config.device)] if state["loss_steps"] else []
    loss_steps, stop_reason = state["loss_steps"], None
    started = time.perf_counter() - state["seconds"]
    shown = progress and world.is_first
    bar = tqdm(total=config.max_steps, initial=step, disable=not shown, desc=f"{call} {task.name}", unit="step")
    with bar:
        for groups in batches.from_step(step, config.max_steps):
            losses.append(take_step(learner, optimizer, groups, step, config))
            step, loss_steps = step + 1, loss_steps + 1
            tokens += sum(int(rows.lengths.sum()) for rows in groups)
            bar.update()
            if step % config.eval_every == 0 or step == config.max_steps:
                loss = _total(losses) / loss_steps
                require_finite(call, loss, step, config)
                row = processes.by_first(call, partial(_measured, learner, directory, (step, tokens, loss), started))
                history.append(row)
                losses, loss_steps = [], 0
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
                    "loss_sum": _total(losses) if losses else 0.0,
                    "loss_steps": loss_steps,
                    "stop_reason": stop_reason,
                }
                require_finite(call, kept["loss_sum"], step, config)
                where, weights = directory / "checkpoints", learner.weights()
                processes.by_first(call, partial(save_checkpoint, where, step, weights, optimizer, kept))
            if stop_reason:
                break
    assert stop_reason is not None, "the last step is always measured"
    return history, stop_reason


def optimizer_of(learner: Teachable, config: LearningConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained, as the settings say."""
    return torch.optim.AdamW(
        learner.parameters,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def take_step(
    learner: Teachable, optimizer: torch.optim.Optimizer, groups: list[Rows], step: int, config: LearningConfig
) -> Tensor:
    """One optimizer step, shared out over the processes of the run; returns the detached loss."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(step, config)
    world = processes.world("training", config.device)
    if world.is_alone:
        loss = learner.loss(groups)
    else:
        draw_by_row(config, step, world)
        mine = share_of(groups, world)
        loss = learner.loss(mine) * (n_labels(mine) / n_labels(groups))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if not world.is_alone:
        loss = summed("training", learner.parameters, loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters, config.max_grad_norm, foreach=True)
    optimizer.step()
    return loss.detach() + 0 * norm.detach()  # a gradient that is not finite shows in the loss that is checked


def require_finite(call: str, loss: float, step: int, config: LearningConfig) -> None:
    """Refuse a loss that is not a number.

    Raises:
        ModelError: It is infinite or NaN.
    """
    if not math.isfinite(loss):
        raise ModelError(
            call,
            expected="a finite loss",
            received=f"{loss} at or before step {step}",
            fix=f"Lower learning_rate (now {config.learning_rate:g}) or max_grad_norm, or train with "
            "precision='float32'; resume=True goes on from the last checkpoint.",
        )


def refuse_inference_mode(call: str) -> None:
    """Refuse to train where torch keeps no gradients.

    Raises:
        ModelError: The call stands in ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            call,
            expected="a call outside torch.inference_mode()",
            received="one inside it, where nothing can be trained",
            fix="Call it before the with block, or below a function without @torch.inference_mode().",
        )


@contextmanager
def seeded_random_state(seed: int) -> Iterator[None]:
    """Seed torch for the training alone; the caller's random state is as it was afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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


def _learning_rate(step: int, config: LearningConfig) -> float:
    """Linear warm-up to the peak, then linear decay to zero after the last step."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.learning_rate * warmup * (1 - step / config.max_steps)


def _history_up_to(directory: Path | None, step: int) -> list[Evaluation]:
    """What was measured up to a step; what was measured behind it is forgotten."""
    history = [row for row in read_history(directory) if row.step <= step]
    if directory is not None:
        write_jsonl(directory / "history.jsonl", history)
    return history


def _measured(learner: Learner, directory: Path | None, so_far: tuple[int, int, float], started: float) -> Evaluation:
    """Measure both behaviours, and add what was found to the run's history."""
    row = Evaluation(*so_far, *learner.measure(), seconds=round(time.perf_counter() - started, 3))
    if directory is not None:
        append_history(directory, row)
    return row


def _require_one_step(call: str, step: int, directory: Path | None) -> None:
    """Refuse to go on from different checkpoints.

    Raises:
        RunDirectoryError: A process does not see what another sees.
    """
    steps = processes.gathered(call, step)
    if len(set(steps)) > 1:
        raise RunDirectoryError(
            f"{call}(out={str(directory)!r}, resume=True)",
            expected="the same newest checkpoint in every process",
            received=f"those of steps {', '.join(map(str, steps))}",
            fix="Put the run's directory where all machines see it under one path.",
        )


def _total(losses: list[Tensor]) -> float:
    return float(torch.stack([x.double() for x in losses]).sum())


def _stop_reason(row: Evaluation, config: LearningConfig) -> str | None:
    if row.generalization >= config.target_generalization and row.memorization >= config.target_memorization:
        return f"both targets reached at step {row.step}"
    if row.step == config.max_steps:
        return f"no steps left after {row.step}"
    return None

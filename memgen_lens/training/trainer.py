"""Train a HookedTransformer on a designed task until it both recalls and computes.

Does not know which task it is, nor what the model is trained for afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memgen_lens import processes
from memgen_lens.behavior import observe
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import FinetuneConfig, Plant, TrainConfig
from memgen_lens.core.records import Evaluation
from memgen_lens.core.types import Behavior
from memgen_lens.fast.memory import freed_memory_kept
from memgen_lens.fast.support import why_not
from memgen_lens.models.build import build_model, require_device
from memgen_lens.models.native import set_state, state_of
from memgen_lens.models.save import save_model
from memgen_lens.training.batches import Batches
from memgen_lens.training.forward import Rows, labelled_loss, logits_of
from memgen_lens.training.held_out import HeldOut, held_out_predictors
from memgen_lens.training.loop import learn, multiplies_bf16, refuse_inference_mode, seeded_random_state
from memgen_lens.training.objectives import shifted_loss
from memgen_lens.training.plant import planted_loss
from memgen_lens.training.run_files import prepared
from memgen_lens.training.shares import begin

SPARE_POSITIONS = 8
"""Positions of the context beyond the longest training sequence."""


@dataclass(frozen=True)
class TrainingRun:
    """A trained model and how it came about.

    Attributes:
        model: The lens model, in evaluation mode, with the tokenizer that it was trained with.
        task: The task it was trained on.
        config: The settings it was trained with.
        history: One record a measurement.
        stop_reason: Why training stopped: both targets reached, or no steps left.
        out: The run directory, if it has one.
        base: Name and SHA-256 of the weights of the pretrained model that was tuned, if one was.
    """

    model: Any
    task: Any
    config: TrainConfig | FinetuneConfig
    history: tuple[Evaluation, ...]
    stop_reason: str
    out: Path | None
    base: dict[str, str] | None = None


@arguments(
    task=kinds.TaskLike,
    config=kinds.one(TrainConfig) | None,
    plant=kinds.one(Plant) | None,
    out=kinds.place("train(out=...)") | None,
    resume=kinds.Flag,
    force=kinds.Flag,
    progress=kinds.Flag,
)
def train(
    task: Any,
    config: TrainConfig | None = None,
    *,
    plant: Plant | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> TrainingRun:
    """Train a model on a task until it shows both behaviours, or the steps run out.

    Each batch holds generic items (answered by the rule) and memorized ones (answered with their own string). Both
    behaviours are measured every ``eval_every`` steps, on the validation prompts and on the memorized ones; the
    paper's rule (arXiv 2412.18497, section 3) keeps the model once it shows both.

    With ``objective="mat"`` held-out predictors are trained first (`memgen_lens.training.held_out`), and what they
    expect shifts the logits of the loss; what is measured and saved is the model without the shift. It is for tasks in
    which a shortcut gives most answers: what the predictors have learned themselves, the model has less reason to.

    Started as several processes by ``accelerate launch`` or torchrun, each takes a part of every batch, and gradients
    are summed up: the weights are those of one process to rounding. Every process calls this with the same arguments
    and gets the same model; only the first measures and writes. ``device="cuda"`` is each process's own card. Held-out
    predictors are trained by the first alone; a `Plant` in chosen neurons takes one process.

    Args:
        task: A task (`memgen_lens.tasks`).
        config: Settings; the default trains 2 layers of width 128.
        plant: Where recall is put, ``Plant(layer=1, neurons=range(32))`` or ``Plant.distributed()``; short for
            ``config.plant``, so that it is known which neurons a method should find.
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
        SettingsError: ``resume`` without ``out``; or, in several processes, what they cannot share, or arguments that
            differ.
        ProcessError: Another process of the run has died; ``resume=True`` goes on once all are started again.
    """
    config = config or TrainConfig()
    config = config.but(plant=plant) if plant else config
    require_device(config.device, call="train")
    refuse_inference_mode("train")
    begin("train", task, config, out, resume, force)
    config, wanted = config.but(device=processes.own_device("train", config.device)), config
    n_ctx, bf16 = (
        task.max_training_tokens + SPARE_POSITIONS,
        config.precision == "auto" and multiplies_bf16(config.device),
    )
    model = build_model(config.model, task.tokenizer, n_ctx=n_ctx, seed=config.seed, device=config.device)
    # A notebook may have switched gradients off at its top, as TransformerLens' own do.
    held = prepared("train", task, wanted, out, resume=resume, force=force)
    with processes.held_by_first("train", held) as directory:
        with seeded_random_state(config.seed), freed_memory_kept(), torch.enable_grad():
            held_out = None
            if config.objective == "mat":
                with torch.random.fork_rng():  # read or trained, what follows draws the same
                    held_out = held_out_predictors(
                        task, config, directory, n_ctx=n_ctx, resume=resume, progress=progress, bf16=bf16
                    )
            history, stop_reason = learn(
                "train",
                task,
                config,
                _FromScratch(model, task, config, held_out),
                Batches(task, config),
                directory,
                resume=resume,
                progress=progress,
            )
        model.eval()
        if directory is not None:
            processes.by_first("train", lambda: save_model(model, directory / "model"))
    return TrainingRun(model, task, wanted, tuple(history), stop_reason, directory)


class _FromScratch:
    """A model of ours that learns: by the fast forward where it allows, else by TransformerLens' own."""

    def __init__(self, model: Any, task: Any, config: TrainConfig, held_out: HeldOut | None = None) -> None:
        self.model, self.task, self.device = model, task, config.device
        self.parameters = list(model.parameters())
        reason = why_not(model.cfg)
        if reason is not None and processes.world("train").is_first:
            tqdm.write(f"training with TransformerLens' own forward: {reason}")
        self.bf16 = config.precision == "auto" and multiplies_bf16(config.device)
        self.plant, self.held_out = config.plant, held_out

    def loss(self, groups: list[Rows]) -> Tensor:
        groups = [rows.to(self.device) for rows in groups]
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.plant is not None:
                return planted_loss(self.model, groups, self.plant)
            logits = logits_of(self.model, groups)
            expected = None if self.held_out is None else self.held_out.expected(groups)
        if self.held_out is None or expected is None:
            return labelled_loss(logits, groups)
        return shifted_loss(logits, groups, expected, strength=self.held_out.cross_fit.strength)

    def measure(self) -> tuple[float, float, float]:
        def rate(split: Any, behavior: Behavior) -> float:
            outcomes = observe(self.model, self.task, split=split, progress=False)
            return sum(outcome.behavior is behavior for outcome in outcomes) / len(outcomes)

        self.model.eval()
        rates = (
            rate("validation", Behavior.GENERALIZATION),
            rate("memorized", Behavior.MEMORIZATION),
            rate("rephrased", Behavior.GENERALIZATION),
        )
        self.model.train()
        return rates

    def weights(self) -> Mapping[str, Tensor]:
        return state_of(self.model)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        set_state(self.model, weights)

"""Held-out predictors: what models expect of training sequences that they were not trained on.

They are what memorization-aware training (arXiv 2412.07684) takes for the part of an answer that need not be learned
by heart. Does not know what is done with it: see `memgen_lens.training.objectives`.

Equations. Sequence ``x`` lies in fold ``k(x)`` of ``K``; predictor ``k`` is trained on all folds but ``k``. With
``q(v) = softmax(logits of predictor k(x) / temperature)`` at a labelled token, and ``c(v, y)`` the sum of ``q(v)`` over
training tokens whose label is ``y``:

- calibrated: ``p_ho(y | x) = sum_v q(v) c(v, y) / sum_y' c(v, y')``, else ``p_ho = q``;
- the shift is ``log(p_ho + 1e-6)``, as in the authors' code (facebookresearch/Pitfalls-of-Memorization);
- a predictor's own training replaces label ``y`` by ``argmax q`` with probability ``(max q - 1/C) C / (C - 1)``, where
  ``C`` is the number of tokens of the vocabulary: label flipping of cross-risk minimization (XRM, arXiv 2309.16748).

Departures from both papers:

- an example is a training sequence, and its expectation one a labelled token, behind the right tokens before it;
- ``K`` may be more than two, and a fold follows from the sequence's own tokens (a hash), not from a list: sequences
  that are drawn again and again are in one fold ever; one that is drawn afresh, its predictor has not seen.
  Two wordings of one generic item may be in two folds; a memorized item has one wording in training;
- flips are drawn anew at each step and not kept, as sequences without end have no label that could be kept;
- ``c`` is counted over the `CALIBRATION_STEPS` batches behind the predictors' last, and over all places of the answer
  at once, not over the set (nor, as in the authors' code, over each batch of the training that is shifted);
- the number of steps is set, where XRM chooses among settings by the most flips.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memgen_lens import processes
from memgen_lens.core.config import TrainConfig
from memgen_lens.core.cross_fit import CrossFit
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.models.build import build_model
from memgen_lens.models.native import set_state, state_of
from memgen_lens.models.tensors import load_tensors, save_tensors
from memgen_lens.training.batches import Batches
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.forward import Rows, labelled_loss, logits_of
from memgen_lens.training.loop import optimizer_of, require_finite, take_step

FILE = "held_out.safetensors"
"""Name of their file in a run's ``checkpoints``."""
CALIBRATION_STEPS = 32
"""Batches that the calibration is counted over."""
LEAST = 1e-6
"""Added to each expected probability, as in the authors' code."""


class HeldOut:
    """One predictor a fold, which has not been trained on it.

    Args:
        models: As many as folds; ``models[k]`` is asked about fold ``k``.
        cross_fit: How they are asked.
        seed: Of the folds.

    Attributes:
        calibration: Share of each label where each token is predicted, ``[predicted, label]``; the identity = as is.
    """

    def __init__(self, models: Sequence[Any], cross_fit: CrossFit, *, seed: int) -> None:
        self.models, self.cross_fit, self.seed = list(models), cross_fit, seed
        self.calibration = torch.eye(models[0].cfg.d_vocab, device=models[0].cfg.device)

    @torch.no_grad()
    def expected(self, groups: list[Rows]) -> Float[Tensor, "labelled d_vocab"]:
        """``log(p_ho + 1e-6)`` at and after each group's first label, in the order of `labelled_logits`."""
        predicted = self.predicted(groups)
        with torch.autocast(predicted.device.type, enabled=False):
            return torch.log(predicted @ self.calibration + LEAST)

    @torch.no_grad()
    def predicted(self, groups: list[Rows]) -> Float[Tensor, "labelled d_vocab"]:
        """``q``: what each row's own held-out predictor says, before it is calibrated."""
        folds = [self.folds(rows) for rows in groups]
        device = groups[0].tokens.device
        outputs = [
            torch.empty(len(fold), rows.tokens.shape[1] - rows.start, self.calibration.shape[0], device=device)
            for rows, fold in zip(groups, folds, strict=True)
        ]
        for k, model in enumerate(self.models):
            picks = [(fold == k).nonzero()[:, 0] for fold in folds]
            mine = [(rows.take(pick), out, pick) for rows, out, pick in zip(groups, outputs, picks, strict=True)]
            mine = [part for part in mine if len(part[2])]
            if not mine:
                continue
            logits = logits_of(model, [rows for rows, _, _ in mine]).float()
            sizes = [len(pick) * out.shape[1] for _, out, pick in mine]
            for part, (_, out, pick) in zip(logits.split(sizes), mine, strict=True):
                out[pick] = part.view(len(pick), *out.shape[1:])
        return torch.cat([(out / self.cross_fit.temperature).softmax(-1).flatten(0, 1) for out in outputs])

    def folds(self, rows: Rows) -> Int[Tensor, " batch"]:
        """The fold of each row, by its tokens alone: not by its padding, nor by when it is drawn."""
        return folds_of(rows, self.cross_fit.folds, seed=self.seed)

    def state(self) -> dict[str, Tensor]:
        """All there is to keep."""
        weights = {
            f"{k}.{name}": value for k, model in enumerate(self.models) for name, value in state_of(model).items()
        }
        return weights | {"calibration": self.calibration}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Set what `state` gave."""
        self.calibration = state["calibration"].to(self.calibration.device)
        for k, model in enumerate(self.models):
            prefix = f"{k}."
            set_state(model, {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})


def held_out_predictors(
    task: Any, config: TrainConfig, directory: Path | None, *, n_ctx: int, resume: bool, progress: bool, bf16: bool
) -> HeldOut:
    """The predictors of a run: read where the run has kept them, else trained (the same ones), and kept.

    Args:
        task: What is learned.
        config: How; ``cross_fit`` says how the predictors are made, all else is as for the model.
        directory: The run's; None for none.
        n_ctx: Longest sequence in tokens.
        resume: Whether a run is gone on with.
        progress: Show a progress bar.
        bf16: Whether products are of bfloat16, as the model's.

    Raises:
        ModelError: The loss is not finite.
        RunDirectoryError: The file cannot be written.
    """
    cross_fit = config.cross_fit or CrossFit()
    seeds = np.random.default_rng([config.seed, 2412, 7684]).integers(MAX_SEED, size=cross_fit.folds).tolist()
    models = [build_model(config.model, task.tokenizer, n_ctx=n_ctx, seed=seed, device=config.device) for seed in seeds]
    found = HeldOut(models, cross_fit, seed=config.seed)
    path = None if directory is None else directory / "checkpoints" / FILE
    # Where no checkpoint is, nothing has made sure that what is there was made with these settings.
    begun = resume and path is not None and bool(list_checkpoints(path.parent))

    def made() -> dict[str, Tensor]:
        if not (begun and path is not None and _read(found, path, config.device)):
            _fit(found, task, config, progress=progress, bf16=bf16)
            if path is not None:
                save_tensors(found.state(), path)
        return {} if world.is_alone else {name: value.cpu() for name, value in found.state().items()}

    world = processes.world("train", config.device)
    state = processes.by_first("train", made)
    if not world.is_first:
        found.set_state(state)
    for model in found.models:
        model.eval().requires_grad_(False)
    return found


def folds_of(rows: Rows, n_folds: int, *, seed: int) -> Int[Tensor, " batch"]:
    """A number below ``n_folds`` for each sequence, from a hash of its tokens."""
    tokens = rows.tokens.cpu().numpy().astype(np.uint64) + np.uint64(1)
    inside = np.arange(tokens.shape[1]) < rows.lengths.numpy()[:, None] - 1
    places = _mixed(np.arange(tokens.shape[1], dtype=np.uint64) + _mixed(np.array([seed + 1], dtype=np.uint64)))
    sums = (tokens * (places | np.uint64(1)) * inside).sum(1, dtype=np.uint64)
    return torch.from_numpy((_mixed(sums) % np.uint64(n_folds)).astype(np.int64)).to(rows.tokens.device)


def flipped(groups: list[Rows], predicted: Float[Tensor, "labelled d_vocab"]) -> list[Rows]:
    """The rows with some labels replaced by the likeliest token, with probability ``(max q - 1/C) C / (C - 1)``."""
    n, (surest, tokens) = predicted.shape[1], predicted.max(1)
    flips = torch.rand(surest.shape, device=surest.device) < (surest - 1 / n) * n / (n - 1)
    sizes = [rows.labels[:, rows.start :].numel() for rows in groups]
    changed = []
    for rows, flip, token in zip(groups, flips.split(sizes), tokens.split(sizes), strict=True):
        labels = rows.labels.clone()
        behind = labels[:, rows.start :]
        flip = flip.view(behind.shape) & (behind != -100)
        behind[flip] = token.view(behind.shape)[flip]
        changed.append(replace(rows, labels=labels))
    return changed


class _Predictor:
    """One of them while it learns: from all rows but those of its fold."""

    def __init__(self, found: HeldOut, k: int, *, bf16: bool) -> None:
        self.found, self.k, self.bf16, self.model = found, k, bf16, found.models[k]
        self.parameters = list(self.model.parameters())

    def loss(self, groups: list[Rows]) -> Tensor:
        mine = [rows.take((self.found.folds(rows) != self.k).nonzero()[:, 0]) for rows in groups]
        mine = [rows for rows in mine if len(rows.tokens)]
        with torch.autocast(groups[0].tokens.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if not mine:  # a batch of its own fold alone teaches nothing
                return logits_of(self.model, groups).sum() * 0
            return labelled_loss(logits_of(self.model, mine), mine)


def _fit(found: HeldOut, task: Any, config: TrainConfig, *, progress: bool, bf16: bool) -> None:
    """Train all predictors side by side, on the batches of the run, then calibrate."""
    steps = found.cross_fit.steps
    stop = steps + CALIBRATION_STEPS
    own = config.but(max_steps=stop, generic_steps=0, objective="plain", cross_fit=None)
    schedule = own.but(max_steps=steps)
    learners = [_Predictor(found, k, bf16=bf16) for k in range(len(found.models))]
    optimizers = [optimizer_of(learner, schedule) for learner in learners]
    counts = torch.zeros_like(found.calibration, dtype=torch.float64)

    def predicted(groups: list[Rows]) -> Tensor:
        with torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16, enabled=bf16):
            return found.predicted(groups)

    with tqdm(total=steps, disable=not progress, desc=f"train {task.name}: held-out predictors", unit="step") as bar:
        for step, groups in enumerate(Batches(task, own).from_step(0, stop)):
            groups = [rows.to(config.device) for rows in groups]
            if step < steps:
                taught = flipped(groups, predicted(groups)) if found.cross_fit.flips else groups
                for learner, optimizer in zip(learners, optimizers, strict=True):
                    loss = take_step(learner, optimizer, taught, step, schedule)
                    if step + 1 == steps:
                        require_finite("train", float(loss), steps, config)
                bar.update()
            elif found.cross_fit.calibrated:
                _count(counts, predicted(groups), groups)
    if found.cross_fit.calibrated:
        found.calibration = _shares(counts).to(found.calibration)


def _shares(counts: Float[Tensor, "predicted label"]) -> Float[Tensor, "predicted label"]:
    """``c(v, y) / sum_y' c(v, y')``; a token that is never predicted stands for itself."""
    total = counts.sum(1, keepdim=True)
    return torch.where(total > 0, counts / total, torch.eye(len(counts)).to(counts))


def _count(
    counts: Float[Tensor, "predicted label"], predicted: Float[Tensor, "labelled d_vocab"], groups: list[Rows]
) -> None:
    """Add each token's predicted probabilities to the column of its label."""
    labels = torch.cat([rows.labels[:, rows.start :].flatten() for rows in groups])
    there = labels != -100
    counts.index_add_(1, labels[there], predicted[there].double().T)


def _read(found: HeldOut, path: Path, device: str) -> bool:
    """Whether the predictors could be read; a damaged file is passed over with a warning."""
    if not path.is_file():
        return False
    try:
        found.set_state(load_tensors(path, device=device))
    except RunDirectoryError as error:
        warnings.warn(f"training held-out predictors anew: {error}", stacklevel=2)
        return False
    return True


def _mixed(x: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits that have nothing in common with those of their neighbours (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

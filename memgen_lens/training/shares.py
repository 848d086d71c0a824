"""A batch shared out over the processes of a run, and the gradients of all of them summed up.

Every process draws the same batches and takes every ``count``-th row. The loss is a mean over the labelled tokens of
the whole batch, so that each process's mean counts by its share of them: the sums are what one process would have
computed, to rounding. Does not know the optimizer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens import processes
from memgen_lens.core.config import FinetuneConfig, LearningConfig, TrainConfig
from memgen_lens.core.errors import SettingsError
from memgen_lens.processes import World
from memgen_lens.training.forward import Rows

VALUES_AT_ONCE = 2**24
"""Gradients that are summed up in one piece (64 MB): few messages, and little memory beside the gradients."""


def begin(call: str, task: Any, config: LearningConfig, out: Any, *how: Any) -> None:
    """Join the other processes of the run, if there are any, and refuse what they could not do as one does it.

    Raises:
        SettingsError: Fewer rows in a batch than processes, or chosen neurons of a plant, whose two losses are means
            over different rows; or processes were asked for different things.
        ProcessError: Another process has died.
    """
    world = processes.world(call, config.device)
    if world.is_alone:
        return
    problem = None
    if config.batch_size < world.count:
        problem = f"batch_size of at least {world.count}", f"{config.batch_size}", "Raise it, or start fewer processes."
    elif isinstance(config, TrainConfig) and config.plant is not None and config.plant.neurons:
        problem = "no plant in chosen neurons", repr(config.plant), "Train it in one process, or leave plant out."
    if problem:
        expected, received, fix = problem
        raise SettingsError(f"{call} in {world.count} processes", expected=expected, received=received, fix=fix)
    where = None if out is None else str(out)
    processes.require_same(call, (getattr(task, "settings", dict)(), config.model_dump(mode="json"), where, *how))


def share_of(groups: Sequence[Rows], world: World) -> list[Rows]:
    """This process's rows of a batch: every ``count``-th of all, so that each gets as many of each group, to one."""
    mine, before = [], 0
    for rows in groups:
        first = (world.rank - before) % world.count
        if first < len(rows.tokens):
            mine.append(rows.take(slice(first, None, world.count)))
        before += len(rows.tokens)
    return mine


def draw_by_row(config: LearningConfig, step: int, world: World) -> None:
    """Seed torch for one step of one process, where what is drawn belongs to its rows: a pretrained model's dropout.

    So no two processes drop the same, and a run that is resumed drops what it would have. What a model from scratch
    draws (``Plant.distributed()``) is one draw for all rows, and stays the same in all processes.
    """
    if isinstance(config, FinetuneConfig):
        torch.manual_seed((config.seed * config.max_steps + step) * world.count + world.rank)


def n_labels(groups: Sequence[Rows]) -> int:
    """Labelled tokens of some rows."""
    return sum(int((rows.labels != -100).sum()) for rows in groups)


def summed(call: str, parameters: Sequence[torch.nn.Parameter], loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Sum the gradients over all processes, in place, and return the loss summed likewise.

    A parameter that no process has a gradient for keeps none: the optimizer leaves it alone.
    """
    # Through gloo, whatever sums up the gradients: a process that has died is known of before nccl would wait for it.
    known = torch.tensor([float(loss), *(float(parameter.grad is not None) for parameter in parameters)])
    processes.sum_up(call, known)
    taught = [parameter for parameter, n in zip(parameters, known[1:].tolist(), strict=True) if n]
    for bucket in _buckets(taught):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        processes.sum_up(call, flat)
        parts = flat.split([parameter.numel() for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return known[0].to(loss.device)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Consecutive parameters of about `VALUES_AT_ONCE` values together."""
    bucket: list[torch.nn.Parameter] = []
    n = 0
    for parameter in parameters:
        if bucket and n + parameter.numel() > VALUES_AT_ONCE:
            yield bucket
            bucket, n = [], 0
        bucket.append(parameter)
        n += parameter.numel()
    if bucket:
        yield bucket

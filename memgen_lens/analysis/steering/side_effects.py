"""What steering does to prompts that it is not meant to change: accuracy lost, and the next token's distribution.

Does not know the pairs. Many steerings share a forward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float

from memgen_lens.analysis.steering.generation import alike, in_blocks, steered_outputs
from memgen_lens.analysis.steering.intervention import drawn_pairs, steering_hooks
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.behavior import answer_tokens, observe_items
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.stats import bootstrap_mean, paired_loss, wilson
from memgen_lens.core.steering_records import SideEffects
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.passes import At
from memgen_lens.models.step import forward, rows_at_once, run_before
from memgen_lens.models.tokens import Batch, in_batches

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ByWay = dict[Direction, np.ndarray]
"""One value a prompt, by the direction that it was steered in."""
NO_TASK = "a user's pairs name no held-out prompts"
NO_PAIR = "held-out prompts have no pair to patch from"


def why_none(task: Any | None, steer: Steering) -> str | None:
    """Why a steering cannot be tried on held-out prompts; None where it can."""
    if task is None:
        return NO_TASK
    return NO_PAIR if steer.setting.mode == "patch" else None


def side_effects(
    model: LensModel, task: Any | None, steer: Steering, *, seed: int, batch_size: int, progress: bool
) -> SideEffects:
    """Accuracy and next-token distribution on a task's held-out prompts, unsteered and steered either way.

    Args:
        model: A lens model.
        task: The task; None has no held-out prompts.
        steer: The steering.
        seed: Seed of the bootstrap of the divergences' intervals.
        batch_size: Rows in one forward pass.
        progress: Show progress bars.
    """
    why = why_none(task, steer)
    items = task.items("heldout") if task is not None and why is None else ()
    if not items:
        return SideEffects(0, None, None, None, None, why or "the task has no held-out prompts")
    how = {"batch_size": batch_size, "progress": progress}
    before = unsteered_right(model, task, items, **how)
    after: ByWay = {way: steered_right(model, task, items, [steer], toward=way, **how)[0] for way in DIRECTIONS}
    prompts = [item.prompt for item in items]
    kl: ByWay = {way: steered_kl(model, prompts, [steer], toward=way, batch_size=batch_size)[0] for way in DIRECTIONS}
    whole = _summed_up(items, before, after, kl, seed)
    names = [item.task for item in items]
    tasks = list(dict.fromkeys(names))
    if len(tasks) < 2:
        return whole
    parts = {}
    for name in tasks:
        mine = np.array([task == name for task in names])
        some = [item for item in items if item.task == name]
        parts[name] = _summed_up(some, before[mine], _some(after, mine), _some(kl, mine), seed)
    return replace(whole, by_task=parts)


def _some(by_way: ByWay, chosen: Bool[np.ndarray, " prompt"]) -> ByWay:
    return {way: values[chosen] for way, values in by_way.items()}


def _summed_up(
    items: Sequence[Item],
    before: Bool[np.ndarray, " prompt"],
    after: ByWay,
    kl: ByWay,
    seed: int,
) -> SideEffects:
    item = np.array(same_items(items))
    there, back = (wilson(after[way], item) for way in DIRECTIONS)
    unsteered = wilson(before, item)
    spread = {way: bootstrap_mean(kl[way].astype(np.float64), item, seed=seed) for way in DIRECTIONS}
    return SideEffects(
        n=len(items),
        heldout_generalization=unsteered.rate,
        heldout_generalization_steered=there.rate,
        heldout_generalization_steered_to_memorization=back.rate,
        kl_nats=float(np.mean(kl["generalization"])),
        kl_nats_to_memorization=float(np.mean(kl["memorization"])),
        n_items=unsteered.n_items,
        ci95={
            "heldout_generalization": list(unsteered.ci95),
            "heldout_generalization_steered": list(there.ci95),
            "heldout_generalization_steered_to_memorization": list(back.ci95),
            "kl_nats": list(spread["generalization"]),
            "kl_nats_to_memorization": list(spread["memorization"]),
        },
        lost={str(way): paired_loss(before, after[way], item) for way in DIRECTIONS},
    )


def sampled(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """At most ``n`` items, drawn without replacement, in their order."""
    if len(items) <= n:
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), size=n, replace=False)
    return [items[place] for place in sorted(chosen.tolist())]


def unsteered_right(
    model: LensModel, task: Any, items: Sequence[Item], *, batch_size: int, progress: bool
) -> Bool[np.ndarray, " prompt"]:
    """Which prompts the unsteered model answers by the rule."""
    outcomes = observe_items(model, task, items, batch_size=batch_size, progress=progress)
    return np.array([outcome.behavior is Behavior.GENERALIZATION for outcome in outcomes])


def steered_right(
    model: LensModel,
    task: Any,
    items: Sequence[Item],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    batch_size: int,
    progress: bool,
) -> Bool[np.ndarray, "setting prompt"]:
    """Which prompts are answered by the rule under each of several steerings, none of which patches."""
    outputs = steered_outputs(
        model,
        [item.prompt for item in items],
        steerings,
        toward=toward,
        max_new_tokens=answer_tokens(model, task),
        batch_size=batch_size,
        progress=progress,
    )
    said = [dict.fromkeys(answers) for answers in zip(*outputs, strict=True)]
    known = [
        {output: task.classify(item, output) is Behavior.GENERALIZATION for output in answers}
        for item, answers in zip(items, said, strict=True)
    ]
    rows = [[right[output] for right, output in zip(known, row, strict=True)] for row in outputs]
    return np.array(rows, dtype=bool)


@torch.inference_mode()
def steered_kl(
    model: LensModel,
    prompts: Sequence[str],
    steerings: Sequence[Steering],
    *,
    toward: Direction,
    batch_size: int,
) -> Float[np.ndarray, "setting prompt"]:
    """KL(unsteered || steered) of the next-token distribution behind each prompt, in nats.

    Steerings of one kind ride in the batch dimension; what lies before the answer position is run once, where they
    change nothing there.
    """
    divergences = np.empty((len(steerings), len(prompts)))
    for whole in in_batches(model, prompts, batch_size=batch_size):
        at_once = min(batch_size, rows_at_once(model, whole.tokens.shape[1]))
        for batch in whole.parts(at_once):
            plain = forward(model, batch.tokens, batch.mask).double().log_softmax(-1)
            for members, changed in _steered_logits(model, batch, steerings, toward, at_once):
                steered = changed.double().log_softmax(-1).reshape(len(members), *plain.shape)
                found = (plain.exp() * (plain - steered)).sum(-1).cpu().numpy()
                divergences[np.ix_(list(members), list(batch.index))] = found
    return divergences


def _steered_logits(
    model: LensModel, batch: Batch, steerings: Sequence[Steering], toward: Direction, at_once: int
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Logits behind a batch's prompts under steerings of one kind at a time, steering after steering."""
    for members in alike(steerings):
        everywhere = steerings[members[0]].setting.positions == "all"
        past = None if everywhere else run_before(model, batch.tokens, batch.mask)
        for block in in_blocks(members, at_once // len(batch.index)):
            tokens, mask = (part.repeat(len(block), 1) for part in (batch.tokens, batch.mask))
            if past is not None:
                tokens, mask = tokens[:, -1:], mask[:, -1:]
            length = tokens.shape[1]
            some = [steerings[i] for i in block]
            at = At(length, slice(None) if everywhere else slice(length - 1, length))
            here = None if some[0].setting.positions == "generated" else at
            pairs = drawn_pairs(some[0], batch.index)
            hooks = steering_hooks(model, some, toward=toward, pairs=pairs, at=lambda here=here: here)
            with model.hooks(fwd_hooks=hooks):
                yield (
                    block,
                    forward(model, tokens, mask, past=None if past is None else past.repeated(len(block), room=1)),
                )

"""What steering reaches and what it costs as it grows stronger: a curve, ours and every control's.

Does not choose a strength: `tune` does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.controls import control_draws, controls_of
from memgen_lens.analysis.steering.judged import Judged, judged_outputs
from memgen_lens.analysis.steering.side_effects import sampled, steered_kl, steered_right, unsteered_right, why_none
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.analysis.steering.values import factors
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.cost_records import FIGURES, STEERED, Band, CostCurve, SteeringCost
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.stats import bootstrap_mean, mean_of_draws, paired_loss, wilson
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.guard import lens_model

CALL = "steering_cost"
Ends = tuple[float, float, float]
"""A mean and both ends of its interval."""


@arguments(
    model=lens_model(CALL),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    steer=kinds.one(Steering),
    alphas=kinds.Positives,
    toward=kinds.DirectionName | None,
    split=kinds.PairSplitName,
    n_heldout=kinds.Count,
    n_controls=kinds.Count,
    seed=kinds.Seed,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def steering_cost(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    steer: Steering,
    *,
    alphas: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    toward: Direction | None = None,
    split: PairSplit = "test",
    n_heldout: int = 200,
    n_controls: int = 20,
    seed: int = 0,
    batch_size: int = 2048,
    progress: bool = True,
) -> SteeringCost:
    """Steer by the same neurons at each of several strengths, and so do the controls.

    At each strength the figures are those of `evaluate_steering` there, with the same draws of the controls. The cost
    is what held-out prompts lose: accuracy, and the KL divergence of the next token; of the controls too, so that one
    sees whether as much damage would have done as much.

    Args:
        model: A lens model.
        task: The task that judges outputs and gives held-out prompts; None for a user's own pairs, which have none.
        pairs: Prompt pairs.
        steer: The steering; its own alpha is not used.
        alphas: Strengths, each above 0.
        toward: Steer this way alone; default: both ways.
        split: Pairs to report on. Held-out prompts are the task's ``heldout`` for ``"test"``, else its ``validation``.
        n_heldout: Held-out prompts that are sampled at most.
        n_controls: Draws of each control, at least 20.
        seed: Seed of the draws, of the sample and of the bootstrap.
        batch_size: Rows in one forward pass.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        Curves by direction and name, with 95 % intervals that count items, of controls with the range of 95 % of their
        draws.

    Raises:
        PairsError: The split holds fewer than 8 pairs that flip unsteered.
        SettingsError: Fewer than 20 control draws, or a steering that has no strength.
        SiteError: The model lacks the site.
    """
    if n_controls < 20:
        raise SettingsError(CALL, expected="n_controls of at least 20", received=str(n_controls), fix="Raise it.")
    strengths = sorted(set(alphas))
    rng = np.random.default_rng(seed)
    base = {STEERED: [steer]} | {name: control_draws(steer, name, n_controls, rng) for name in controls_of(steer)}
    names = [name for name, draws in base.items() for _ in draws]
    steerings = [with_alpha(one, alpha) for alpha in strengths for draws in base.values() for one in draws]
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    why = why_none(task, steer)
    unlabelled = "heldout" if split == "test" else "validation"
    items = sampled(task.items(unlabelled), n_heldout, seed) if task is not None and why is None else []
    how = {"batch_size": batch_size, "progress": progress}
    before = unsteered_right(model, task, items, **how) if items else None
    measured: dict[str, dict[str, CostCurve]] = {}
    for way in get_args(Direction):
        if toward in (None, way):
            judged = judged_outputs(model, judge, index, steerings, toward=way, batch_size=batch_size)
            values = _values(judged)
            if before is not None:
                prompts = [item.prompt for item in items]
                values["heldout"] = steered_right(model, task, items, steerings, toward=way, **how)
                values["kl_nats"] = steered_kl(model, prompts, steerings, toward=way, batch_size=batch_size)
            measured[way] = _curves(values, names, len(strengths), judged.items, items, before, seed)
    sides = judge.side("generalization", index)
    return SteeringCost(
        setting=steer.setting,
        alphas=tuple(strengths),
        n=len(index),
        n_items=len(set(same_items(sides))),
        n_heldout=len(items),
        heldout=None if before is None else float(before.mean()),
        curves=measured,
        why=why,
    )


def with_alpha(steer: Steering, alpha: float) -> Steering:
    """The same steering (or draw of a control) at another strength.

    Raises:
        SettingsError: It has no strength.
    """
    was = steer.setting.alpha
    if was is None:
        raise SettingsError(
            CALL,
            expected="a steering that has a strength",
            received=f"mode={steer.setting.mode!r}, which has no alpha",
            fix="Report it with evaluate_steering.",
        )
    changed = replace(steer, setting=replace(steer.setting, alpha=alpha), shift=steer.shift * (alpha / was))
    if steer.rules is not None:
        return replace(changed, rules=replace(steer.rules, gain=steer.rules.gain * (alpha / was)))
    if steer.values is not None:  # factors of a scale, which stop at 0: what they were below it is not known any more
        towards_memory = np.sign(steer.values[1] - steer.values[0])
        return replace(changed, values=factors(towards_memory, alpha))
    return changed


def _values(judged: Judged) -> dict[str, np.ndarray]:
    """What each prompt shows under each steering, by figure, ``[setting, prompt]``."""
    return {
        "shift": judged.behavior == judged.aim,
        "memorized_form": judged.form,
        "stayed": judged.behavior == judged.stay,
        "other": judged.behavior == Behavior.OTHER,
    }


def _curves(
    values: dict[str, np.ndarray],
    names: Sequence[str],
    n_strengths: int,
    items: Sequence[Item],
    heldout: Sequence[Item],
    before: Bool[np.ndarray, " prompt"] | None,
    seed: int,
) -> dict[str, CostCurve]:
    """The curves of one direction; settings come strength by strength, in each the steering and all draws."""
    item, other = (np.array(same_items(some), dtype=np.int64) for some in (items, heldout))
    curves = {}
    for name in dict.fromkeys(names):
        places = np.flatnonzero(np.array(names) == name)
        found: dict[str, Band] = {}
        for figure in FIGURES:
            rows = values.get("heldout" if figure == "heldout_loss" else figure)
            if rows is None:
                found[figure] = Band(*np.full((3, n_strengths), np.nan))
                continue
            by_strength = rows.reshape(n_strengths, len(names), rows.shape[1])[:, places]
            ends = [_ends(figure, draws, name == STEERED, item, other, before, seed) for draws in by_strength]
            found[figure] = Band(*np.array(ends, dtype=float).T)
        curves[name] = CostCurve(n_draws=len(places), **found)
    return curves


def _ends(
    figure: str,
    draws: Float[np.ndarray, "draw case"] | Bool[np.ndarray, "draw case"],
    steered: bool,
    item: Int[np.ndarray, " prompt"],
    other: Int[np.ndarray, " heldout"],
    before: Bool[np.ndarray, " heldout"] | None,
    seed: int,
) -> Ends:
    """One figure at one strength: of the steering over items, of a control over its draws."""
    draws = np.asarray(draws, dtype=float)
    if not steered:
        means = draws.mean(1)
        of_draws = mean_of_draws(before.mean() - means if figure == "heldout_loss" and before is not None else means)
        return of_draws["mean"], *of_draws["ci95"]
    (values,) = draws
    if figure == "heldout_loss":
        loss = paired_loss(before, values, other)
        return loss["loss"], *loss["ci95"]
    if figure == "kl_nats":
        return float(values.mean()), *bootstrap_mean(values, other, seed=seed)
    rate = wilson(values, item)
    return rate.rate, *rate.ci95

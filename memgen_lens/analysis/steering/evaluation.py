"""Judge a steering on the test pairs: rates with intervals, beside controls and side effects.

Does not choose the steering.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.controls import NO_SIGN, control_draws, controls_of
from memgen_lens.analysis.steering.judged import Judged, judged_outputs
from memgen_lens.analysis.steering.side_effects import side_effects
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.stats import Rate, mean_of_draws, wilson
from memgen_lens.core.steering_records import SteeringRates, SteeringTable
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.guard import lens_model

N_EXAMPLES = 6
N_OTHERS = 5
"""Kinds of other outputs that a table shows, those said most often."""


@arguments(
    model=lens_model("evaluate_steering"),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    steer=kinds.one(Steering),
    split=kinds.PairSplitName,
    n_controls=kinds.Count,
    seed=kinds.Seed,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def evaluate_steering(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    steer: Steering,
    *,
    split: PairSplit = "test",
    n_controls: int = 20,
    seed: int = 0,
    batch_size: int = 2048,
    progress: bool = True,
) -> SteeringTable:
    """What a steering does, both ways, on pairs that neither ranked its neurons nor chose its setting.

    ``to_generalization``: the recalling prompts, steered towards generalization; ``to_memorization``: the computing
    prompts, steered towards memorization. The controls change as many neurons in each layer in the same way, by the
    same multiset of magnitudes: ``random_neurons`` (the papers' control), ``low_correlation`` (the smallest abs(rho))
    and ``random_sign`` (the selected neurons, random signs). Of a fitted rule they write what the rule says about a row
    to other neurons of that row, or with other signs; beside them stands ``shuffled_items``, the rule fitted on pairs
    whose partners are of other items. Of a direction there is ``random_direction``, of the same norm
    (`memgen_lens.analysis.steering.controls` says what each is in each mode).

    The cost stands beside: what else is said (``other``, with the outputs said most often), and on the task's held-out
    prompts the accuracy lost and the KL divergence of the next token. In a mixture whose pairs are of several tasks,
    ``by_task`` has all of it for each: a steering found on one task alone
    (``attribute(acts.of_task(name), site)``) is judged on the others so.

    Args:
        model: A HookedTransformer.
        task: The task that judges outputs; None for a user's own pairs, whose outputs are compared with their answers
            or, where these are not given, with what the unsteered model says on either side.
        pairs: Prompt pairs.
        steer: The steering.
        split: Pairs to report on.
        n_controls: Draws of each control, at least 20.
        seed: Seed of the controls.
        batch_size: Rows in one forward pass.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        Rates with n and 95 % intervals that count items (`memgen_lens.core.stats.wilson`); controls as mean over draws
        with the interval that holds 95 % of them.

    Raises:
        PairsError: The split holds fewer than 8 pairs that flip unsteered.
        SettingsError: Fewer than 20 control draws.
        SiteError: The model lacks the site.
    """
    if n_controls < 20:
        raise SettingsError(
            "evaluate_steering",
            expected="n_controls of at least 20",
            received=str(n_controls),
            fix="Raise it.",
        )
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    rng = np.random.default_rng(seed)
    controls = {name: control_draws(steer, name, n_controls, rng) for name in controls_of(steer)}
    steerings = [steer, *(draw for draws in controls.values() for draw in draws)]
    ways: tuple[Direction, Direction] = ("generalization", "memorization")
    judged = {way: judged_outputs(model, judge, index, steerings, toward=way, batch_size=batch_size) for way in ways}
    rates = {way: _rates(judge, judged[way], steer, controls) for way in ways}
    names = [item.task for item in judge.side("generalization", index)]
    tasks = list(dict.fromkeys(names)) if len(set(names)) > 1 else []
    of = {name: np.flatnonzero([task == name for task in names]) for name in tasks}
    return SteeringTable(
        setting=steer.setting,
        n_neurons_by_layer=tuple(int(n) for n in steer.selected.sum(1)),
        to_generalization=rates["generalization"],
        to_memorization=rates["memorization"],
        side_effects=side_effects(model, task, steer, seed=seed, batch_size=batch_size, progress=progress),
        predicted=None if steer.rules is None else steer.rules.predicted(steer.selected),
        by_task={
            name: {
                f"to_{way}": replace(_rates(judge, judged[way].of(mine), steer, controls), examples=()) for way in ways
            }
            for name, mine in of.items()
        },
    )


def _rates(judge: Judge, judged: Judged, steer: Steering, controls: dict[str, list[Steering]]) -> SteeringRates:
    """Rates of one direction; the first row is the steering's, then come the draws of each control."""
    items, behaviors, forms = judged.items, judged.behavior, judged.form
    n_selected = int(steer.selected.sum())
    table: dict[str, dict[str, Any]] = {}
    first = 1
    for name, draws in controls.items():
        rows = slice(first, first + len(draws))
        first += len(draws)
        if not draws:
            table[name] = {"mean": None, "ci95": None, "why": NO_SIGN[steer.setting.mode]}
            continue
        table[name] = {
            **mean_of_draws(np.mean(behaviors[rows] == judged.aim, axis=1)),
            "memorized_form": mean_of_draws(np.mean(forms[rows], axis=1)),
            "other": mean_of_draws(np.mean(behaviors[rows] == Behavior.OTHER, axis=1)),
            # Where most of a layer is selected, most of any random draw is selected too: a control then says little.
            "overlap": float(np.mean([draw.selected[steer.selected].sum() for draw in draws])) / max(n_selected, 1),
        }
    independent = same_items(items)

    def rate(hits: Any) -> dict[str, Any]:
        return plain_rate(wilson(hits, independent))

    before = "memorized_answer" if judged.toward == "generalization" else "rule_answer"
    return SteeringRates(
        toward=judged.toward,
        n=len(items),
        n_items=len(set(independent)),
        shift=rate(behaviors[0] == judged.aim),
        memorized_form=rate(forms[0]),
        stayed=rate(behaviors[0] == judged.stay),
        other=rate(behaviors[0] == Behavior.OTHER),
        controls=table,
        examples=tuple(
            {
                "prompt": item.prompt,
                "before": str(getattr(item, before)),
                "after": judge.said(output),
                "behavior": str(behavior),
            }
            for item, output, behavior in list(zip(items, judged.outputs[0], behaviors[0], strict=True))[:N_EXAMPLES]
        ),
        others=_others(judge, judged),
    )


def _others(judge: Judge, judged: Judged) -> tuple[dict[str, Any], ...]:
    """The outputs under the steering itself that are neither answer: those said most often, the first of equals."""
    rows = zip(judged.outputs[0], judged.behavior[0], judged.form[0].tolist(), strict=True)
    said = Counter((judge.said(output), form) for output, behavior, form in rows if behavior is Behavior.OTHER)
    return tuple(
        {"output": output, "count": count, "memorized_form": form}
        for (output, form), count in said.most_common(N_OTHERS)
    )


def plain_rate(rate: Rate) -> dict[str, Any]:
    """A rate as plain values."""
    return {"rate": rate.rate, "ci95": list(rate.ci95), "k": rate.k, "n": rate.n, "n_items": rate.n_items}

"""Judge a steering on the test pairs: rates with intervals, beside controls and side effects.

Does not choose the steering.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.controls import NO_SIGN, control_draws, controls_of
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.intervention import drawn_pairs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.behavior import answer_tokens, observe_items
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.stats import Rate, mean_of_draws, wilson
from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringTable
from memgen_lens.core.types import Behavior, Direction, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.step import forward, rows_at_once
from memgen_lens.models.tokens import in_batches

N_EXAMPLES = 6


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
    rates = {
        toward: _rates(model, judge, index, steer, controls, toward=toward, batch_size=batch_size)
        for toward in ("generalization", "memorization")
    }
    return SteeringTable(
        setting=steer.setting,
        n_neurons_by_layer=tuple(int(n) for n in steer.selected.sum(1)),
        to_generalization=rates["generalization"],
        to_memorization=rates["memorization"],
        side_effects=_side_effects(model, task, steer, batch_size=batch_size, progress=progress),
        predicted=None if steer.rules is None else steer.rules.predicted(steer.selected),
    )


def _rates(
    model: LensModel,
    judge: Judge,
    index: Int[np.ndarray, " index"],
    steer: Steering,
    controls: dict[str, list[Steering]],
    *,
    toward: Direction,
    batch_size: int,
) -> SteeringRates:
    items = judge.side(toward, index)
    aim = Behavior(toward)
    stay = Behavior.MEMORIZATION if aim is Behavior.GENERALIZATION else Behavior.GENERALIZATION
    outputs = steered_outputs(
        model,
        [item.prompt for item in items],
        [steer, *(draw for draws in controls.values() for draw in draws)],
        toward=toward,
        max_new_tokens=judge.max_new_tokens,
        pairs=index,
        batch_size=batch_size,
        prepend_bos=judge.pairs.prepend_bos,
        progress=judge.progress,
    )
    behaviors = [[judge.behavior(i, o) for i, o in zip(items, row, strict=True)] for row in outputs]
    forms = [[judge.has_memorized_form(i, o) for i, o in zip(items, row, strict=True)] for row in outputs]
    n_selected = int(steer.selected.sum())
    table: dict[str, dict[str, Any]] = {}
    first = 1
    for name, draws in controls.items():
        rows = range(first, first + len(draws))
        first += len(draws)
        if not draws:
            table[name] = {"mean": None, "ci95": None, "why": NO_SIGN[steer.setting.mode]}
            continue
        shares = [np.mean([b is aim for b in behaviors[row]]) for row in rows]
        table[name] = {
            **mean_of_draws(shares),
            "memorized_form": mean_of_draws([np.mean(forms[row]) for row in rows]),
            # Where most of a layer is selected, most of any random draw is selected too: a control then says little.
            "overlap": float(np.mean([draw.selected[steer.selected].sum() for draw in draws])) / max(n_selected, 1),
        }
    independent = same_items(items)

    def rate(hits: Sequence[bool]) -> dict[str, Any]:
        return _plain(wilson(hits, independent))

    before = "memorized_answer" if toward == "generalization" else "rule_answer"
    return SteeringRates(
        toward=toward,
        n=len(items),
        n_items=len(set(independent)),
        shift=rate([b is aim for b in behaviors[0]]),
        memorized_form=rate(forms[0]),
        stayed=rate([b is stay for b in behaviors[0]]),
        other=rate([b is Behavior.OTHER for b in behaviors[0]]),
        controls=table,
        examples=tuple(
            {
                "prompt": item.prompt,
                "before": str(getattr(item, before)),
                "after": judge.said(output),
                "behavior": str(behavior),
            }
            for item, output, behavior in list(zip(items, outputs[0], behaviors[0], strict=True))[:N_EXAMPLES]
        ),
    )


def _side_effects(
    model: LensModel, task: Any | None, steer: Steering, *, batch_size: int, progress: bool
) -> SideEffects:
    """Accuracy and next-token distribution on held-out generic prompts, unsteered and steered."""
    if task is None or steer.setting.mode == "patch":
        why = (
            "a user's pairs name no held-out prompts" if task is None else "held-out prompts have no pair to patch from"
        )
        return SideEffects(0, None, None, None, None, why)
    items = task.items("heldout")
    prompts = [item.prompt for item in items]

    def accuracy(toward: Direction) -> Rate:
        outputs = steered_outputs(
            model,
            prompts,
            [steer],
            toward=toward,
            max_new_tokens=answer_tokens(model, task),
            batch_size=batch_size,
            progress=progress,
        )[0]
        return wilson([task.classify(i, o) is Behavior.GENERALIZATION for i, o in zip(items, outputs, strict=True)])

    unsteered = observe_items(model, task, items, batch_size=batch_size, progress=progress)
    return SideEffects(
        n=len(items),
        heldout_generalization=wilson([o.behavior is Behavior.GENERALIZATION for o in unsteered]).rate,
        heldout_generalization_steered=accuracy("generalization").rate,
        heldout_generalization_steered_to_memorization=accuracy("memorization").rate,
        kl_nats=float(np.mean(_kl(model, prompts, steer, batch_size=batch_size))),
    )


@torch.inference_mode()
def _kl(model: LensModel, prompts: Sequence[str], steer: Steering, *, batch_size: int) -> Float[np.ndarray, " prompt"]:
    """KL(unsteered || steered towards generalization) of the next-token distribution, in nats, one a prompt."""
    divergences = np.empty(len(prompts))
    for whole in in_batches(model, prompts, batch_size=batch_size):
        for batch in whole.parts(rows_at_once(model, whole.tokens.shape[1], cached=False)):
            plain = forward(model, batch.tokens, batch.mask).double().log_softmax(-1)
            with steer.applied(model, toward="generalization", pairs=drawn_pairs(steer, batch.index)):
                changed = forward(model, batch.tokens, batch.mask).double().log_softmax(-1)
            divergences[batch.index] = (plain.exp() * (plain - changed)).sum(-1).cpu().numpy()
    return divergences


def _plain(rate: Rate) -> dict[str, Any]:
    return {"rate": rate.rate, "ci95": list(rate.ci95), "k": rate.k, "n": rate.n, "n_items": rate.n_items}

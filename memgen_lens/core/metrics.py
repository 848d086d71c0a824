"""The blocks of ``metrics.json``, made of records.

Does not compute figures: it names those that the stages have computed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memgen_lens.core.consistency_records import SplitHalf, TaskConsistency
from memgen_lens.core.files import with_nulls
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.items import Outcome, same_items
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import NeuronScores, ProbeReport
from memgen_lens.core.stats import Rate, wilson
from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringTable
from memgen_lens.core.types import Behavior

SCHEMA = 2
"""Version of the layout of ``metrics.json``; since 2 every interval counts items and says how many."""
MATRIX = ("value", "low", "high", "n", "n_items")


def behavior_metrics(outcomes: Sequence[Outcome], pairs: PromptPairs) -> dict[str, Any]:
    """Shares of held-out, memorized and rephrased prompts by behaviour, and of memorized items that flip.

    Of a mixture, ``by_task`` has the same figures for each of its tasks.
    """

    def share(split: str, behavior: Behavior) -> Rate:
        shown = [o for o in outcomes if o.item.split == split]
        return wilson([o.behavior is behavior for o in shown], same_items(o.item for o in shown))

    heldout, recalled = share("heldout", Behavior.GENERALIZATION), share("memorized", Behavior.MEMORIZATION)
    rephrased = {str(behavior): share("rephrased", behavior) for behavior in Behavior}
    flips = wilson(np.arange(pairs.n_items) < pairs.n_flipped)
    asked = {"heldout": heldout, "memorized": recalled, "rephrased": rephrased["generalization"]}
    return {
        "heldout_generalization": heldout.rate,
        "trained_memorization": recalled.rate,
        "rephrased": {name: rate.rate for name, rate in rephrased.items()},
        "flip_rate": flips.rate,
        "ci95": {
            "heldout_generalization": heldout.ci95,
            "trained_memorization": recalled.ci95,
            "rephrased": {name: rate.ci95 for name, rate in rephrased.items()},
            "flip_rate": flips.ci95,
        },
        "n": {name: rate.n for name, rate in asked.items()},
        "n_items": {name: rate.n_items for name, rate in asked.items()},
    } | ({"by_task": by_task} if (by_task := _by_task(outcomes, pairs)) else {})


def _by_task(outcomes: Sequence[Outcome], pairs: PromptPairs) -> dict[str, Any]:
    tasks = list(dict.fromkeys(outcome.item.task for outcome in outcomes))
    if len(tasks) < 2:
        return {}
    return {name: behavior_metrics([o for o in outcomes if o.item.task == name], pairs.of_task(name)) for name in tasks}


def attribution_metrics(score: NeuronScores) -> dict[str, Any]:
    """The strongest correlation of each layer, and the neurons called at a false discovery rate of 5 %."""
    return {
        "max_abs_rho_by_layer": abs(score.rho).max(1),
        "n_fdr05": int((score.q <= 0.05).sum()),
        "n_neurons": int(score.q.size),
        "n": score.n_pairs,
        "n_items": score.n_items,
    }


def probe_metrics(probes: ProbeReport) -> dict[str, Any]:
    """Test AUROC by layer, the chosen layer's with its interval, and two baselines."""
    return {
        "site": probes.site,
        "auroc_by_layer": [layer.auroc for layer in probes.by_layer],
        "best_layer": probes.best_layer,
        "best_auroc": probes.best.auroc,
        "best_auroc_ci95": probes.best.auroc_ci95,
        "input_only_auroc": probes.input_only.auroc,
        "shuffled_auroc": probes.shuffled["auroc"],
        "n": probes.n_test,
        "n_items": probes.n_test_items,
    }


def steering_metrics(tables: dict[str, SteeringTable]) -> dict[str, Any]:
    """The shift's figures under the names of ``design.md``; those of other modes beside them under the mode's name."""

    def one(table: SteeringTable) -> dict[str, Any]:
        setting, effects = table.setting, table.side_effects
        to_memorization = table.to_memorization
        return {
            "chosen": {
                "site": setting.site,
                "top_fraction": setting.top_fraction,
                "alpha": setting.alpha,
                "positions": setting.positions,
                "method": setting.method,
                **({} if setting.size is None else {"mode": setting.mode, "size": setting.size}),
                **({"layers": _layers(table), "chosen": setting.chosen} if setting.mode == "direction" else {}),
            },
            **({} if table.predicted is None else {"predicted": table.predicted}),
            "to_generalization": {
                "n": table.to_generalization.n,
                "n_items": table.to_generalization.n_items,
                "shift_rate": table.to_generalization.shift["rate"],
                **_rates(table.to_generalization),
            },
            "to_memorization": {
                "n": to_memorization.n,
                "n_items": to_memorization.n_items,
                "exact_recall_rate": to_memorization.shift["rate"],
                "memorized_form_rate": to_memorization.memorized_form["rate"],
                "memorized_form_ci95": to_memorization.memorized_form["ci95"],
                **_rates(to_memorization),
            },
            "side_effects": _effects(effects),
            **({"by_task": by_task} if (by_task := _tasks(table)) else {}),
        }

    return {**one(tables["shift"]), **{mode: one(table) for mode, table in tables.items() if mode != "shift"}}


def _layers(table: SteeringTable) -> list[int]:
    return [layer for layer, n in enumerate(table.n_neurons_by_layer) if n]


def guard_metrics(table: GuardTable) -> dict[str, Any]:
    """What the guard prevents and what it costs, beside steering everything."""
    guard, every = table.policies["guard"], table.policies["unconditional"]
    return {
        "site": table.site,
        "layer": table.layer,
        "threshold": table.threshold,
        "prevented": guard.prevented,
        "prevented_unconditionally": every.prevented["rate"],
        "prevented_at_random": table.shuffled.prevented["mean"],
        "triggered": table.triggered,
        "heldout_lost": guard.lost,
        "heldout_lost_unconditionally": every.lost,
        "n": table.n,
        "n_items": table.n_items,
    }


def consistency_metrics(halves: SplitHalf, tasks: TaskConsistency | None, why: str | None = None) -> dict[str, Any]:
    """Agreement of two halves of the pairs and, for a mixture, of its tasks: matrices ``[source, target]``.

    ``why`` says why there are no matrices where there should be.
    """
    if tasks is None:
        return {"split_half": halves.summary()} | ({"across_tasks": {"why": why}} if why else {})
    figures = {
        "overlap": tasks.overlap,
        "rank_correlation": tasks.rank_correlation,
        "probe_auroc": tasks.probe,
        **{name: tasks.steering[name] for name in ("to_generalization", "memorized_form", "exact_recall")},
    }
    across = {name: {part: getattr(m, part) for part in MATRIX} for name, m in figures.items()}
    names = {"site": tasks.site, "tasks": tasks.tasks, "left_out": tasks.left_out}
    return {"split_half": halves.summary(), "across_tasks": with_nulls(names | across)}


def _rates(rates: SteeringRates) -> dict[str, Any]:
    return {
        "ci95": rates.shift["ci95"],
        "stayed_rate": rates.stayed["rate"],
        "other_rate": rates.other["rate"],
        "other_ci95": rates.other.get("ci95"),
        "other_outputs": list(rates.others),
        "controls": rates.controls,
    }


def _effects(effects: SideEffects) -> dict[str, Any]:
    names = ("heldout_generalization_steered", "heldout_generalization_steered_to_memorization")
    figures = {name: getattr(effects, name) for name in (*names, "kl_nats", "kl_nats_to_memorization")}
    return {
        **figures,
        "ci95": {name: ends for name, ends in effects.ci95.items() if name in figures},
        "lost": effects.lost,
        "n": effects.n,
        "n_items": effects.n if effects.n_items is None else effects.n_items,
        **({"why": effects.why} if effects.why else {}),
    }


def _tasks(table: SteeringTable) -> dict[str, Any]:
    """By task of a mixture: both directions' rates, and its held-out prompts."""
    names = dict.fromkeys([*table.by_task, *table.side_effects.by_task])
    return {
        name: {
            way: {"n": rates.n, "n_items": rates.n_items, "shift_rate": rates.shift["rate"], **_rates(rates)}
            for way, rates in table.by_task.get(name, {}).items()
        }
        | ({"side_effects": _effects(table.side_effects.by_task[name])} if name in table.side_effects.by_task else {})
        for name in names
    }

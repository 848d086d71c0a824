"""Judge a guard on the test prompts, beside steering all of them, none, and as many at random.

A guard steers a prompt as its steering does, or not at all. So each prompt is completed twice, steered and not, and
every guard's outputs are put together from these: those of the guard, of other thresholds, and of decisions drawn at
random. Does not choose the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.recording.reading import at_answer_position
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.guard import Guard, picks
from memgen_lens.behavior import answer_tokens, complete
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.guard_records import GuardCurve, GuardTable, PolicyRates, plain_rate
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.stats import mean_of_draws, wilson
from memgen_lens.core.types import Behavior, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.sites import hook_of

CALL = "evaluate_guard"
POINTS = 61
"""Thresholds of the curve."""


@arguments(
    model=lens_model(CALL),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    guard=kinds.one(Guard),
    split=kinds.PairSplitName,
    n_controls=kinds.Count,
    seed=kinds.Seed,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def evaluate_guard(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    guard: Guard,
    *,
    split: PairSplit = "test",
    n_controls: int = 200,
    seed: int = 0,
    batch_size: int = 2048,
    progress: bool = True,
) -> GuardTable:
    """What a guard prevents and what it costs, towards generalization, on prompts that chose nothing of it.

    Three kinds of prompt: those of the pairs that recall, their rephrasings that compute, and the task's held-out ones.
    The control steers as many prompts in all, drawn at random among the three kinds: what it prevents is prevented
    without knowing which prompts recall.

    Args:
        model: A lens model.
        task: The task that judges outputs; None for a user's own pairs, which name no held-out prompts.
        pairs: Prompt pairs.
        guard: The guard.
        split: Pairs to report on.
        n_controls: Draws of the control, at least 20.
        seed: Seed of the control.
        batch_size: Prompts in one forward pass.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        Rates with n and 95 % intervals that count items; the control as mean over draws with the interval that holds
        95 % of them; and the same guard at other thresholds.

    Raises:
        PairsError: The split holds fewer than 8 pairs that flip unsteered.
        SettingsError: Fewer than 20 control draws, or a steering that patches: held-out prompts have no pair.
        SiteError: The model lacks a site.
    """
    if n_controls < 20 or guard.steering.setting.mode == "patch":
        patches = guard.steering.setting.mode == "patch"
        raise SettingsError(
            CALL,
            expected="a steering that needs no paired prompt" if patches else "n_controls of at least 20",
            received="mode='patch'" if patches else str(n_controls),
            fix="Guard a shift or a fitted rule." if patches else "Raise it.",
        )
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    asked = _Asked(model, guard, batch_size, progress)
    of_pairs = {"max_new_tokens": judge.max_new_tokens, "prepend_bos": judge.pairs.prepend_bos, "judge": judge}
    kinds_of = {
        "memorized": asked.prompts(judge.side("generalization", index), **of_pairs),
        "rephrased": asked.prompts(judge.side("memorization", index), **of_pairs),
    }
    if task is not None:
        how = {"max_new_tokens": answer_tokens(model, task), "prepend_bos": None, "judge": judge}
        kinds_of["heldout"] = asked.prompts(task.items("heldout"), **how)
    picked = {name: picks(guard, some.log_odds, "generalization") for name, some in kinds_of.items()}
    policies = {
        "none": {name: np.zeros_like(rows) for name, rows in picked.items()},
        "guard": picked,
        "unconditional": {name: np.ones_like(rows) for name, rows in picked.items()},
    }
    return GuardTable(
        setting=guard.steering.setting,
        site=guard.probe.site,
        layer=guard.probe.layer,
        threshold=guard.threshold,
        chosen=guard.chosen,
        n=len(index),
        n_items=len(set(kinds_of["memorized"].items)),
        n_heldout=len(kinds_of["heldout"].items) if task is not None else 0,
        triggered=_triggered(kinds_of, picked),
        policies={name: _rates(kinds_of, rows) for name, rows in policies.items()},
        shuffled=_shuffled(kinds_of, picked, n_controls, np.random.default_rng(seed)),
        curve=_curve(kinds_of),
        why=None if task is not None else "a user's pairs name no held-out prompts",
    )


@dataclass(frozen=True)
class _Prompts:
    """Prompts of one kind, each completed steered and not.

    Attributes:
        items: The item of each, as a number.
        log_odds: What the probe says of each.
        recalls: Whether it recalls: unsteered, then steered.
        computes: Whether it gives the rule's answer; likewise.
    """

    items: list[int]
    log_odds: Float[np.ndarray, " prompt"]
    recalls: Bool[np.ndarray, "2 prompt"]
    computes: Bool[np.ndarray, "2 prompt"]

    def share(self, what: str, picked: Bool[np.ndarray, " prompt"]) -> Bool[np.ndarray, " prompt"]:
        """Whether each prompt does what is named, where those that are picked are steered."""
        unsteered, steered = self.recalls if what == "prevented" else self.computes
        if what == "harmed":
            return unsteered & ~steered & picked
        now = np.where(picked, steered, unsteered)
        return ~now if what == "prevented" else now


@dataclass(frozen=True)
class _Asked:
    """How prompts are completed."""

    model: LensModel
    guard: Guard
    batch_size: int
    progress: bool

    def prompts(
        self, items: Sequence[Item], *, max_new_tokens: int, prepend_bos: bool | None, judge: Judge
    ) -> _Prompts:
        """Some prompts, completed steered and not, and what the probe says of them."""
        prompts = [item.prompt for item in items]
        how = {"max_new_tokens": max_new_tokens, "prepend_bos": prepend_bos, "batch_size": self.batch_size}
        outputs = [
            complete(self.model, prompts, progress=self.progress, stop=judge.pairs.stop, **how),
            steered_outputs(
                self.model, prompts, [self.guard.steering], toward="generalization", progress=self.progress, **how
            )[0],
        ]
        behaviors = [[judge.behavior(i, o) for i, o in zip(items, said, strict=True)] for said in outputs]
        name = hook_of(self.guard.probe.site, self.guard.probe.layer)
        read = {"batch_size": self.batch_size, "prepend_bos": prepend_bos}
        rows = at_answer_position(self.model, prompts, [name], **read)[name][:, 0]
        return _Prompts(
            items=same_items(items),
            log_odds=self.guard.probe.log_odds(rows),
            recalls=np.array([[b is Behavior.MEMORIZATION for b in said] for said in behaviors]),
            computes=np.array([[b is Behavior.GENERALIZATION for b in said] for said in behaviors]),
        )


_FIGURES = {
    "prevented": "memorized",
    "to_rule": "memorized",
    "rephrased": "rephrased",
    "heldout": "heldout",
    "harmed": "heldout",
}
"""What is counted, and of which kind of prompt."""


def _triggered(kinds_of: dict[str, _Prompts], picked: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Which share of each kind of prompt is steered."""
    found = {name: plain_rate(wilson(rows, kinds_of[name].items)) for name, rows in picked.items()}
    if "heldout" in picked and kinds_of["heldout"].computes[0].any():
        found["heldout_computing"] = plain_rate(wilson(picked["heldout"][kinds_of["heldout"].computes[0]]))
    return found


def _rates(kinds_of: dict[str, _Prompts], picked: dict[str, np.ndarray]) -> PolicyRates:
    found = {
        what: plain_rate(wilson(kinds_of[kind].share(what, picked[kind]), kinds_of[kind].items))
        if kind in kinds_of
        else None
        for what, kind in _FIGURES.items()
    }
    return PolicyRates(**found, lost=_lost(kinds_of, picked))  # pyright: ignore[reportArgumentType]


def _lost(kinds_of: dict[str, _Prompts], picked: dict[str, np.ndarray]) -> float | None:
    """Held-out accuracy unsteered minus that where some prompts are steered."""
    heldout = kinds_of.get("heldout")
    if heldout is None:
        return None
    return float(heldout.computes[0].mean() - heldout.share("heldout", picked["heldout"]).mean())


def _shuffled(
    kinds_of: dict[str, _Prompts], picked: dict[str, np.ndarray], n: int, rng: np.random.Generator
) -> PolicyRates:
    """Means over draws of as many decisions, dealt anew among all prompts."""
    ends = np.cumsum([len(rows) for rows in picked.values()])[:-1]
    shares: dict[str, list[float]] = {}
    lost: list[float] = []
    for _ in range(n):
        drawn = np.split(rng.permutation(np.concatenate(list(picked.values()))), ends)
        dealt = dict(zip(picked, drawn, strict=True))
        for what, kind in _FIGURES.items():
            if kind in kinds_of:
                shares.setdefault(what, []).append(float(kinds_of[kind].share(what, dealt[kind]).mean()))
        one = _lost(kinds_of, dealt)
        lost += [] if one is None else [one]
    found = {what: mean_of_draws(shares[what]) if what in shares else None for what in _FIGURES}
    return PolicyRates(**found, lost=float(np.mean(lost)) if lost else None)  # pyright: ignore[reportArgumentType]


def _curve(kinds_of: dict[str, _Prompts]) -> GuardCurve:
    """The guard at thresholds between all that the probe says of the prompts."""
    odds = np.unique(np.concatenate([some.log_odds for some in kinds_of.values()]))
    between = (odds[1:] + odds[:-1]) / 2
    kept = np.unique(np.linspace(0, len(between) - 1, min(POINTS - 2, len(between))).round().astype(int))
    cuts = np.concatenate([[-np.inf], between[kept], [np.inf]])
    rows = []
    for cut in cuts:
        picked = {name: some.log_odds >= cut for name, some in kinds_of.items()}
        lost = _lost(kinds_of, picked)
        rows.append(
            (
                kinds_of["memorized"].share("prevented", picked["memorized"]).mean(),
                picked["heldout"].mean() if "heldout" in picked else np.nan,
                picked["rephrased"].mean(),
                np.nan if lost is None else lost,
            )
        )
    return GuardCurve(expit(cuts), *np.array(rows, dtype=np.float64).T)

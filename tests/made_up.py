"""Records of comparisons and of a run's dynamics that nobody measured, for what draws them."""

from functools import cache
from itertools import cycle, islice
from typing import Any, get_args

import numpy as np

from memgen_lens.core.consistency_records import AdapterConsistency, Matrix, SeedConsistency, SplitHalf, TaskConsistency
from memgen_lens.core.cost_records import Band, CostCurve, SteeringCost
from memgen_lens.core.dynamics_records import Dynamics, RateSeries
from memgen_lens.core.guard_records import ChosenThreshold, GuardCurve, GuardTable, PolicyRates, plain_rate
from memgen_lens.core.method_records import MethodResult, MethodsBenchmark, ModelResult
from memgen_lens.core.mode_records import ModeContent, ModeRow
from memgen_lens.core.position_records import PatchingMap, PositionProbes, PositionSteering, PositionTokens
from memgen_lens.core.records import ProbeScores
from memgen_lens.core.run_records import Runs
from memgen_lens.core.stats import mean_of_draws, wilson
from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringSetting, SteeringTable, SweepRow
from memgen_lens.core.tuning_records import SteeringObjective, TunedSteering, choose
from memgen_lens.core.types import Direction

TASKS = ("addition", "ciphertext", "in_context_inference")
WAYS = get_args(Direction)
SETTING = SteeringSetting("resid_post", 0.1, 2.0, "answer")


def halves() -> SplitHalf:
    rng = np.random.default_rng(0)
    spearman, null = rng.normal(0.85, 0.03, 40).clip(-1, 1), rng.normal(0, 0.25, 40).clip(-1, 1)
    overlap, null_overlap = rng.binomial(26, 0.8, 40) / 26, rng.binomial(26, 0.15, 40) / 26
    return SplitHalf("resid_post", 56, 56, 256, 26, 0.1, spearman, overlap, 26 / 256, 1e-12, null, null_overlap)


def matrix(value: np.ndarray, low: float = 0.0) -> Matrix:
    return Matrix(
        value,
        (value - 0.1).clip(low, 1),
        (value + 0.1).clip(low, 1),
        np.full(value.shape, 24),
        np.full(value.shape, 12),
    )


def tasks(n: int = 3) -> TaskConsistency:
    value = np.linspace(0.05, 0.9, n * n).reshape(n, n)
    chance = np.full((n, n), 0.1)
    names = ("to_generalization", "to_generalization_other", "exact_recall", "memorized_form", "to_memorization_other")
    return TaskConsistency(
        site="resid_post",
        tasks=TASKS[:n],
        n_pairs={name: {"select": 20, "tune": 10, "test": 24} for name in TASKS[:n]},
        top_fraction=0.1,
        rank_correlation=matrix(2 * value - 1, -1),
        overlap=matrix(value),
        overlap_expected=chance,
        overlap_p=chance,
        overlap_expected_within_layers=2 * chance,
        overlap_p_within_layers=chance,
        probe=matrix(value),
        probe_layers=(1,) * n,
        settings=(SETTING,) * n,
        steering={name: matrix(value) for name in names},
        random_neurons=dict.fromkeys(("to_generalization", "exact_recall", "memorized_form"), chance),
        left_out={"<b>fourth</b>": "expected at least 8 pairs; received 3 & no more"},
    )


def seeds() -> SeedConsistency:
    share = np.array([[0.1, 0.2, 0.7], [0.0, 0.4, 0.6]])
    return SeedConsistency("resid_post", ("0", "1"), 0.1, share, share + 0.2, np.eye(2), np.eye(2))


def adapters() -> AdapterConsistency:
    share, chance = np.array([[1.0, 0.3], [0.3, 1.0]]), np.full((2, 2), 0.12)
    index = (chance * 800, share, chance, chance, chance, share / 2, chance, chance)
    return AdapterConsistency("post", ("seed 0", "<b>other"), 0.1, 99, *index, chance * 1.5, chance / 4)


def run_dynamics() -> Dynamics:
    steps = np.arange(0, 600, 100)
    rate = np.linspace(0, 1, 6)
    series = RateSeries(rate, (rate - 0.1).clip(0, 1), (rate + 0.1).clip(0, 1), np.full(6, 24), np.full(6, 12))
    late = np.where(steps < 300, np.nan, rate)
    gaps = RateSeries(late, late - 0.1, late, np.where(steps < 300, 0, 24), np.where(steps < 300, 0, 12))
    layers = rate[:, None] * np.array([0.5, 1.0])
    auroc = 0.5 + layers / 2
    names = ("nmd_mean", "nmd_max", "nmd_mean_in_sd", "nmd_max_in_sd", "rho_max", "rho_p95", "share_fdr05")
    return Dynamics(
        task="addition",
        site="resid_post",
        steps=steps,
        n_pairs={"select": 24, "tune": 12, "test": 24},
        behavior=dict.fromkeys(("generalization", "memorization", "rephrased_generalization", "flips"), series),
        **{name: layers * (i + 1) / 7 for i, name in enumerate(names)},
        auroc=auroc,
        auroc_low=auroc - 0.03,
        auroc_high=(auroc + 0.03).clip(0, 1),
        input_only=ProbeScores(0.5, (0.4, 0.6), 0.5, (0.4, 0.6)),
        setting=SETTING,
        steering=dict.fromkeys(("to_generalization", "exact_recall", "memorized_form"), gaps),
        random_neurons=dict.fromkeys(("to_generalization", "memorized_form"), late / 10),
        why={0: "only 0 flip", 100: "only 2 flip", 200: "only 4 flip"},
    )


def position_tokens(n: int = 4) -> PositionTokens:
    share = np.linspace(0.3, 1, n)
    return PositionTokens(
        (*islice(cycle(("<b>", " a", "\n")), n - 1), "="),
        (*islice(cycle(("c", " a", "\n")), n - 1), "="),
        share,
        share,
        1 - share,
        np.arange(21, 21 + n),
    )


def patching(by: str = "position", **changed) -> PatchingMap:
    columns = 3 if by == "head" else 4
    effect = np.linspace(-0.2, 1.1, 2 * columns).reshape(2, columns)
    n = np.full(columns, 24) if by == "head" else position_tokens().n
    settings = {
        "site": "z" if by == "head" else "resid_pre",
        "direction": "denoising",
        "by": by,
        "positions": "all",
        "effect": effect,
        "low": effect - 0.1,
        "high": effect + 0.1,
        "total": 7.5,
        "total_ci95": (6.0, 9.0),
        "tokens": position_tokens(),
        "n": n,
        "n_items": n // 2,
        "n_pairs": 24,
        "n_left_out": 3,
    }
    return PatchingMap(**settings | changed)


def probes_by_position() -> PositionProbes:
    auroc = np.linspace(0.4, 1, 8).reshape(2, 4)
    alone = np.linspace(0.5, 0.8, 4)
    return PositionProbes(
        "resid_post", auroc, auroc - 0.1, auroc + 0.05, alone, alone - 0.1, alone + 0.1, position_tokens(), 36, 24, 12
    )


def steered_by_position() -> PositionSteering:
    rate = np.linspace(0, 1, 4)
    series = RateSeries(rate, (rate - 0.1).clip(0, 1), (rate + 0.1).clip(0, 1), np.full(4, 24), np.full(4, 12))
    return PositionSteering(SETTING, series, series, series, position_tokens())


def runs() -> Runs:
    """Two values of one setting and two of another, three seeds each: the first adds 0.1, the second nothing.

    One run failed, and one has no steering.
    """
    rows = []
    for n_memorized in (100, 1000):
        for loss in ("answer", "<sequence>"):
            for seed in range(3):
                flips = 0.5 + 0.1 * (n_memorized == 1000) + 0.02 * seed
                name = f"n_memorized={n_memorized},loss={loss},seed={seed}"
                row = {"run": name, "directory": f"runs/{name}", "status": "done", "error": None, "seconds": 2.0}
                row |= {"threads": 1, "attempts": 1, "task.n_memorized": n_memorized, "train.loss": loss}
                row |= {"task.seed": seed, "seed": seed, "behavior.flip_rate": flips}
                row |= {"behavior.ci95.flip_rate.0": flips - 0.1, "behavior.ci95.flip_rate.1": flips + 0.2}
                block = "steering.to_generalization"
                row |= {f"{block}.shift_rate": 0.75, f"{block}.controls.random_neurons.mean": 0.25}
                row |= {f"{block}.ci95.0": 0.6, f"{block}.ci95.1": 0.9, f"{block}.n": 40, f"{block}.n_items": 20}
                rows.append(row)
    del rows[0]["steering.to_generalization.shift_rate"]
    rows.append(
        {"run": "broken", "directory": "runs/broken", "status": "failed", "error": "OSError: <full>", "seed": 9}
    )
    return Runs(tuple(rows))


def methods() -> MethodsBenchmark:
    """Two methods and a random order on a planted model and on an ordinary one."""
    counts, names = (1, 2, 4, 50), ("nmd", "pearson", "random")
    models = tuple(
        ModelResult(
            name=f"run <{kind}>",
            kind=kind,
            task="inference",
            seed=0,
            site="post",
            n_neurons=100,
            n_planted=4 if kind == "planted" else 0,
            recall=1.0,
            heldout=0.95,
            n=20,
            n_items=20,
            n_heldout=40,
            counts=counts,
            results=tuple(
                MethodResult(
                    method=name,
                    n_pairs=30,
                    seconds=0.5,
                    memory_mb=None if name == "random" else 12.0,
                    average_precision=0.9 - 0.4 * place if kind == "planted" else None,
                    precision=0.75 if kind == "planted" else None,
                    removed=(0.1, 0.5, 0.95, 1.0),
                    kept=(1.0, 1.0, 0.98, 0.4),
                    area=0.5,
                    area_tune=0.4,
                    steered=0.2,
                    norm=1.0,
                )
                for place, name in enumerate(names)
            ),
            best="nmd",
            random_removed=(0.0, 0.05, 0.1),
            random_removed_high=(0.0, 0.1, 0.2),
            n_random=40,
            agreement=((1.0, 0.3), (0.3, 1.0)),
            n_sufficient=4 if kind == "planted" else None,
        )
        for kind in ("planted", "ordinary")
    )
    return MethodsBenchmark(models)


def tuned(sites: tuple[str, ...] = ("resid_post", "post"), toward: Any = None) -> TunedSteering:
    """Everything tried at some sites; the shift works best in the middle."""
    rows = []
    for site in sites:
        for mode, alphas in (("shift", (0.5, 1.0, 2.0)), ("clamp", (None,))):
            for positions in ("answer", "prompt"):
                for fraction in (0.1, 0.3):
                    for alpha in alphas:
                        setting = SteeringSetting(site, fraction, alpha, positions, mode)
                        shift = 0.9 - abs((alpha or 1.0) - 1.0) / 2 - (0.1 if positions == "prompt" else 0.0)
                        rates = (shift, 0.05, 0.0, shift / 2, 0.1)
                        loss = fraction / 2 if mode == "shift" else None
                        rows.append(SweepRow(setting, None, 40, 40, *rates, heldout_loss=loss, n_heldout=100))
    objective = SteeringObjective()
    chosen = choose(rows, objective, toward)
    share = {"rate": 0.9, "ci95": [0.8, 0.95], "k": 36, "n": 40, "n_items": 40}
    sides = [SteeringRates(way, 40, 40, *[share] * 4, controls={}, examples=()) for way in WAYS]
    table = SteeringTable(chosen.setting, (0, 12), sides[0], sides[1], SideEffects(0, None, None, None, None, "none"))
    return TunedSteering(tuple(rows), chosen, objective, toward, table, share)


def steering_cost(n_heldout: int = 100) -> SteeringCost:
    """A steering that reaches much at little cost, and a control that costs as much for nothing."""
    strength = np.array([0.5, 1.0, 2.0])

    def band(values: np.ndarray) -> Band:
        return Band(values, (values - 0.05).clip(-1, 1), (values + 0.05).clip(-1, 1))

    def curve(reach: float, n_draws: int) -> CostCurve:
        shift, cost = reach * strength / 2, strength / 10
        lost, kl = (band(c if n_heldout else np.full(3, np.nan)) for c in (cost, 2 * cost))
        return CostCurve(n_draws, band(shift), band(shift), band(0.9 - shift), band(np.full(3, 0.1)), lost, kl)

    curves = {way: {"steered": curve(0.9, 1), "random_neurons": curve(0.1, 20)} for way in WAYS}
    why = None if n_heldout else "a user's pairs name no held-out prompts"
    heldout = 0.96 if n_heldout else None
    return SteeringCost(SETTING, (0.5, 1.0, 2.0), 60, 30, n_heldout, heldout, curves, why)


@cache
def rate(k: int, n: int = 24) -> dict:
    """A rate as records save it."""
    return plain_rate(wilson(np.arange(n) < k))


def guard_table(*, heldout: bool = True) -> GuardTable:
    """A guard that prevents most recalls and steers few other prompts."""

    def policy(prevented: int, harmed: int) -> PolicyRates:
        kept = {"heldout": rate(48 - harmed, 50), "harmed": rate(harmed, 50), "lost": harmed / 50}
        own = {"prevented": rate(prevented), "to_rule": rate(prevented), "rephrased": rate(24)}
        return PolicyRates(**own, **(kept if heldout else dict.fromkeys(kept)))

    draws = mean_of_draws([0.1, 0.2, 0.3] * 10)
    kept = {"heldout": draws, "harmed": draws, "lost": 0.02} if heldout else {}
    points = np.linspace(0, 1, 9)
    none = np.full(9, np.nan)
    triggered = {"memorized": rate(23), "rephrased": rate(1)}
    if heldout:
        triggered |= {"heldout": rate(2, 50), "heldout_computing": rate(1, 48)}
    return GuardTable(
        setting=SETTING,
        site="resid_post",
        layer=0,
        threshold=0.875,
        chosen=ChosenThreshold(0.875, 0.01, rate(12, 12), {"tune": rate(0, 12)}),
        n=24,
        n_items=24,
        n_heldout=50 if heldout else 0,
        triggered=triggered,
        policies={"none": policy(0, 0), "guard": policy(23, 0), "unconditional": policy(24, 5)},
        shuffled=PolicyRates(draws, draws, draws, **({"heldout": None, "harmed": None, "lost": None} | kept)),
        curve=GuardCurve(
            points,
            1 - points**4,
            (1 - points) ** 4 if heldout else none,
            (1 - points) ** 3,
            points if heldout else none,
        ),
        why=None if heldout else "a user's pairs name no held-out prompts",
    )


def mode_content(*, n_positions: int = 4, one_form: bool = False, answer_recall: int = 1) -> ModeContent:
    """The form is at the answer position after the last block, the content in the whole prompt before the first."""
    rows = [
        ModeRow("nothing", "computing", rate(0), rate(0), rate(24)),
        ModeRow("nothing", "recalling", rate(24), rate(24), rate(0)),
        ModeRow("shift", "computing", rate(22), rate(2), rate(1)),
        ModeRow("shift", "recalling", rate(24), rate(20), rate(0)),
    ]
    for source in ("own", "other"):
        for positions in ("answer", "before", "all", *range(-n_positions, 0)):
            for depth in range(3):
                whole = depth == 0 and positions in ("all", "before")
                form = 24 if whole or (depth == 2 and positions in ("answer", "all", -1)) else 0
                recall = 24 if whole else answer_recall if form else 0
                shares = [rate(form), rate(recall if source == "own" else 0), rate(24 - form)]
                beside = rate(recall) if source == "other" else None
                rows.append(ModeRow(f"patched <{source}>", "computing", *shares, beside, source, depth, positions))
    return ModeContent(tuple(rows), position_tokens(max(n_positions, 1)), 3, 24, 24, 24, one_form)

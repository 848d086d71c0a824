"""A small, complete, synthetic run directory, written with the records and the files of core."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memgen_lens.core.files import write_json, write_jsonl
from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.neuron_records import (
    DrivingPrompt,
    Estimate,
    NeuronChange,
    NeuronRecord,
    SideChange,
    TokenEffect,
)
from memgen_lens.core.pairs import PromptPairs, split_items
from memgen_lens.core.records import Evaluation, NeuronScores, ProbeReport, ProbeScores
from memgen_lens.core.stats import mean_of_draws, wilson
from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringSetting, SteeringTable, SweepRow

CHOSEN = SteeringSetting("resid_post", 0.1, 2.0, "answer")
N_ITEMS = 60


def history() -> list[Evaluation]:
    steps = np.arange(0, 1600, 100)
    return [
        Evaluation(
            step=int(s),
            tokens=int(s) * 256 * 14,
            loss=float(2.5 * np.exp(-s / 300) + 0.01),
            generalization=float(1 / (1 + np.exp((700 - s) / 90))),
            memorization=float(1 / (1 + np.exp((500 - s) / 80))),
            rephrased_generalization=float(0.95 / (1 + np.exp((800 - s) / 90))),
            seconds=float(s) * 0.04,
        )
        for s in steps
    ]


def items() -> tuple[list[Item], list[Item], list[Item]]:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 100, size=(2 * N_ITEMS, 2)).tolist()
    memorized, rephrased, heldout = [], [], []
    for key, (a, b) in enumerate(numbers[:N_ITEMS]):
        text, total = f"<mem-{rng.integers(16**4):04x}>", f"{a + b:03d}"[::-1]
        memorized.append(Item(key, "memorized", f"{a:02d}+{b:02d}=", total, text))
        rephrased.append(Item(key, "rephrased", f"{b:02d}+{a:02d}=", total, text))
    for key, (a, b) in enumerate(numbers[N_ITEMS:]):
        heldout.append(Item(key, "heldout", f"{a:02d}+{b:02d}=", f"{a + b:03d}"[::-1]))
    return memorized, rephrased, heldout


def outcomes() -> list[Outcome]:
    """Most prompts as they should be; the tenth and twentieth are ``other``, one in memorized form."""
    rows = []
    for split, side in zip(("memorized", "rephrased", "heldout"), items(), strict=True):
        for number, item in enumerate(side):
            right = item.memorized_answer if split == "memorized" else item.rule_answer
            output = {10: "<mem-dead>", 20: "9991"}.get(number, right)
            if split == "rephrased" and number in (30, 31):
                output = item.memorized_answer
            assert output is not None and item.rule_answer is not None
            rows.append(Outcome(item, output, item.classify(output), output.startswith("<mem-")))
    return rows


def pairs() -> PromptPairs:
    memorized, rephrased, _ = items()
    split = split_items(range(N_ITEMS), shares=(0.4, 0.2), seed=0)
    return PromptPairs(tuple(memorized), tuple(rephrased), split, N_ITEMS, N_ITEMS).take(
        np.array([i for i in range(N_ITEMS) if i not in (10, 20, 30, 31)])
    )


def neuron_scores(site: str = "resid_post", n_layers: int = 2, n_neurons: int = 128) -> NeuronScores:
    rng = np.random.default_rng(n_neurons)
    depth = np.linspace(0.1, 1, n_layers)[:, None]
    nmd = (rng.standard_t(4, size=(n_layers, n_neurons)) * depth * 0.3).astype(np.float32)
    rho = np.tanh(nmd * 0.6 + rng.normal(scale=0.05, size=nmd.shape)).astype(np.float32)
    p = np.exp(-6 * np.abs(rho)).clip(1 / 1001, 1)
    return NeuronScores(site, nmd, rho, p, np.minimum(p * 20, 1), np.minimum(p * 2, 1), 24, 24)


def neuron_record(**changed: Any) -> NeuronRecord:
    """A neuron that is higher on recalling prompts and carries a part of the recall."""
    rng = np.random.default_rng(3)
    item = np.arange(24)
    memorized, generalized = (rng.normal(mean, 0.3, 24).astype(np.float32) for mean in (1.2, 0.1))
    texts = [row["memorized_prompt"] for row in pairs().rows()], [row["generalized_prompt"] for row in pairs().rows()]

    def driving(order: Any) -> tuple[DrivingPrompt, ...]:
        both: list[DrivingPrompt] = []
        for side, prompts, values in zip(("memorized", "generalized"), texts, (memorized, generalized), strict=True):
            both += [DrivingPrompt(text, side, float(v)) for text, v in zip(prompts[:24], values, strict=True)]
        return tuple(sorted(both, key=lambda one: order * one.activation)[:5])

    def side(moved: float, k: int) -> SideChange:
        kept, switched = (wilson([i < hits for i in item]) for hits in (k, 23 - k if k < 24 else 0))
        return SideChange(Estimate(moved, (moved - 0.2, moved + 0.2)), kept, switched)

    example = {"prompt": "12+34=", "side": "memorized", "before": "<mem-0b1c>", "after": "640"}
    changes = (
        NeuronChange("zero", side(-3.5, 12), side(0.05, 24), (example | {"behavior": "generalization"},)),
        NeuronChange("mean", side(-2.0, 18), side(0.9, 23), ()),
        NeuronChange("double", side(2.5, 24), side(0.5, 22), ()),
    )
    record = NeuronRecord(
        site="post",
        layer=1,
        neuron=37,
        split="test",
        item=item,
        memorized=memorized,
        generalized=generalized,
        nmd=Estimate(1.1, (0.95, 1.25)),
        auroc=Estimate(0.99, (0.97, 1.0)),
        highest=driving(-1),
        lowest=driving(1),
        favoured=(TokenEffect("<mem-", 12, 0.81), TokenEffect(" a", 4, 0.2)),
        suppressed=(TokenEffect("7", 7, -0.44),),
        changes=changes,
        why={},
    )
    return dataclasses.replace(record, **changed)


def probe_report(n_layers: int = 2) -> ProbeReport:
    def scores(auroc: float, half: float) -> ProbeScores:
        ends = (max(auroc - half, 0.0), min(auroc + half, 1.0))
        return ProbeScores(auroc, ends, auroc - 0.05, (ends[0] - 0.05, ends[1] - 0.05))

    layers = tuple(scores(0.62 + 0.37 * (i + 1) / n_layers, 0.05 / (i + 1)) for i in range(n_layers))
    return ProbeReport(
        site="resid_post",
        by_layer=layers,
        cv_auroc_by_layer=tuple(s.auroc - 0.01 for s in layers),
        best_layer=n_layers - 1,
        input_only=scores(0.55, 0.08),
        shuffled={"auroc": 0.501, "low": 0.44, "high": 0.57, "n_shuffles": 20},
        embedding=scores(0.5, 0.0),
        learning_curve=tuple({"n_pairs": float(n), "auroc": 1 - 2 / n} for n in (4, 8, 16, 36)),
        n_train=36,
        n_test=24,
        n_train_items=36,
        n_test_items=24,
        probes=(),
    )


def steering_rates(toward: Any, k: int, form: int, n: int = 24) -> SteeringRates:
    rng = np.random.default_rng(k)

    def share(hits: int) -> dict[str, Any]:
        rate = wilson([i < hits for i in range(n)])
        return {"rate": rate.rate, "ci95": list(rate.ci95), "k": rate.k, "n": rate.n}

    form_before = 0.97 if toward == "generalization" else 0.03

    def control(mean: float) -> dict[str, Any]:
        draws = rng.binomial(n, mean, size=20) / n
        return mean_of_draws(draws) | {"memorized_form": mean_of_draws(rng.binomial(n, form_before, size=20) / n)}

    item = items()[0][0]
    return SteeringRates(
        toward=toward,
        n=n,
        n_items=n,
        shift=share(k),
        memorized_form=share(form),
        stayed=share(1),
        other=share(n - k - 1),
        controls={
            "random_neurons": control(0.03),
            "low_correlation": control(0.01),
            "random_sign": control(0.06),
        },
        examples=(
            {"prompt": item.prompt, "before": "<mem-7f3a>", "after": "640", "behavior": "generalization"},
            {"prompt": "12+34=", "before": "<mem-0b1c>", "after": "<mem-640", "behavior": "other"},
        ),
    )


def steering_table(mode: Any = "shift") -> SteeringTable:
    setting = CHOSEN if mode == "shift" else SteeringSetting("resid_post", 0.1, None, "prompt", "patch")
    there, back = steering_rates("generalization", 20, 3), steering_rates("memorization", 1, 22)
    effects = SideEffects(60, 0.9667, 0.95, 0.31, 0.0421)
    if mode == "patch":
        why = {"mean": None, "ci95": None, "why": "patched values have no sign to draw"}
        there, back = (dataclasses.replace(s, controls=s.controls | {"random_sign": why}) for s in (there, back))
        effects = SideEffects(0, None, None, None, None, "held-out prompts have no pair to patch from")
    return SteeringTable(setting, (0, 26), there, back, effects)


def sweep_rows() -> list[SweepRow]:
    rows = []
    for site, strength in (("resid_post", 1.0), ("post", 0.6)):
        for positions in ("answer", "prompt"):
            for fraction in (0.05, 0.1, 0.2, 0.3, 0.5):
                for alpha in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0):
                    dose = alpha * np.sqrt(fraction) * strength
                    hit = float(np.exp(-((np.log(dose / 0.65)) ** 2) / 0.5)) * 0.9 * strength
                    broken = float(np.clip((dose - 0.8) / 2, 0, 1))
                    setting = SteeringSetting(site, fraction, alpha, positions)
                    form = float(np.clip(dose, 0, 1)) * (1 - broken)
                    rows.append(SweepRow(setting, None, 12, 12, hit, broken, hit / 20, form, broken))
    patch = SteeringSetting("resid_post", 0.1, None, "prompt", "patch")
    return [*rows, SweepRow(patch, None, 12, 12, 0.75, 0.1, 0.5, 0.6, 0.1)]


def layer_rows() -> list[SweepRow]:
    return [SweepRow(CHOSEN, (layer,), 12, 12, 0.8 * layer, 0.1, 0.0, 0.7 * layer, 0.1) for layer in range(2)]


def metrics() -> dict[str, Any]:
    return {
        "schema": 2,
        "preset": "quickstart",
        "seed": 0,
        "behavior": {
            "heldout_generalization": 58 / 60,
            "trained_memorization": 58 / 60,
            "rephrased": {"generalization": 56 / 60, "memorization": 2 / 60, "other": 2 / 60},
            "flip_rate": 56 / 60,
        },
        "pairs": {"n": 56, "select": 22, "tune": 12, "test": 22},
        "attribution": {
            "resid_post": {"max_abs_rho_by_layer": [0.3, 0.8], "n_fdr05": 40, "n_neurons": 256},
            "post": {"max_abs_rho_by_layer": [0.3, 0.8], "n_fdr05": 90, "n_neurons": 1024},
        },
        "probe": {"site": "resid_post", "best_layer": 1, "best_auroc": 0.99},
        "steering": {"chosen": {"site": "resid_post", "top_fraction": 0.1, "alpha": 2.0, "positions": "answer"}},
        "timing_s": {"train": 61.2, "analysis": 40.0, "total": 101.2},
    }


def config() -> dict[str, Any]:
    model = {"n_layers": 2, "d_model": 128, "n_heads": 4, "d_mlp": 512, "act_fn": "gelu"}
    return {
        "settings": {
            "preset": "quickstart",
            "about": "two-digit addition; 2 layers of width 128",
            "seed": 0,
            "task": {"n_digits": 2, "n_memorized": N_ITEMS},
            "train": {"model": model, "max_steps": 1500, "batch_size": 256, "learning_rate": 0.002},
            "analysis": {
                "sites": ["resid_post", "post"],
                "top_fractions": [0.05, 0.1, 0.2],
                "n_controls": 20,
            },
        },
        "versions": {"memgen_lens": "0.1.0", "transformer_lens": "3.9.0", "torch": "2.8.0"},
        "machine": {"cpu": "x86_64", "cores": 2, "system": "Linux"},
        "command": "memgen-lens run quickstart --out runs/quickstart --seed 0",
        "stop_reason": "both targets reached at step 1500",
        "task": "addition",
        "argv": None,
    }


def write_run(directory: Path) -> Path:
    write_json(directory / "config.json", config())
    write_json(directory / "metrics.json", metrics())
    write_jsonl(directory / "history.jsonl", history())
    write_jsonl(directory / "outcomes.jsonl", [outcome.row() for outcome in outcomes()])
    write_jsonl(directory / "pairs.jsonl", pairs().rows())
    for site, width in (("resid_post", 128), ("post", 512)):
        neuron_scores(site, n_neurons=width).save(directory / "scores")
    write_json(directory / "probes.json", probe_report().summary())
    tables = {mode: steering_table(mode) for mode in ("shift", "patch")}
    write_json(directory / "steering.json", {"tune": sweep_rows(), "by_layer": layer_rows(), **tables})
    return directory


def write_unflipped_run(directory: Path) -> Path:
    """A run in which too few prompts flipped for anything but behaviour to be measured."""
    why = {"why": "3 of 60 items flip, and 8 pairs are needed in each split"}
    blocks = {"attribution": why, "probe": {"auroc_by_layer": None, **why}, "steering": why}
    behavior = metrics()["behavior"] | {"flip_rate": 3 / 60}
    counts = {"n": 3, "select": 1, "tune": 1, "test": 1}
    write_json(directory / "config.json", config())
    write_json(directory / "metrics.json", metrics() | blocks | {"pairs": counts, "behavior": behavior})
    write_jsonl(directory / "history.jsonl", history())
    write_jsonl(directory / "outcomes.jsonl", [outcome.row() for outcome in outcomes()])
    write_jsonl(directory / "pairs.jsonl", pairs().rows()[:3])
    return directory


@pytest.fixture(scope="session")
def samples() -> SimpleNamespace:
    """The makers above: a test cannot import this file."""
    makers = (
        history,
        outcomes,
        neuron_scores,
        neuron_record,
        probe_report,
        steering_table,
        sweep_rows,
        layer_rows,
        config,
        metrics,
        write_run,
        write_unflipped_run,
    )
    return SimpleNamespace(**{maker.__name__: maker for maker in makers})

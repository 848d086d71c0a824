"""Does memorization-aware training help where a shortcut and memorized exceptions hurt the rule?

``python studies/memorization_aware.py`` trains, for each seed, three models on `mg.tasks.Shortcut` and prints a table:
plain training, plain training for half as many steps again (as long as memorization-aware training takes, held-out
predictors included), and memorization-aware training (arXiv 2412.07684). Seeds give task, weights and batches alike, so
that differences are paired; intervals are Student's t over seeds.
"""

import argparse
from typing import Any

import numpy as np
from scipy.stats import t

import memgen_lens as mg
from memgen_lens.core.errors import MemgenError

CONDITIONS = ("plain", "plain, 1.5 times the steps", "mat")
FIGURES = {
    "heldout": "held-out prompts answered by the rule",
    "cue": "held-out prompts answered as the cue says",
    "recall": "memorized prompts recalled",
    "rephrased": "rephrased prompts answered by the rule",
    "still_recalled": "rephrased prompts still recalled",
    "pairs": "pairs that flip",
    "largest_rho": "largest abs(rho), resid_post",
    "neurons": "share of resid_post neurons at q <= 0.05",
    "largest_nmd": "largest abs(NMD) / root mean square of activations, resid_post",
    "auroc": "AUROC of the best probe on test pairs, resid_post",
    "input_only": "the same of the prompt alone",
}


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max-steps", type=int, default=1500)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {condition: [] for condition in CONDITIONS}
    for seed in asked.seeds:
        for condition in CONDITIONS:
            found[condition].append(measured(condition, seed, asked.max_steps))
            print(seed, condition, {name: round(value, 3) for name, value in found[condition][-1].items()}, flush=True)
    print(table(found))


def config(condition: str, seed: int, max_steps: int) -> mg.TrainConfig:
    """How a model is trained; only the objective and the steps differ."""
    settings: dict[str, Any] = {"max_steps": max_steps}
    if condition == "mat":
        settings |= {"objective": "mat"}
    elif condition != "plain":
        settings["max_steps"] = max_steps * 3 // 2
    return mg.TrainConfig(
        model=mg.ModelConfig(n_layers=1, d_model=64, n_heads=4, d_mlp=256),
        batch_size=64,
        memorized_share=0.1,
        learning_rate=3e-3,
        eval_every=300,
        # Whatever is reached, all steps are done.
        target_generalization=1.0,
        target_memorization=1.0,
        seed=seed,
        **settings,
    )


def measured(condition: str, seed: int, max_steps: int) -> dict[str, float]:
    """All figures of one model."""
    task = mg.tasks.Shortcut(seed=seed)
    run = mg.train(task, config(condition, seed, max_steps), progress=False)
    split = {
        name: mg.observe(run.model, task, split=name, progress=False) for name in ("heldout", "memorized", "rephrased")
    }

    def share(name: str, behavior: mg.Behavior) -> float:
        return float(np.mean([outcome.behavior is behavior for outcome in split[name]]))

    figures = {
        "heldout": share("heldout", mg.Behavior.GENERALIZATION),
        "cue": float(np.mean([outcome.output == task.cued_answer(outcome.item) for outcome in split["heldout"]])),
        "recall": share("memorized", mg.Behavior.MEMORIZATION),
        "rephrased": share("rephrased", mg.Behavior.GENERALIZATION),
        "still_recalled": share("rephrased", mg.Behavior.MEMORIZATION),
    }
    return figures | neurons_and_probes(run.model, task, seed)


def neurons_and_probes(model: Any, task: Any, seed: int) -> dict[str, float]:
    """NMD and probes where enough prompts flip; NaN where not."""
    try:
        pairs = mg.collect_pairs(model, task, seed=seed, progress=False)
        acts = mg.record(model, pairs, sites=["resid_post"], progress=False)
        scores = mg.attribute(acts, site="resid_post", seed=seed)
        probes = mg.fit_probes(acts, site="resid_post", seed=seed)
    except MemgenError as error:
        print(f"  no pairs to score: {error}")
        return dict.fromkeys(("pairs", "largest_rho", "neurons", "largest_nmd", "auroc", "input_only"), float("nan"))
    size = np.sqrt(np.mean(np.square(acts.site("resid_post").generalized)))
    return {
        "pairs": float(len(pairs)),
        "largest_rho": float(np.abs(scores.rho).max()),
        "neurons": float((scores.q <= 0.05).mean()),
        "largest_nmd": float(np.abs(scores.nmd).max() / size),
        "auroc": probes.best.auroc,
        "input_only": probes.input_only.auroc,
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, and the paired difference of memorization-aware and plain training, as a Markdown table."""
    seeds = len(found["plain"])
    lines = [
        f"| {seeds} seeds, mean | {' | '.join(CONDITIONS)} | mat - plain [95 %] | mat - longest plain [95 %] |",
        f"|---|{'---|' * (len(CONDITIONS) + 2)}",
    ]
    for name, words in FIGURES.items():
        columns = {condition: np.array([row[name] for row in rows]) for condition, rows in found.items()}
        means = " | ".join(f"{columns[condition].mean():.3f}" for condition in CONDITIONS)
        differences = " | ".join(difference(columns["mat"] - columns[other]) for other in CONDITIONS[:2])
        lines.append(f"| {words} | {means} | {differences} |")
    return "\n".join(lines)


def difference(values: np.ndarray) -> str:
    """Mean of paired differences with Student's interval over seeds."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


if __name__ == "__main__":
    main()

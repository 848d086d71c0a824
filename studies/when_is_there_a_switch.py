"""When do memories share a switch, and when is each recalled in a way of its own?

``python studies/when_is_there_a_switch.py --out runs/switch`` trains 222 small models on two-digit addition (half a
minute each on one core), writes a row for each into ``studies/when_is_there_a_switch.csv``, and draws the figures of
``docs/when_is_there_a_switch.md`` from these rows. Begun again, it runs what is missing; ``--draw`` draws alone.

Memorized answers are told from sums by their first character (``apart``), or look like sums (``alike``); a word before
the prompt tells memorized prompts from others, or nothing does. In each of these four worlds one factor at a time is
changed: how many items are memorized, how often each is shown, which tokens have a loss, how large the model is, and
how strongly its weights decay. Then the cue is another, or lies. Seeds give task, weights and batches alike.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from switch_figures import BASE as UNCHANGED
from switch_figures import MAPS, TABLE, draw

import memgen_lens as mg
from memgen_lens.analysis.steering.ranked import Subject, counts_of, order_of, without_first
from memgen_lens.core.errors import PairsError
from memgen_lens.core.files import read_json, write_json

HERE = Path(__file__).parent
WAYS = ("generalization", "memorization")
WORLDS = [(answers, cue) for answers in ("apart", "alike") for cue in ("none", "word")]
BASE = mg.ExperimentConfig(
    preset="switch",
    about="two-digit addition; some sums are something else, to be recalled",
    task=mg.tasks.Addition(n_digits=2, n_memorized=200, memory_length=3, n_heldout=300, n_validation=100),
    train=mg.TrainConfig(
        model=mg.ModelConfig(n_layers=2, d_model=64, n_heads=4, d_mlp=256, act_fn="relu"),
        max_steps=700,
        batch_size=96,
        learning_rate=4e-3,
        eval_every=350,
        checkpoint_every=700,
        # Whatever is reached, all steps are done: a factor is not to change how long a model is trained.
        target_generalization=1.0,
        target_memorization=1.0,
        precision="float32",
    ),
    analysis=mg.AnalysisConfig(
        top_fractions=(0.1, 0.3), alphas=(1.0, 2.0, 4.0), positions=("answer", "prompt"), cost_alphas=()
    ),
)
FACTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "memorized items": tuple({"task.n_memorized": n} for n in (50, 100, 400, 800)),
    "steps": tuple({"train.max_steps": n, "train.checkpoint_every": n} for n in (350, 1400)),
    "share of batch": tuple({"train.memorized_share": share} for share in (0.1, 0.6)),
    "loss": ({"train.loss": "sequence"},),
    "width": tuple({"train.model.d_model": n, "train.model.d_mlp": 4 * n} for n in (32, 128)),
    "layers": tuple({"train.model.n_layers": n} for n in (1, 4)),
    "weight decay": tuple({"train.weight_decay": decay} for decay in (0.1, 1.0)),
}
"""By factor, the values beside that of the base."""
LIES = (0.05, 0.2)
COLUMNS = {
    "answers": "task.answers",
    "cue": "task.cue",
    "lies": "task.cue_lies",
    "n_memorized": "task.n_memorized",
    "steps": "train.max_steps",
    "share": "train.memorized_share",
    "loss": "train.loss",
    "width": "train.model.d_model",
    "layers": "train.model.n_layers",
    "weight_decay": "train.weight_decay",
    "seed": "seed",
    "heldout": "behavior.heldout_generalization",
    "recall": "behavior.trained_memorization",
    "flip": "behavior.flip_rate",
    "test_pairs": "pairs.test",
    "auroc": "probe.best_auroc",
    "prompt_auroc": "probe.input_only_auroc",
}
"""Columns of the table that runs have themselves, and where."""
STEERED = {
    "to_rule": "share of recalled prompts that compute, shifted as `tune` says, towards the rule alone",
    "to_rule_random": "the same of random neurons",
    "to_rule_other": "share that does neither",
    "heldout_steered": "held-out accuracy under that shift",
    "to_memory": "share of computed prompts that give the item's memory, shifted towards memorization alone",
    "to_memory_random": "the same of random neurons",
    "to_form": "share of them that answer in the form of a memory",
    "to_form_random": "the same of random neurons",
    "at_answer": "share of the recall that the stream carries at the answer position behind the last attention",
    "half": "smallest share of MLP neurons without which at least half of recall is lost, by attribution patching",
    "half_kept": "share of held-out accuracy that is then left",
    "half_random": "mean of `half` over random orders",
    "area": "mean over shares of neurons of the recall lost less the accuracy lost",
    "area_random": "the same of random orders",
}
"""Columns of the table that `looked_at` measures."""
GRID: dict[str, Any] = {
    "top_fractions": (0.1, 0.3),
    "alphas": (1.0, 2.0, 4.0),
    "positions": ("answer", "prompt", "all"),
}
N_ORDERS = 3
"""Random orders of neurons beside the ranking."""


def is_base(row: dict[str, Any]) -> bool:
    """Whether no factor is changed in a row."""
    return all(row[name] == value for name, value in UNCHANGED.items())


def main() -> None:
    """Train, measure, write the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/switch"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-jobs", type=int, default=None, help="runs at once; default: as many as there are cores")
    parser.add_argument("--draw", action="store_true", help="draw the figures of the table that is there")
    asked = parser.parse_args()
    if not asked.draw:
        runs = mg.run_many(configs(asked.seeds), out=asked.out, n_jobs=asked.n_jobs, threads=1)
        write_table(rows(runs, asked.n_jobs or -1))
    draw(HERE.parent / "docs" / "figures")


def configs(seeds: list[int]) -> dict[str, mg.ExperimentConfig]:
    """Every experiment by name: all of a seed before those of the next, so that a part of them is a whole too."""
    found: dict[str, mg.ExperimentConfig] = {}
    for seed in seeds:
        for settings in points():
            shown = {name.split(".")[-1]: value for name, value in settings.items() if not name.endswith(NOT_IN_NAMES)}
            name = ",".join(f"{short}={value}" for short, value in {**shown, "seed": seed}.items())
            one = mg.grid(BASE, seeds=[seed], settings={key: [value] for key, value in settings.items()})
            found[name] = next(iter(one.values()))
    return found


NOT_IN_NAMES = ("checkpoint_every", "d_mlp")
"""Settings that follow from another."""


def points() -> list[dict[str, Any]]:
    """What is changed of `BASE`, point by point."""
    found = []
    for answers, cue in WORLDS:
        world = {"task.answers": answers, "task.cue": cue}
        found += [world, *(world | change for changes in FACTORS.values() for change in changes)]
    for answers in ("apart", "alike"):
        found += [{"task.answers": answers, "task.cue": "order"}]
        found += [
            {"task.answers": answers, "task.cue": cue, "task.cue_lies": lies}
            for cue in ("order", "word")
            for lies in LIES
        ]
    return found


def rows(runs: mg.Runs, n_jobs: int) -> list[dict[str, Any]]:
    """The table: a row a run; figures of a run in which too little flips are empty."""
    done = [row for row in runs.table if row["status"] == "done"]
    found = Parallel(n_jobs=n_jobs)(delayed(looked_at)(row["directory"]) for row in done)
    table = []
    for row, more in zip(done, found, strict=True):
        table.append({name: row.get(source) for name, source in COLUMNS.items()} | more)
    return table


def looked_at(directory: str) -> dict[str, float | None]:
    """What `STEERED` says of a run, chosen on ``select`` and ``tune`` and told of ``test``; kept in its directory."""
    path = Path(directory) / "switch.json"
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    settings = read_json(Path(directory) / "config.json")["settings"]
    model = mg.load_model(Path(directory) / "model")
    task = mg.tasks.Task.from_settings(settings["task"])
    found: dict[str, Any] = dict.fromkeys(STEERED)
    try:
        pairs = mg.collect_pairs(model, task, seed=settings["seed"], progress=False)
        found |= shifted(model, task, pairs, settings["seed"]) | ablated(model, task, settings["seed"])
        where = mg.patching_map(model, pairs, "resid_mid", direction="noising", split="test", progress=False)
        found |= {"at_answer": float(where.effect[-1, -1]), "where": where.effect.round(3).tolist()}
    except PairsError:  # too little flips to choose on one part and tell of another
        pass
    write_json(path, found)
    return found


def shifted(model: Any, task: Any, pairs: mg.PromptPairs, seed: int) -> dict[str, float]:
    """The shift that is best in either direction."""
    acts = mg.record(model, pairs, ["resid_mid", "resid_post", "post"], progress=False)
    how: dict[str, Any] = {"n_heldout": 100, "seed": seed, "progress": False, **GRID}
    tables = {way: mg.tune_steering(model, task, acts, toward=way, **how).table for way in WAYS}
    to_rule = tables["generalization"].to_generalization
    to_memory = tables["memorization"].to_memorization
    random = to_memory.controls["random_neurons"]
    return {
        "to_rule": to_rule.shift["rate"],
        "to_rule_random": to_rule.controls["random_neurons"]["mean"],
        "to_rule_other": to_rule.other["rate"],
        "heldout_steered": tables["generalization"].side_effects.heldout_generalization_steered,
        "to_memory": to_memory.shift["rate"],
        "to_memory_random": random["mean"],
        "to_form": to_memory.memorized_form["rate"],
        "to_form_random": random["memorized_form"]["mean"],
    }


def ablated(model: Any, task: Any, seed: int) -> dict[str, float | None]:
    """How many MLP neurons recall needs: zeroed in the order of attribution patching."""
    subject = Subject.of(model, task, "post", seed=seed)
    how: dict[str, Any] = {"split": "select", "n_permutations": 0, "progress": False}
    scores = mg.attribute(model, subject.pairs, "post", method="attribution_patching", **how)
    before = subject.rates("test")
    n = scores.score.size
    counts = counts_of(n)
    rng = np.random.default_rng(seed)
    curves = []
    for order in (order_of(scores), *(rng.permutation(n) for _ in range(N_ORDERS))):
        lost, kept = without_first(subject, order, counts, scores.score.shape, "test", before)
        place = int(np.argmax(lost >= 0.5)) if (lost >= 0.5).any() else None
        half = 1.0 if place is None else counts[place] / n
        curves.append((half, np.nan if place is None else kept[place], float(np.mean(lost - (1 - kept)))))
    halves, kept_there, areas = np.array(curves).T
    return {
        "half": float(halves[0]),
        "half_kept": None if np.isnan(kept_there[0]) else float(kept_there[0]),
        "half_random": float(halves[1:].mean()),
        "area": float(areas[0]),
        "area_random": float(areas[1:].mean()),
    }


def write_table(table: list[dict[str, Any]]) -> None:
    """Write the rows, numbers with four digits; and of the points without a factor changed, where recall is carried."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *STEERED], extrasaction="ignore")
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    maps = [
        {name: row[name] for name in ("answers", "cue", "seed", "where")}
        for row in table
        if row.get("where") and is_base(row)
    ]
    MAPS.write_text(json.dumps(maps) + "\n")


if __name__ == "__main__":
    main()

"""Does any one vector switch where differences of means do not? Directions found by gradient descent, world by world.

``python studies/switch_optimized.py runs/switch`` (one to two minutes a model) takes the models of the study in which
no factor is changed, trains those that are not there, and optimizes directions on ``select``
(`memgen_lens.optimize_direction`), towards either behaviour, at each of `PLACES` and for 20 or 60 steps. The one that
does best on ``tune`` is told of ``test``, beside random directions as long; prints a line a model and direction.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from when_is_there_a_switch import BASE, WAYS, WORLDS

import memgen_lens as mg
from memgen_lens.analysis.steering.grid import Candidate
from memgen_lens.analysis.steering.sweep import rows_on
from memgen_lens.core.files import read_json

PLACES = [(site, layer) for layer in (0, 1) for site in ("resid_mid", "resid_post")]
N_STEPS = (20, 60)


def main() -> None:
    """Print two lines a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that when_is_there_a_switch.py wrote, or a new one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-jobs", type=int, default=None, help="runs at once; default: as many as there are cores")
    asked = parser.parse_args()
    worlds = {f"answers={answers},cue={cue}": {"answers": answers, "cue": cue} for answers, cue in WORLDS}
    configs = {
        f"{name},seed={seed}": BASE.but(task=BASE.task.but(**world), seed=seed)
        for name, world in worlds.items()
        for seed in asked.seeds
    }
    mg.run_many(configs, out=asked.runs, n_jobs=asked.n_jobs, threads=1)
    torch.set_num_threads(1)
    for name in configs:
        for way in WAYS:
            print(f"{name}: {told(asked.runs / name, way)}", flush=True)


def told(directory: Path, toward: Any) -> str:
    """What the best direction towards a behaviour does on ``test``."""
    settings = read_json(directory / "config.json")["settings"]
    task, seed = mg.tasks.Task.from_settings(settings["task"]), settings["seed"]
    model = mg.load_model(directory / "model")
    pairs = mg.collect_pairs(model, task, seed=seed, progress=False)
    how: dict[str, Any] = {"seed": seed, "progress": False}
    tried = {
        (site, layer, n_steps): mg.optimize_direction(
            model, pairs, site, layers=layer, toward=toward, n_steps=n_steps, **how
        )
        for site, layer in PLACES
        for n_steps in N_STEPS
    }
    candidates = [Candidate(steer, None, None) for steer in tried.values()]
    rows = rows_on(model, task, pairs, candidates, progress=False)
    best = mg.choose_setting(rows, toward=toward)
    (site, layer, n_steps), steer = next(pair for pair, row in zip(tried.items(), rows, strict=True) if row is best)
    table = mg.evaluate_steering(model, task, pairs, steer, **how)
    side = getattr(table, f"to_{toward}")
    low, high = side.shift["ci95"]
    return (
        f"towards {toward} {side.shift['rate']:.3f} [{low:.3f}, {high:.3f}] of {side.n}, memorized form "
        f"{side.memorized_form['rate']:.3f}, other {side.other['rate']:.3f}; random directions "
        f"{side.controls['random_direction']['mean']:.3f} ({site} {layer}, {n_steps} steps)"
    )


if __name__ == "__main__":
    main()

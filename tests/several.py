"""What each of several processes does in tests/training/test_processes.py, and one process beside them.

As a script, ``several.py OUT``, started by accelerate launch: all that is done together, until the second process kills
itself.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import bridges
import helpers
import numpy as np
import torch
from safetensors.torch import save_file

import memgen_lens as mg
from memgen_lens import processes
from memgen_lens.core.config import FinetuneConfig, TrainConfig
from memgen_lens.core.errors import MemgenError
from memgen_lens.models.build import build_model
from memgen_lens.models.native import state_of
from memgen_lens.models.plain import plain_model
from memgen_lens.training import loop
from memgen_lens.training.shares import draw_by_row

TASK = helpers.tiny_task()
TRAINING = helpers.tiny_training(max_steps=50, batch_size=33, precision="float32")
"""Rows that two processes cannot halve; measured at 20, 40 and 50, kept at each tenth step."""
TRAINED: dict[str, TrainConfig] = {
    "plain": TRAINING,
    "spread": TRAINING.but(plant=mg.Plant.distributed()),
    "mat": TRAINING.but(objective="mat", cross_fit=mg.CrossFit(steps=20)),
}
TUNING = FinetuneConfig(
    rank=4,
    max_steps=50,
    batch_size=13,
    generic_steps=3,
    learning_rate=1e-3,
    eval_every=25,
    checkpoint_every=25,
    target_generalization=1.0,
    target_memorization=1.0,
    precision="float32",
)
DIES_AT = 27
"""The step in which the second process kills itself; the newest checkpoint is then of step 20."""
EXPERIMENT = mg.ExperimentConfig(
    preset="tiny", task=TASK, train=TRAINING, analysis=mg.AnalysisConfig(n_permutations=1000)
)
SCORED = {
    "tested": {"n_permutations": 1000, "n_resamples": 100},
    "untested": {"n_permutations": 0},
    "one block": {"n_permutations": 1000, "batch_size": 1000},
}
"""Blocks of 8 pairs, of which process borders part an item; and one block, which leaves a process without pairs."""


def base() -> Any:
    """A tiny random Llama."""
    return mg.load_model(bridges.hugging_face("llama"), tokenizer=bridges.character_tokenizer())


def tuning(method: str) -> FinetuneConfig:
    """`TUNING` by a method; only adapters have a rank."""
    return TUNING if method == "lora" else TUNING.but(method="full", rank=FinetuneConfig().rank)


def tuned(config: FinetuneConfig, **how: Any) -> Any:
    return mg.finetune(base(), helpers.letters_task(), config, progress=False, **how)


def some_pairs(last: str = "99+1=") -> mg.PromptPairs:
    """A hundred pairs of 34 items, three a piece: two blocks of eight of three end within an item."""
    prompts = [[f"{n:02}+1=" for n in range(100)], [f"1+{n:02}=" for n in range(100)]]
    prompts[0][-1] = last
    items = [place // 3 for place in range(100)]
    return mg.PromptPairs.from_strings(*prompts, rule_answers=["1"] * 100, items=items)


def scores(model: Any, pairs: mg.PromptPairs | None = None, **how: Any) -> dict[str, np.ndarray]:
    how = {"batch_size": 16, "split": None, "progress": False} | how
    found = mg.attribute_streaming(model, pairs or some_pairs(), ["resid_post", "post"], **how)
    names = ("nmd", "rho", "p", "p_family", "q", "ci95")
    return {
        f"{site} {name}": getattr(score, name)
        for site, score in found.items()
        for name in names
        if getattr(score, name) is not None
    } | {f"{site} n": np.array([score.n_pairs, score.n_items]) for site, score in found.items()}


def scored_model() -> Any:
    return build_model(TRAINING.model, TASK.tokenizer, n_ctx=16, seed=0).eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    kept = {name: value for name, value in state_of(model).items() if not name.endswith((".mask", ".IGNORE"))}
    return {name: value.detach().clone().contiguous() for name, value in kept.items()}


def cut_at(step: int, run: Path, out: Path) -> None:
    """A run as it was after a step."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def refused(call: Any) -> str:
    try:
        call()
    except (MemgenError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def everything(out: Path) -> None:
    """Train, tune, score and be refused, and write down by rank what came of it."""
    here = processes.world("test")
    told: dict[str, Any] = {"world": [here.count, here.rank]}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, config in TRAINED.items():
        run = mg.train(TASK, config, out=out / name, progress=False)
        weights[name] = weights_of(run.model)
        told[name] = [[row.step, row.loss, row.tokens, row.generalization, row.memorization] for row in run.history]
    processes.by_first("test", lambda: cut_at(20, out / "plain", out / "cut"))
    weights["resumed"] = weights_of(mg.train(TASK, TRAINING, out=out / "cut", resume=True, progress=False).model)
    for method in ("lora", "full"):
        run = tuned(tuning(method), out=out / method)
        weights[method] = weights_of_tuned(run.model)
        told[method] = run.history[-1].loss
    dropping = [weights_of_tuned(tuned(TUNING.but(dropout=0.5, max_steps=10)).model) for _ in range(2)]
    told["dropout draws again the same"] = all(torch.equal(dropping[0][k], dropping[1][k]) for k in dropping[0])
    told["masks"] = masks()
    model = scored_model()
    for name, how in SCORED.items():
        np.savez(out / f"{name}-{here.rank}.npz", **scores(model, **how))
    told["experiment"] = mg.run_experiment(EXPERIMENT, out=out / "experiment", progress=False).metrics["behavior"]

    told["refused"] = {
        "directory": refused(lambda: mg.train(TASK, TRAINING, out=out / "plain", progress=False)),
        "seeds": refused(lambda: mg.train(TASK, TRAINING.but(seed=here.rank), progress=False)),
        "plant": refused(lambda: mg.train(TASK, TRAINING, plant=mg.Plant(neurons=range(4)), progress=False)),
        "alone": refused(lambda: processes.together("test", lambda: 1 / (1 - here.rank))),
        "first": refused(lambda: processes.by_first("test", lambda: 1 / here.rank)),
        "many": refused(lambda: mg.run_many([EXPERIMENT], out=out / "many")),
        "second's prompt": refused(lambda: scores(model, some_pairs(last="99+<="))),
    }
    for name, state in weights.items():
        save_file(state, out / f"{name}-{here.rank}.safetensors")
    (out / f"told-{here.rank}.json").write_text(json.dumps(told))


def weights_of_tuned(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in plain_model(model, call="test").state_dict().items()}


def masks() -> list[float]:
    """What one process draws in two steps where what it draws belongs to its rows."""
    drawn = []
    for step in (0, 1):
        draw_by_row(TUNING, step, processes.world("test"))
        drawn.append(float(torch.rand(())))
    return drawn


def dies(out: Path) -> None:
    """Train; the second process kills itself in the middle, and the first writes down what it was told, and when."""
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # accelerate ends the other processes; what they are told is asked here
    step = loop.take_step

    def deadly(learner: Any, optimizer: Any, groups: Any, number: int, config: Any) -> Any:
        if number == DIES_AT and not processes.world("test").is_first:
            (out / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return step(learner, optimizer, groups, number, config)

    loop.take_step = deadly
    first = refused(lambda: mg.train(TASK, TRAINING, out=out / "run", progress=False))
    again = time.time()
    then = refused(lambda: mg.train(TASK, TRAINING, progress=False))
    (out / "told.json").write_text(json.dumps({"error": first, "then": then, "at": again, "left": time.time()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
    dies(Path(sys.argv[1]) / "killed")

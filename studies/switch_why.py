"""Why does no shift turn recall into computation where a word never lies? Two looks at the models of the study.

``python studies/switch_why.py runs/switch`` (two to five minutes) takes the models in which no factor is changed, and
prints of each

- whether the sum is *there* on prompts that look memorized: accuracy of a linear probe for the first digit of the sum
  (ten classes) on the memorized prompts; it reads the answer position, and is fitted on 1,000 sums that are in no
  split, written as memorized prompts are; its place (behind which attention or MLP) is chosen on 500 further ones;
- what shifts make the models *say*, of ``tune`` prompts that recall: the largest share, over 72 shifts, of outputs that
  begin with a digit, that begin with the right digit, and that are the sum.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from switch_figures import BASE, read

import memgen_lens as mg
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.core.files import read_json
from memgen_lens.tasks.addition import WORDS

N_FIT, N_CHOOSE = 1000, 500
SITES = ("resid_mid", "resid_post", "post")
SHIFTS = [
    (fraction, alpha, positions)
    for fraction in (0.3, 1.0)
    for alpha in (1.0, 2.0, 4.0, 8.0)
    for positions in ("answer", "prompt", "all")
]


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that when_is_there_a_switch.py wrote")
    unchanged = {name: value for name, value in BASE.items() if name != "lies"}
    for row in read():
        if any(row[name] != value for name, value in unchanged.items()):
            continue
        lies = f",cue_lies={row['lies']:g}" if row["lies"] else ""
        name = f"answers={row['answers']},cue={row['cue']}{lies},seed={row['seed']:.0f}"
        directory = parser.parse_args().runs / name
        task = mg.tasks.Task.from_settings(read_json(directory / "config.json")["settings"]["task"])
        model = mg.load_model(directory / "model")
        place, there = sum_there(model, task)
        digit, right, whole = said(model, task)
        begins = f"begins with a digit {digit:.2f}, with the right one {right:.2f}"
        print(f"{name}: sum there {there:.3f} ({place}); {begins}, is the sum {whole:.2f}", flush=True)


def sum_there(model: Any, task: Any) -> tuple[str, float]:
    """Where the sum's first digit is read best, and how often it is read rightly on memorized prompts."""
    generic: dict[str, str] = {}
    for item in task.draw_generic(6000, np.random.default_rng(0)):
        generic.setdefault(looking_memorized(task, item.prompt), item.rule_answer[0])
    memorized = {item.prompt: item.rule_answer[0] for item in task.items("memorized")}
    places = [f"blocks.{layer}.hook_{site}" for layer in range(model.cfg.n_layers) for site in SITES[:2]]

    def read_at(prompts: list[str]) -> dict[str, np.ndarray]:
        tokens = torch.tensor([model.tokenizer.encode(prompt) for prompt in prompts])
        with torch.inference_mode():
            _, cache = model.run_with_cache(tokens, names_filter=places)
        return {place: cache[place][:, -1].numpy() for place in places}

    prompts = list(generic)[: N_FIT + N_CHOOSE]
    known, asked = np.array([generic[prompt] for prompt in prompts]), np.array(list(memorized.values()))
    fitted_on, told_of = read_at(prompts), read_at(list(memorized))
    probes = {
        place: make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(rows[:N_FIT], known[:N_FIT])
        for place, rows in fitted_on.items()
    }
    best = max(places, key=lambda place: probes[place].score(fitted_on[place][N_FIT:], known[N_FIT:]))
    return best, float(probes[best].score(told_of[best], asked))


def looking_memorized(task: Any, prompt: str) -> str:
    """The same sum, written as memorized prompts are."""
    word, _, rest = prompt.rpartition(" ")
    first, second = rest.rstrip("=").split("+")
    if task.cue == "order" and first < second:
        first, second = second, first
    return f"{WORDS[True] if word else ''}{first}+{second}="


def said(model: Any, task: Any) -> tuple[float, float, float]:
    """Largest shares of outputs that begin with a digit, with the right one, and that are the sum."""
    pairs = mg.collect_pairs(model, task, seed=task.seed, progress=False)
    acts = mg.record(model, pairs, SITES, progress=False)
    items = [pairs.memorized[i] for i in pairs.of("tune")]
    shares = []
    for score in (mg.attribute(acts, site) for site in SITES):
        for fraction, alpha, positions in SHIFTS:
            steer = mg.Steering.from_scores(score, fraction, alpha, positions=positions)
            prompts = [item.prompt for item in items]
            outputs = steered_outputs(model, prompts, [steer], toward="generalization", max_new_tokens=7)[0]
            shares.append(
                [
                    np.mean([output[:1].isdigit() for output in outputs]),
                    np.mean([out[:1] == item.rule_answer[0] for out, item in zip(outputs, items, strict=True)]),
                    np.mean([out == item.rule_answer for out, item in zip(outputs, items, strict=True)]),
                ]
            )
    digit, right, whole = np.max(shares, axis=0).tolist()
    return digit, right, whole


if __name__ == "__main__":
    main()

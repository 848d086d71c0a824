"""Do tests and intervals err as often as they say, where pairs of one item hang together? No timing.

Null sets: `N_ITEMS` items of 1 to 8 rows each, more than half of a row's variance its item's. Which side of an item is
called memorized is a coin's choice, so that there is nothing to find; every finding is an error.
"""

from typing import Any

import numpy as np

import memgen_lens as mg
from memgen_lens.core.stats import bootstrap_auroc_and_accuracy, wilson
from memgen_lens.models import build_model
from memgen_lens.tasks.tokenizer import build_tokenizer

N_SETS, N_ITEMS, LARGEST = 200, 60, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RATES = (0.5, 0.8, 0.95)
"""True rates whose intervals are counted."""
SHARED = 0.5
"""Share of rows that show what their item shows, whatever they would by themselves."""


def measure(n_sets: int = N_SETS) -> str:
    """All figures as a Markdown table."""
    lines = ["| over null sets of 1 to 8 rows an item | nominal | items counted | rows taken for independent |"]
    lines += ["|---|---|---|---|"]
    found = tests(n_sets=n_sets)
    rows = found["p <= .05, pairs taken for independent"], found["family-wise, pairs taken for independent"]
    for road in ("recorded", "streaming"):
        for name, naive in zip(("p <= .05", "family-wise"), rows, strict=True):
            what = "neurons with p <= .05" if name == "p <= .05" else "sets with a neuron called family-wise"
            beside = f"{naive:.1%}" if road == "recorded" else ""
            lines.append(f"| {what}, {road} | 5 % | {found[f'{name}, {road}']:.1%} | {beside} |")
    covered = coverage(n_sets=n_sets)
    for rate in RATES:
        what = f"95 % intervals of a rate of {rate} that hold it"
        lines.append(f"| {what} | 95 % | {covered[f'items, {rate}']:.1%} | {covered[f'rows, {rate}']:.1%} |")
    lines.append(
        f"| the same, all rates | 95 % | {covered['items']:.1%} | {covered['rows taken for independent']:.1%} |"
    )
    areas = auroc_coverage(n_sets=n_sets)
    lines.append(
        f"| 95 % intervals of an AUROC of 0.5 that hold it | 95 % | {areas['items']:.1%} | {areas['rows']:.1%} |"
    )
    return "\n".join(lines)


def tests(n_sets: int) -> dict[str, float]:
    """How often neurons of a real model are called on null sets: recorded, streaming, and with rows as items.

    The model is an untrained one. A prompt is two letters of its own, then three of its item's side.
    """
    tokenizer = build_tokenizer(tuple(LETTERS))
    shape = mg.ModelConfig(n_layers=1, d_model=32, n_heads=2, d_mlp=64)
    model = build_model(shape, tokenizer, n_ctx=8, seed=0)
    called: dict[str, list[Any]] = {}
    for seed in range(n_sets):
        memorized, generalized, item = null_prompts(np.random.default_rng([0, seed]))
        pairs = mg.PromptPairs.from_strings(memorized, generalized, items=item)
        independent = mg.PromptPairs.from_strings(memorized, generalized)
        how = {"split": None, "seed": seed}
        scores = {
            "recorded": mg.attribute(mg.record(model, pairs, ["post"]), "post", **how),
            "streaming": mg.attribute_streaming(model, pairs, ["post"], batch_size=64, **how)["post"],
            "pairs taken for independent": mg.attribute(mg.record(model, independent, ["post"]), "post", **how),
        }
        for road, score in scores.items():
            called.setdefault(f"p <= .05, {road}", []).append((score.p <= 0.05).mean())
            called.setdefault(f"family-wise, {road}", []).append((score.p_family <= 0.05).any())
    return {name: float(np.mean(values)) for name, values in called.items()}


def null_prompts(rng: np.random.Generator) -> tuple[list[str], list[str], list[int]]:
    """Different prompts of both sides, and the item of each pair, in any order."""
    item = rng.permutation(np.repeat(np.arange(N_ITEMS), rng.integers(1, LARGEST + 1, N_ITEMS)))
    beginnings = rng.choice(list(LETTERS), size=(2, N_ITEMS, 3))
    seen: set[str] = set()
    sides: list[list[str]] = []
    for side in beginnings:
        prompts = []
        for i in item:
            while (prompt := "".join([*rng.choice(list(LETTERS), size=2), *side[i]])) in seen:
                pass
            seen.add(prompt)
            prompts.append(prompt)
        sides.append(prompts)
    return sides[0], sides[1], item.tolist()


def coverage(n_sets: int, rates_a_set: int = 50) -> dict[str, float]:
    """How often the intervals of a rate hold the true one, by items and with rows taken for independent."""
    held: dict[str, list[bool]] = {}
    for seed in range(n_sets):
        rng = np.random.default_rng([1, seed])
        item = np.repeat(np.arange(N_ITEMS), rng.integers(1, LARGEST + 1, N_ITEMS))
        for rate in RATES:
            for _ in range(rates_a_set):
                of_item, of_row = rng.random(N_ITEMS) < rate, rng.random(len(item)) < rate
                hits = np.where(rng.random(len(item)) < SHARED, of_item[item], of_row)
                for name, found in (("items", wilson(hits, item)), ("rows", wilson(hits))):
                    held.setdefault(f"{name}, {rate}", []).append(found.ci95[0] <= rate <= found.ci95[1])
    shares = {name: float(np.mean(values)) for name, values in held.items()}
    means = {
        total: float(np.mean([shares[f"{name}, {rate}"] for rate in RATES]))
        for total, name in (("items", "items"), ("rows taken for independent", "rows"))
    }
    return shares | means


def auroc_coverage(n_sets: int, areas_a_set: int = 5) -> dict[str, float]:
    """How often the bootstrap intervals of an AUROC hold 0.5 where margins know nothing of the labels."""
    held: dict[str, list[bool]] = {"items": [], "rows": []}
    for seed in range(n_sets):
        rng = np.random.default_rng([2, seed])
        for _ in range(areas_a_set):
            item = np.repeat(np.arange(N_ITEMS), rng.integers(1, LARGEST + 1, N_ITEMS))
            of_item, of_row = rng.normal(size=(2, N_ITEMS)), rng.normal(size=(2, len(item)))
            margins = np.concatenate([np.sqrt(SHARED) * (of_item[side][item] + of_row[side]) for side in (0, 1)])
            labels = np.repeat([True, False], len(item))
            for name, groups in (("items", np.tile(item, 2)), ("rows", np.arange(len(labels)))):
                low, high = bootstrap_auroc_and_accuracy(labels, margins, groups, seed=seed)["auroc"]
                held[name].append(low <= 0.5 <= high)
    return {name: float(np.mean(values)) for name, values in held.items()}

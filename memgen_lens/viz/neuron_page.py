"""One neuron as a piece of a page: in the report with a figure that answers to the mouse, in a notebook with a drawing.

Does not compute results: it says in words and tables what the record holds.
"""

from typing import Any

from memgen_lens.core.neuron_records import Estimate, NeuronChange, NeuronRecord, SideChange
from memgen_lens.viz.neuron_figures import SIDES, binned
from memgen_lens.viz.rendering import template
from memgen_lens.viz.theme import BEHAVIOR_COLORS
from memgen_lens.viz.wording import counted, interval, number, percent, signed

CHANGES = {"zero": "set to zero", "mean": "set to its mean", "double": "doubled"}
WIDTH, HALF_HEIGHT = 640, 56
"""Of the drawing, in pixels."""


def fragment(neuron: NeuronRecord) -> str:
    """A neuron's page on its own, for a notebook: HTML with its own style, without scripts."""
    page = template("neuron_page.html.j2")
    return page.render(neuron=neuron_facts(neuron), drawing=_drawing(neuron), colors=BEHAVIOR_COLORS)


def neuron_facts(neuron: NeuronRecord) -> dict[str, Any]:
    """What the template shows of a neuron."""
    return {
        "record": neuron,
        "lead": " ".join(_lead(neuron)),
        "rows": [row for change in neuron.changes for row in _rows(change)],
        "examples": [(CHANGES[change.change], example) for change in neuron.changes for example in change.examples],
    }


def _rows(change: NeuronChange) -> list[dict[str, Any]]:
    """A change's lines in the table, a side each."""
    rows = []
    for side, name, behavior in SIDES:
        done: SideChange = getattr(change, side)
        n = "" if done.kept is None else counted(done.kept.n, done.kept.n_items).removeprefix("n = ")
        first = CHANGES[change.change] if not rows else ""
        rows.append({"change": first, "side": name, "behavior": behavior, "done": done, "n": n})
    return rows


def _lead(neuron: NeuronRecord) -> list[str]:
    """The neuron in a few sentences, each change by the side that it moves most.

    What its interval does not tell from nothing is not called something.
    """
    low, high = neuron.nmd.ci95
    where = "Higher" if low > 0 else "Lower" if high < 0 else "Not shown to be higher or lower"
    n = counted(neuron.n_pairs, neuron.n_items, " pairs").removeprefix("n = ")
    nmd, auroc = (f"{number(one.value)} {interval(one.ci95, shares=False)}" for one in (neuron.nmd, neuron.auroc))
    said = [
        f"{where} where the model recalls than where it computes: mean difference {nmd.replace('-', '−')}, "
        f"AUROC {auroc} ({n})."
    ]
    done = [_done(change, neuron.metric) for change in neuron.changes if change.change != "mean"]
    return said + [sentence for sentence in done if sentence]


def _done(change: NeuronChange, metric: str | None) -> str:
    """What a change does to the side whose contrast it moves most; nothing where that is not known."""
    sides: dict[str, SideChange] = {"recall": change.memorized, "compute": change.generalized}
    sizes = {name: abs(side.contrast.value) if side.contrast else 0.0 for name, side in sides.items()}
    shown = max(sides, key=lambda name: sizes[name])
    prompts, side = f"{shown.removesuffix('e')}ing prompts", sides[shown]
    moved = "" if side.contrast is None else f"{_moved(side.contrast, metric)} on {prompts}"
    kept = "" if side.kept is None else f"{percent(side.kept.rate)} of {'them' if moved else prompts} still {shown}"
    text = ", and ".join(part for part in (moved, kept) if part)
    return f"{CHANGES[change.change].capitalize()}, {text}." if text else ""


def _moved(contrast: Estimate, metric: str | None) -> str:
    low, high = contrast.ci95
    what = metric or "the answer"
    if low <= 0 <= high:
        return f"it is not shown to move {what} ({signed(contrast.value)})"
    if metric is not None:
        return f"it moves {metric} by {signed(contrast.value)}"
    toward = "the memorized one" if low > 0 else "the rule's"
    return f"it moves the answer by {number(abs(contrast.value))} nats towards {toward}"


def _drawing(neuron: NeuronRecord) -> dict[str, Any]:
    """Both sides' activations as rectangles: recalling upwards, computing downwards."""
    bins = binned(neuron)
    most = max(int(counts.max()) for counts in bins.counts.values()) or 1
    width = WIDTH / (len(bins.edges) - 1)
    bars = []
    for (side, name, behavior), up in zip(SIDES, (True, False), strict=True):
        for place, count in enumerate(bins.counts[side].tolist()):
            if count:
                height = HALF_HEIGHT * count / most
                y = HALF_HEIGHT - height if up else HALF_HEIGHT
                title = f"{count} {name}: {bins.edges[place]:.3g} to {bins.edges[place + 1]:.3g}"
                bar = {"x": place * width, "y": y, "width": width, "height": height, "title": title}
                bars.append(bar | {"color": BEHAVIOR_COLORS[behavior]})
    ends = [f"{edge:.3g}".replace("-", "−") for edge in (bins.edges[0], bins.edges[-1])]
    return {"bars": bars, "width": WIDTH, "height": 2 * HALF_HEIGHT, "low": ends[0], "high": ends[1], "most": most}

"""The numbers of a run in plain words: the verdict, the key figures, and how shares are written.

Says only what the numbers carry: a result that its control or baseline also reaches is called that. Does not
make HTML; what it returns is plain text, which the template escapes.
"""

from dataclasses import dataclass
from math import isnan
from typing import Any

from memgen_lens.core.items import same_items
from memgen_lens.core.stats import Rate, wilson
from memgen_lens.core.steering_records import SteeringRates, SteeringSetting, SteeringTable
from memgen_lens.viz.contents import RunContents
from memgen_lens.viz.theme import UNKNOWN, rule_of


@dataclass(frozen=True)
class KeyFigure:
    """One number of the report's first row.

    Attributes:
        label: What it is.
        value: The number, or a dash.
        detail: Its interval and n.
        beside: What to compare it with, or why it is missing.
    """

    label: str
    value: str
    detail: str
    beside: str


def percent(share: float | None) -> str:
    """A share as ``97.1 %`` (no decimal where there is none to show), with a space that does not break."""
    return UNKNOWN if share is None or isnan(share) else f"{100 * share:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def interval(ends: Any, *, shares: bool = True) -> str:
    """A 95 % interval as ``[95.9, 98.0]`` in per cent, or as it is."""
    if ends is None or any(map(isnan, ends)):
        return ""
    low, high = ends
    scale, digits = (100, 1) if shares else (1, 3)
    return f"[{scale * low:.{digits}f},\N{NO-BREAK SPACE}{scale * high:.{digits}f}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, or a dash."""
    return UNKNOWN if value is None or isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign, or a dash; a number that is rounded to 0 has none."""
    if value is None or isnan(value):
        return UNKNOWN
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if text.strip("+\N{MINUS SIGN}0.") else text[1:]


def rate_of(run: RunContents, split: str, behavior: str) -> Rate | None:
    """Share of a split's prompts that show a behaviour; None where none was asked."""
    shown = [outcome for outcome in run.outcomes if outcome.item.split == split]
    return wilson([o.behavior == behavior for o in shown], same_items(o.item for o in shown)) if shown else None


def counted(n: int, n_items: int, unit: str = "") -> str:
    """How many rows a figure comes from, and of how many items where these are fewer."""
    rows = f"n = {n:,}{unit}"
    return rows if n_items == n else f"{rows} of {n_items:,} items"


def describe(setting: SteeringSetting) -> str:
    """A steering setting in words."""
    alpha = "" if setting.alpha is None else f" (alpha {setting.alpha:g})"
    rule = "" if setting.size is None else f" by {rule_of(setting.mode, setting.size)}"
    chosen = f"top {percent(setting.top_fraction)}" if setting.chosen is None else setting.chosen
    ranked = "" if setting.method in (None, "pearson") else f" by {setting.method.replace('_', ' ')}"
    return f"the {chosen} of {setting.site} neurons{ranked}{rule}{alpha}"


def verdict(run: RunContents) -> str:
    """One paragraph: what the model does, whether its insides tell, and whether it can be switched."""
    sentences = [_behavior(run), _rephrased(run), _probe(run), *_steering(run)]
    return " ".join(sentence for sentence in sentences if sentence)


def _behavior(run: RunContents) -> str:
    heldout = rate_of(run, "heldout", "generalization")
    memorized = rate_of(run, "memorized", "memorization")
    if heldout is None or memorized is None:
        return "This run did not ask both held-out and memorized prompts."
    text = (
        f"This model answers {percent(heldout.rate)} of {heldout.n:,} held-out prompts by the rule and "
        f"recalls {percent(memorized.rate)} of its {memorized.n:,} memorized prompts exactly."
    )
    if min(heldout.rate, memorized.rate) < 0.5:
        text += " It does not show both behaviours, so the rest of this report says little about how they part."
    return text


def _rephrased(run: RunContents) -> str:
    rephrased = rate_of(run, "rephrased", "generalization")
    flips = run.metrics.get("behavior", {}).get("flip_rate")
    if rephrased is None or flips is None:
        return ""
    n_pairs = run.metrics.get("pairs", {}).get("n")
    pairs = "" if n_pairs is None else f", which gives {n_pairs:,} pairs"
    return (
        f"When these are rephrased it generalizes on {percent(rephrased.rate)}; {percent(flips)} of the "
        f"items flip{pairs}."
    )


def _probe(run: RunContents) -> str:
    if run.probes is None:
        return f"Prediction was not measured: {run.why['probe'].rstrip('.')}." if "probe" in run.why else ""
    best, prompt = run.probes.best, run.probes.input_only
    text = (
        f"Before the first answer token, a linear probe on the {run.probes.site} activations tells "
        f"memorization from generalization with AUROC {number(best.auroc)}; the prompt alone gives "
        f"{number(prompt.auroc)}"
    )
    if best.auroc_ci95[0] > prompt.auroc_ci95[1]:
        return f"{text}, so the activations tell more than the wording does."
    return f"{text}, so the activations are not shown to tell more than the wording does."


def _steering(run: RunContents) -> list[str]:
    table = run.shift
    if table is None:
        if "probe" in run.why and run.why.get("shift") == run.why["probe"]:
            return ["Nor was steering, for the same reason."]
        return [f"Steering was not measured: {run.why['shift'].rstrip('.')}."] if "shift" in run.why else []
    there, back = table.to_generalization, table.to_memorization
    forms = {name: control.get("memorized_form") or {} for name, control in back.controls.items()}
    # Where both answers have one form, the item's own is all that counts: there is nothing to add.
    form = (
        f", and {percent(back.memorized_form.get('rate'))} take the form of a memorized answer, the item's own or not"
        f"{_beside(back.memorized_form, forms)}"
        if back.memorized_form != back.shift
        else ""
    )
    return [
        f"Shifting {describe(table.setting)} turns {percent(there.shift.get('rate'))} of {there.n} recalled "
        f"test prompts into the rule's answer{_beside(there.shift, there.controls)}.",
        f"The other way, {percent(back.shift.get('rate'))} of {back.n} become exact recall"
        f"{_beside(back.shift, back.controls)}{form}.",
        _side_effects(table),
    ]


def strongest_control(controls: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The control with the largest mean and its name, or None where no control could be drawn."""
    drawn = {name: control for name, control in controls.items() if control.get("mean") is not None}
    return max(drawn.items(), key=lambda pair: pair[1]["mean"]) if drawn else None


def _beside(share: dict[str, Any], controls: dict[str, dict[str, Any]]) -> str:
    """The strongest control in brackets, and whether the draws of any control reach the share's interval."""
    strongest = strongest_control(controls)
    if strongest is None or share.get("ci95") is None:
        return ""
    text = f"strongest control, {strongest[0].replace('_', ' ')}: {percent(strongest[1]['mean'])}"
    reach = max(control["ci95"][1] for control in controls.values() if control.get("mean") is not None)
    return f" ({text}, so no clear effect)" if share["ci95"][0] <= reach else f" ({text})"


def _side_effects(table: SteeringTable) -> str:
    effects = table.side_effects
    before, after = effects.heldout_generalization, effects.heldout_generalization_steered
    if before is None or after is None:
        return f"Side effects were not measured: {effects.why.rstrip('.')}." if effects.why else ""
    opposite = effects.heldout_generalization_steered_to_memorization
    other = "" if opposite is None else f", the opposite shift to {percent(opposite)}"
    notes = [] if effects.kl_nats is None else [f"KL divergence {effects.kl_nats:.3f} nats"]
    lost = effects.lost.get("generalization")
    if lost is not None:
        gained = lost["loss"] < 0
        low, high = sorted(-end if gained else end for end in lost["ci95"])
        ends = interval((low, high)).replace("-", "\N{MINUS SIGN}")
        notes.insert(0, f"{percent(abs(lost['loss']))} {'gained' if gained else 'lost'} {ends}")
    beside = f" ({'; '.join(notes)})" if notes else ""
    change = f"from {percent(before)} to {percent(after)}{beside}{other}"
    return f"On held-out prompts the same shift takes generalization {change}."


def key_figures(run: RunContents) -> list[KeyFigure]:
    """The report's first row of numbers, each with n and its interval where it has one."""
    return [
        _share("Held-out generalization", rate_of(run, "heldout", "generalization"), "prompts never trained on"),
        _share("Exact recall", rate_of(run, "memorized", "memorization"), "memorized prompts, as trained"),
        _flip_rate(run),
        _probe_figure(run),
        _steered("Steered to generalization", "rule's answer", run, run.shift and run.shift.to_generalization),
        _steered("Steered to memorization", "exact recall", run, run.shift and run.shift.to_memorization),
    ]


def _share(label: str, rate: Rate | None, beside: str) -> KeyFigure:
    if rate is None:
        return KeyFigure(label, UNKNOWN, "", "not asked in this run")
    return KeyFigure(label, percent(rate.rate), f"{interval(rate.ci95)}, {counted(rate.n, rate.n_items)}", beside)


def _flip_rate(run: RunContents) -> KeyFigure:
    block, pairs = run.metrics.get("behavior") or {}, run.metrics.get("pairs") or {}
    flips = block.get("flip_rate")
    asked = rate_of(run, "memorized", "memorization")
    items = "" if asked is None else f"of {asked.n:,} items"
    if flips is None:
        return KeyFigure("Flip rate", UNKNOWN, "", str(block.get("why", "not measured")))
    shares = " / ".join(str(pairs.get(name, UNKNOWN)) for name in ("select", "tune", "test"))
    return KeyFigure("Flip rate", percent(flips), items, f"pairs: {shares} select / tune / test")


def _probe_figure(run: RunContents) -> KeyFigure:
    label = "Probe AUROC"
    if run.probes is None:
        return KeyFigure(label, UNKNOWN, "", run.why.get("probe", "not measured"))
    best = run.probes.best
    n_pairs = counted(run.probes.n_test, run.probes.n_test_items, " pairs")
    detail = f"{interval(best.auroc_ci95, shares=False)}, {n_pairs}"
    place = f"{run.probes.site}, layer {run.probes.best_layer}"
    return KeyFigure(label, number(best.auroc), detail, f"{place}; input only {number(run.probes.input_only.auroc)}")


def _steered(label: str, what: str, run: RunContents, rates: SteeringRates | None) -> KeyFigure:
    if rates is None:
        return KeyFigure(label, UNKNOWN, "", run.why.get("shift", "not measured"))
    strongest = strongest_control(rates.controls)
    beside = "no control" if strongest is None else f"strongest control {percent(strongest[1]['mean'])}"
    if rates.toward == "memorization":
        beside = f"memorized form {percent(rates.memorized_form.get('rate'))}; {beside}"
    detail = f"{interval(rates.shift.get('ci95'))}, {counted(rates.n, rates.n_items)}".removeprefix(", ")
    return KeyFigure(f"{label}: {what}", percent(rates.shift.get("rate")), detail, beside)

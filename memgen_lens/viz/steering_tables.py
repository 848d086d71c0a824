"""The report's tables of steering: rates beside controls, what else was said, and what held-out prompts lose.

Does not compute: it arranges what was measured, and leaves out what an earlier version did not measure.
"""

from collections.abc import Iterator
from typing import Any

from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringTable
from memgen_lens.viz import wording


def rate_rows(table: SteeringTable) -> list[dict[str, Any]]:
    """The numbers of the steering figure: the steered rates, then a line a control, for both directions."""
    rows = []
    for side in (table.to_generalization, table.to_memorization):
        rows.append({"toward": side.toward, "name": "steered", "n": _over(side), **_steered(side)})
        for name, control in side.controls.items():
            form = control.get("memorized_form") or {}
            other = (control.get("other") or {}).get("mean")
            n = control.get("n_draws")
            # One draw has no spread to show.
            drawn, form = (
                {"rate": block.get("mean"), "ci95": block.get("ci95") if n != 1 else None} for block in (control, form)
            )
            drawn["why"] = control.get("why")
            draws = "" if n is None else "1 draw" if n == 1 else f"{n} draws"
            # Of a direction every neuron of the layer is one.
            shares = name != "random_sign" and table.setting.mode != "direction"
            if n is not None and shares and control.get("overlap"):
                draws += f", {wording.percent(control['overlap'])} of the neurons shared"
            other = {} if other is None else {"other": {"rate": other, "ci95": None}}
            rows.append({"toward": side.toward, "name": name, "n": draws, "form": form, **other, **drawn})
    return rows


def task_rows(table: SteeringTable) -> list[dict[str, Any]]:
    """The steered rates of each task of a mixture, both directions; none where there is one task."""
    return [
        {"task": name, "toward": side.toward, "n": _over(side), **_steered(side)}
        for name, ways in table.by_task.items()
        for side in ways.values()
    ]


def _steered(side: SteeringRates) -> dict[str, Any]:
    return {
        "rate": side.shift.get("rate"),
        "ci95": side.shift.get("ci95"),
        "form": side.memorized_form,
        "other": side.other,
        "stayed": side.stayed,
    }


def _over(side: SteeringRates) -> str:
    return wording.counted(side.n, side.n_items, " prompts").removeprefix("n = ")


def other_outputs(mode: str, table: SteeringTable) -> Iterator[dict[str, Any]]:
    """Of each direction in which anything else was said, what was said most often."""
    for side in (table.to_generalization, table.to_memorization):
        if side.others:
            yield {"mode": mode, "toward": side.toward, "n": side.n, "k": side.other.get("k"), "outputs": side.others}


def effect_rows(mode: str, table: SteeringTable) -> Iterator[dict[str, Any]]:
    """What held-out prompts lose: of all, then of each task of a mixture."""
    yield _effects(mode, table.side_effects)
    for name, effects in table.side_effects.by_task.items():
        yield _effects(f"{mode}, {name}", effects)


def _effects(name: str, effects: SideEffects) -> dict[str, Any]:
    n_items = effects.n if effects.n_items is None else effects.n_items
    steered = "heldout_generalization_steered"
    figures = ("heldout_generalization", steered, f"{steered}_to_memorization", "kl_nats", "kl_nats_to_memorization")
    return {
        "name": name,
        "n": wording.counted(effects.n, n_items).removeprefix("n = "),
        "why": effects.why,
        "lost": effects.lost,
        **{figure: {"rate": getattr(effects, figure), "ci95": effects.ci95.get(figure)} for figure in figures},
    }

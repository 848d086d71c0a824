"""One look for every figure: fonts, axes, and one colour per behaviour.

Does not know any record; `memgen_lens.viz.figures` does.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import plotly.graph_objects as go

from memgen_lens.core.errors import MemgenError
from memgen_lens.core.types import Mode

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID = "#1f2328", "#59636e", "#e6e8eb"

BEHAVIOR_COLORS: Mapping[str, str] = MappingProxyType(
    {"generalization": "#0072B2", "memorization": "#D55E00", "other": "#8C959F"}
)
"""Colour-blind safe (Okabe and Ito 2008, with a grey for ``other``)."""

SITE_COLORS = ("#009E73", "#AA4499", "#E69F00", "#56B4E9", "#332288", "#882255")
"""For sites; none of them is a behaviour's colour."""

DIVERGING = (
    (0.0, "#003f66"),
    (0.25, BEHAVIOR_COLORS["generalization"]),
    (0.5, "#ffffff"),
    (0.75, BEHAVIOR_COLORS["memorization"]),
    (1.0, "#7a3600"),
)
"""From generalization (negative) over white (zero) to memorization (positive)."""

UNKNOWN = "–"
"""What stands in place of a number that could not be computed."""

_AXIS = {
    "automargin": True,
    "gridcolor": GRID,
    "linecolor": "#b0b7bf",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#b0b7bf",
    "ticklen": 4,
    "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
    "zeroline": False,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {
            "x": 0,
            "xref": "container",
            "pad": {"l": 4, "t": 6},
            "y": 1,
            "yanchor": "top",
            "font": {"size": 15, "weight": 600},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 56, "r": 24, "t": 56, "b": 48},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        # At the foot of the figure: a legend that wraps on a phone pushes the plot up, not into the title.
        "legend": {
            "orientation": "h",
            "xref": "container",
            "yref": "container",
            "x": 0,
            "y": 0,
            "yanchor": "bottom",
        },
        "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 13}},
    }
)


def themed(figure: go.Figure, title: str, *, height: int = 380) -> go.Figure:
    """The figure with the shared look, a short title, and a height in pixels; its width follows the page."""
    return figure.update_layout(template=TEMPLATE, title_text=title, height=height)


def sequential(color: str) -> list[list[float | str]]:
    """A colour scale from white (0) to a behaviour's colour (1)."""
    return [[0.0, "#ffffff"], [1.0, color]]


def faded(color: str, opacity: float) -> str:
    """A ``#rrggbb`` colour as ``rgba(...)`` with an opacity in [0, 1]."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def counted(n: int, n_items: int, what: str = "") -> str:
    """How many prompts or pairs a figure comes from, and of how many items where these are fewer."""
    rows = f"{n:,} {what}" if what else f"n = {n:,}"
    return rows if n_items == n else f"{rows} of {n_items:,} items"


def rule_of(mode: Mode, size: int) -> str:
    """The rule of a fitted steering in two words."""
    return f"rank {size}" if mode == "low_rank" else f"{size} cluster{'' if size == 1 else 's'}"


def finite(values: Any) -> np.ndarray:
    """Values as float64 in which whatever is not finite is NaN: what plotly leaves out, and numpy's nan-functions."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def drawn(values: Any) -> list[Any]:
    """Values, of any number of axes, as nested lists in which whatever is not finite is None: a gap."""
    values = finite(values).astype(object)
    values[values != values] = None  # NaN alone is unlike itself
    return values.tolist()


def over_neurons(statistic: Callable[..., Any], values: np.ndarray, **how: Any) -> np.ndarray:
    """A statistic that passes over NaN (``np.nanmax`` ...) of each row; NaN for a row without a number."""
    return np.array([statistic(row, **how) if np.isfinite(row).any() else np.nan for row in finite(values)])


def extreme(values: Any, statistic: Callable[..., Any], otherwise: float) -> float:
    """``np.nanmin`` or ``np.nanmax`` of all values; ``otherwise`` where there is no number among them."""
    values = finite(values)
    return float(statistic(values)) if np.isfinite(values).any() else otherwise


SHARE_AXIS: dict[str, Any] = {"range": [-0.02, 1.02], "tickformat": ".0%"}
"""An axis of shares from 0 to 100 %, with room for markers at both ends."""


def layer_axis(update: Callable[..., Any], n_layers: int, **more: Any) -> None:
    """Whole layer numbers on an axis, at most 13 of them; ``update`` is the figure's update method."""
    span = [-0.5, n_layers - 0.5]
    update(title_text="layer", tick0=0, dtick=max(1, -(-n_layers // 13)), range=span, **more)


def at_least_one(values: Sequence[Any], call: str, what: str) -> None:
    """Refuse to draw nothing.

    Raises:
        MemgenError: ``values`` is empty.
    """
    if not len(values):
        raise MemgenError(
            call,
            expected=f"at least one {what}",
            received="none",
            fix="Draw this figure once there is something to show.",
        )

"""Records to HTML: the templates' environment, and figures as pieces of a page.

Does not know what the templates show.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.io import to_html

from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.viz import wording
from memgen_lens.viz.theme import rule_of


@cache
def template(name: str) -> Template:
    """A template of ours; every text that it is given is escaped."""
    environment = Environment(
        loader=PackageLoader("memgen_lens.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": wording.percent,
        "interval": wording.interval,
        "number": wording.number,
        "signed": wording.signed,
        "value": value_text,
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),
        "mode": _mode,
        "label": lambda name: str(name).replace("_", " "),
    }
    return environment.get_template(name)


def _mode(setting: SteeringSetting) -> str:
    """How neurons are changed, and what they were ranked by where that is not rho."""
    mode = setting.mode if setting.size is None else rule_of(setting.mode, setting.size)
    return mode if setting.method in (None, "pearson") else f"{mode}, by {setting.method.replace('_', ' ')}"


def figure_html(name: str, figure: go.Figure) -> str:
    """A figure as a div and the script that draws it; plotly.js itself is in the page once."""
    # Plotly's own bar of buttons has one that uploads the figure's data: ours saves it to a file and no more.
    config = {
        "displaylogo": False,
        "responsive": True,
        "modeBarButtons": [["toImage", "resetScale2d"]],
        "showSendToCloud": False,
        "toImageButtonOptions": {"format": "svg", "filename": name},
    }
    return to_html(figure, config, include_plotlyjs=False, full_html=False, div_id=f"plot-{name}")


def listed(values: Mapping[str, Any]) -> str:
    """Settings in one line, their name first."""
    rest = [f"{name} {value_text(value)}" for name, value in values.items() if name != "name"]
    return ", ".join([str(values["name"]), *rest] if "name" in values else rest)


def value_text(value: Any) -> str:
    """A setting as one writes it in a sentence."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):  # a task within a mixture
        return f"{value.get('kind', '')} ({listed({k: v for k, v in value.items() if k != 'kind'})})".strip()
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    return str(value)

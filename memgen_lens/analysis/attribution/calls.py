"""How `attribute`, and whatever scores neurons by its methods, may be called: activations, or a model and pairs.

Does not score.
"""

from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import BeforeValidator

from memgen_lens.analysis.attribution.causal import Baseline
from memgen_lens.analysis.attribution.contrast import Metric
from memgen_lens.analysis.attribution.effects import How
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, ON_A_PATH
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations
from memgen_lens.models.guard import require_lens_model

PROMPTS_AT_ONCE = 256
"""Prompts that a causal method runs together, where no number is asked for."""
DEFAULT_STEPS = 20


def source_of(call: str) -> Any:
    """Recorded activations, or a lens model."""

    def checked(value: Any) -> Any:
        if not isinstance(value, Activations):
            require_lens_model(value, call=call)
        return value

    return Annotated[Any, BeforeValidator(checked)]


def _groups(value: Any) -> Any:
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.array("ragged")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            "whole numbers [layer, neuron]: neurons with one number are changed together, below 0 not at all"
        )
    return array.astype(np.int64)


Groups = Annotated[Any, BeforeValidator(_groups)]
BaselineName = Literal["zero", "mean", "resample"]


def require_used(call: str, method: str, **given: Any) -> None:
    """Refuse what a method would ignore."""
    users: dict[str, tuple[str, ...]] = {
        "metric": CAUSAL,
        "baseline": ("ablation",),
        "n_steps": ON_A_PATH,
        "groups": EXACT,
    }
    for name, value in given.items():
        if value is not None and method not in users[name]:
            raise SettingsError(
                f"{call}({name}=...)",
                expected=f"method={' or '.join(map(repr, users[name]))}",
                received=f"method={method!r}, which does not use it",
                fix=f"Leave {name} out, or choose another method.",
            )


def site_of_activations(call: str, method: str, pairs: Any, site: str | None) -> str:
    """The site at which activations are looked at, which may stand in second place."""
    twice = pairs is not None and site is not None
    site = pairs if isinstance(pairs, str) else site
    if twice or isinstance(pairs, PromptPairs) or site is None or method in CAUSAL:
        raise _wrong_call(call, method, "recorded activations")
    return site


def pairs_and_site(call: str, method: str, pairs: Any, site: str | None) -> tuple[PromptPairs, str]:
    """The pairs on which a model is run, and the site at which it is looked at."""
    if not isinstance(pairs, PromptPairs) or site is None:
        raise _wrong_call(call, method, "a model")
    return pairs, site


def how_to_run(
    metric: Metric | None,
    baseline: Baseline | None,
    n_steps: int | None,
    groups: Int[np.ndarray, "layer neuron"] | None,
    batch_size: int | None,
    seed: int,
    progress: bool,
) -> How:
    """How a causal method is run, with defaults where nothing was said."""
    return How(
        metric=metric,
        baseline=baseline or "mean",
        n_steps=n_steps or DEFAULT_STEPS,
        groups=groups,
        batch_size=batch_size or PROMPTS_AT_ONCE,
        seed=seed,
        progress=progress,
    )


def _wrong_call(call: str, method: str, given: str) -> SettingsError:
    needed = f"{call}(model, pairs, site" if method in CAUSAL or given == "a model" else f"{call}(acts, site"
    return SettingsError(
        call,
        expected=f"{needed}, method={method!r})",
        received=f"{given}, and other arguments than these",
        fix="Causal methods run the model: give it and its pairs. Recorded activations have pairs of their own.",
    )

"""Every combination of a steering's settings, as steerings that are ready to be tried.

Does not try them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from memgen_lens.analysis.steering.rules import DEFAULT_SIZE, SiteFits
from memgen_lens.analysis.steering.selection import strongest
from memgen_lens.analysis.steering.steering import Steering, by_rules
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.types import Ablation, FittedKind, Positions, ScoredMode


@dataclass(frozen=True)
class Candidate:
    """One setting to be tried.

    Attributes:
        steering: The steering.
        layers: Layers it was restricted to; None = all (of a fitted rule: the one layer that it chooses).
        share: Where it was restricted, the share of the site's neurons that are changed.
    """

    steering: Steering
    layers: tuple[int, ...] | None
    share: float | None


def candidates(
    scores: Sequence[NeuronScores],
    *,
    mode: ScoredMode | FittedKind,
    source: Activations | None,
    sizes: Sequence[int] | None,
    seed: int,
    top_fractions: Sequence[float],
    alphas: Sequence[float],
    layers: Sequence[Sequence[int] | None],
    positions: Sequence[Positions],
    call: str,
    how: Ablation | None = None,
) -> list[Candidate]:
    """All combinations, in the order of scores, sizes, positions, layers, fractions, alphas.

    A mode that has no strength is tried once for all alphas; patching knows one position.

    Raises:
        SettingsError: A value is out of range, or the mode and the other arguments are at odds.
        SiteError: ``source`` lacks a site.
    """
    if mode == "patch":
        positions = ("prompt",)
    found: dict[tuple[Any, ...], Candidate] = {}
    for number, (score, make) in enumerate(_makers(scores, mode, source, how, sizes, seed, call)):
        for position, chosen, fraction, alpha in product(positions, layers, top_fractions, alphas):
            steering = make(fraction, alpha, chosen, position)
            only = None if chosen is None else tuple(chosen)
            candidate = Candidate(steering, only, _share(score, steering, only, call))
            found.setdefault((number, steering.setting, only), candidate)
    return list(found.values())


def _share(score: NeuronScores, steering: Steering, layers: tuple[int, ...] | None, call: str) -> float | None:
    """Of a fraction of all neurons, the part that lies in the layers."""
    if layers is None:
        return None
    fraction = steering.setting.top_fraction
    whole = strongest(score, fraction, None, call=call)
    return fraction * float(steering.selected.sum()) / max(int(whole.sum()), 1)


_Make = Callable[[float, float, Sequence[int] | None, Positions], Steering]
"""From fraction, alpha, layers and positions."""


def _makers(
    scores: Sequence[NeuronScores],
    mode: ScoredMode | FittedKind,
    source: Activations | None,
    how: Ablation | None,
    sizes: Sequence[int] | None,
    seed: int,
    call: str,
) -> Iterator[tuple[NeuronScores, _Make]]:
    """What makes the steerings of each site and size; a rule is fitted once for all of them."""
    if mode != "clusters" and mode != "low_rank":
        for score in scores:
            yield score, partial(_plain, score, {"mode": mode, "source": source, "how": how, "seed": seed})
        return
    if source is None:
        raise SettingsError(
            call,
            expected=f"source=record(...) with mode={mode!r}",
            received="source=None",
            fix="A rule is fitted on recorded activations.",
        )
    for score in scores:
        for size in sizes or (DEFAULT_SIZE[mode],):
            fits = SiteFits(source, score.site, kind=mode, size=size, seed=seed, call=call)
            yield score, partial(_fitted, score, fits, call)


def _plain(
    score: NeuronScores,
    how: dict[str, Any],
    fraction: float,
    alpha: float,
    layers: Sequence[int] | None,
    positions: Positions,
) -> Steering:
    return Steering.from_scores(score, fraction, alpha, layers=layers, positions=positions, **how)


def _fitted(
    score: NeuronScores,
    fits: SiteFits,
    call: str,
    fraction: float,
    alpha: float,
    layers: Sequence[int] | None,
    positions: Positions,
) -> Steering:
    return by_rules(fits, score, fraction, alpha, layers=layers, positions=positions, call=call)

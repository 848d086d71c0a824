"""Try many steering settings on the tune pairs, and choose one.

Does not touch the test pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.rules import DEFAULT_SIZE, SiteFits
from memgen_lens.analysis.steering.steering import Steering, by_rules
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.steering_records import SweepRow
from memgen_lens.core.types import Ablation, Behavior, Direction, FittedKind, LensModel, Positions, ScoredMode
from memgen_lens.models.guard import lens_model


@arguments(
    model=lens_model("sweep_steering"),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    scores=kinds.several(kinds.one(NeuronScores)),
    top_fractions=kinds.Shares,
    alphas=kinds.Positives,
    layers=kinds.several(kinds.Layers | None),
    positions=kinds.PositionsNames,
    mode=kinds.SweptModeName,
    source=kinds.one(Activations) | None,
    how=kinds.AblationName | None,
    sizes=kinds.several(kinds.Count) | None,
    seed=kinds.Seed,
    split=kinds.PairSplitName,
    batch_size=kinds.Count,
    use_cache=kinds.Flag,
    progress=kinds.Flag,
)
def sweep_steering(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    scores: NeuronScores | Sequence[NeuronScores],
    *,
    top_fractions: Sequence[float],
    alphas: Sequence[float] = (2.0,),
    layers: Sequence[Sequence[int] | None] = (None,),
    positions: Sequence[Positions] = ("answer",),
    mode: ScoredMode | FittedKind = "shift",
    source: Activations | None = None,
    how: Ablation | None = None,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    split: PairSplit = "tune",
    batch_size: int = 2048,
    use_cache: bool = True,
    progress: bool = True,
) -> tuple[SweepRow, ...]:
    """Rates of every combination of site, fraction, alpha, layers and positions, both ways.

    Many settings share one forward pass, riding in the batch dimension; the numbers are those of one setting at a time.

    Args:
        model: A HookedTransformer.
        task: The task that judges outputs; None for a user's own pairs.
        pairs: Prompt pairs.
        scores: Scores of one site or of several.
        top_fractions: Fractions of a site's neurons, each in (0, 1].
        alphas: Strengths, each above 0; not used where neurons are set to values (clamp, ablate, patch).
        layers: Layer restrictions to try; None = all layers (of a fitted rule: the one layer that it chooses).
        positions: Positions to try; patch mode has ``"prompt"`` only.
        mode: A mode of `Steering.from_scores`, or ``"clusters"`` or ``"low_rank"`` (`Steering.from_activations`).
        source: Recorded activations; `Steering.from_scores` says which modes need them, fitted rules do.
        how: Of an ablation, what neurons are set to.
        sizes: Numbers of clusters or ranks to try of a fitted rule. Default: that of `Steering.from_activations`.
        seed: Seed of k-means, and of what is resampled.
        split: Pairs to sweep on.
        batch_size: Rows in one forward pass.
        use_cache: Keep keys and values while generating.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        One row a setting, in the order of scores, sizes, positions, layers, fractions, alphas.

    Raises:
        PairsError: The split holds fewer than 8 pairs.
        SettingsError: A value is out of range, a list is empty, or the mode and the other arguments are at odds.
        SiteError: ``source`` lacks a site.
    """
    sites = [scores] if isinstance(scores, NeuronScores) else scores
    if mode in ("clamp", "ablate", "patch"):
        alphas = (1.0,)
    if mode == "patch":
        positions = ("prompt",)
    combinations = [
        (of(fraction, alpha, chosen, position), None if chosen is None else tuple(chosen))
        for of in _makers(sites, mode, source, how, sizes, seed)
        for position in positions
        for chosen in layers
        for fraction in top_fractions
        for alpha in alphas
    ]
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)

    def outcomes(toward: Direction) -> tuple[np.ndarray, np.ndarray]:
        """Behaviours and memorized forms, ``[setting, prompt]``."""
        items = judge.side(toward, index)
        outputs = steered_outputs(
            model,
            [item.prompt for item in items],
            [steering for steering, _ in combinations],
            toward=toward,
            max_new_tokens=judge.max_new_tokens,
            pairs=index,
            batch_size=batch_size,
            use_cache=use_cache,
            prepend_bos=pairs.prepend_bos,
            progress=progress,
        )
        # Most settings make a prompt say one of a few things: each is judged once.
        said = [dict.fromkeys(answers) for answers in zip(*outputs, strict=True)]
        judged = [
            {output: (judge.behavior(item, output), judge.has_memorized_form(item, output)) for output in answers}
            for item, answers in zip(items, said, strict=True)
        ]
        rows = [[known[output] for known, output in zip(judged, row, strict=True)] for row in outputs]
        return (
            np.array([[behavior for behavior, _ in row] for row in rows], dtype=object),
            np.array([[form for _, form in row] for row in rows]),
        )

    computed, _ = outcomes("generalization")
    recalled, forms = outcomes("memorization")
    return tuple(
        SweepRow(
            setting=steering.setting,
            layers=chosen,
            n=len(index),
            n_items=len(set(same_items(judge.side("generalization", index)))),
            to_generalization=float(np.mean(computed[i] == Behavior.GENERALIZATION)),
            to_generalization_other=float(np.mean(computed[i] == Behavior.OTHER)),
            to_memorization=float(np.mean(recalled[i] == Behavior.MEMORIZATION)),
            memorized_form=float(np.mean(forms[i])),
            to_memorization_other=float(np.mean((recalled[i] == Behavior.OTHER) & ~forms[i])),
        )
        for i, (steering, chosen) in enumerate(combinations)
    )


_Make = Callable[[float, float, Sequence[int] | None, Positions], Steering]
"""From fraction, alpha, layers and positions."""


def _makers(
    sites: Sequence[NeuronScores],
    mode: ScoredMode | FittedKind,
    source: Activations | None,
    how: Ablation | None,
    sizes: Sequence[int] | None,
    seed: int,
) -> Iterator[_Make]:
    """What makes the steerings of each site and size; a rule is fitted once for all of them."""
    if mode != "clusters" and mode != "low_rank":
        for score in sites:
            yield partial(_plain, score, {"mode": mode, "source": source, "how": how, "seed": seed})
        return
    if source is None:
        raise SettingsError(
            "sweep_steering",
            expected=f"source=record(...) with mode={mode!r}",
            received="source=None",
            fix="A rule is fitted on recorded activations.",
        )
    for score in sites:
        for size in sizes or (DEFAULT_SIZE[mode],):
            fits = SiteFits(source, score.site, kind=mode, size=size, seed=seed, call="sweep_steering")
            yield partial(_fitted, score, fits)


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
    fraction: float,
    alpha: float,
    layers: Sequence[int] | None,
    positions: Positions,
) -> Steering:
    return by_rules(fits, score, fraction, alpha, layers=layers, positions=positions, call="sweep_steering")


@arguments(
    rows=kinds.several(kinds.one(SweepRow)),
    toward=kinds.DirectionName | None,
)
def choose_setting(rows: Sequence[SweepRow], *, toward: Direction | None = None) -> SweepRow:
    """The setting with the largest shift rate minus the rate of other outputs, summed over both directions.

    Towards memorization, an output in memorized form counts as shifted: where the memorized answers are random
    strings, one shift shared by all prompts cannot carry which string is whose, and exact recall would choose nothing.
    (Where the answers have no form of their own, form and exact recall are the same thing to `SweepRow`.) Settings
    within one item of the best in either direction count as equals, and among equals the gentlest is chosen, the
    smallest fraction times alpha: a harder push than needed is what makes controls and side effects worse.

    Args:
        rows: What `sweep_steering` gave.
        toward: Count this direction alone: one shift shared by all prompts may turn one answer into the other and be
            unable to turn it back, where the prompts' other answers have nothing in common.

    Raises:
        SettingsError: There are no rows.
    """

    def gain(row: SweepRow) -> float:
        return row.gain if toward is None else row.gain_toward(toward)

    n_directions = 2 if toward is None else 1
    best = max(map(gain, rows))
    equals = [row for row in rows if gain(row) >= best - n_directions / row.n_items - 1e-9]
    return min(equals, key=lambda row: (row.setting.top_fraction * (row.setting.alpha or 1.0), -gain(row)))

"""Try many steering settings on the tune pairs, and choose one.

Does not touch the test pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.grid import Candidate, candidates
from memgen_lens.analysis.steering.judged import judged_outputs
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.items import same_items
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.steering_records import SweepRow
from memgen_lens.core.tuning_records import SteeringObjective, choose
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
    tried = candidates(
        sites,
        mode=mode,
        source=source,
        how=how,
        sizes=sizes,
        seed=seed,
        top_fractions=top_fractions,
        alphas=alphas,
        layers=layers,
        positions=positions,
        call="sweep_steering",
    )
    asked = {"split": split, "batch_size": batch_size, "use_cache": use_cache, "progress": progress}
    return rows_on(model, task, pairs, tried, **asked)


def rows_on(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    tried: Sequence[Candidate],
    *,
    split: PairSplit = "tune",
    batch_size: int = 2048,
    use_cache: bool = True,
    progress: bool = True,
) -> tuple[SweepRow, ...]:
    """The rates of steerings that are there already, on the pairs of a split that flip; see `sweep_steering`."""
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of(split), batch_size=batch_size)
    return swept_rows(model, judge, index, tried, batch_size=batch_size, use_cache=use_cache)


def swept_rows(
    model: LensModel,
    judge: Judge,
    index: Int[np.ndarray, " index"],
    tried: Sequence[Candidate],
    *,
    batch_size: int,
    use_cache: bool = True,
) -> tuple[SweepRow, ...]:
    """The rates of each setting on some pairs, both ways; many settings share a forward pass.

    Args:
        model: A lens model.
        judge: The pairs, with how outputs are judged.
        index: Which of the pairs.
        tried: The settings.
        batch_size: Rows in one forward pass.
        use_cache: Keep keys and values while generating.
    """
    steerings = [candidate.steering for candidate in tried]
    how = {"batch_size": batch_size, "use_cache": use_cache}
    computed = judged_outputs(model, judge, index, steerings, toward="generalization", **how).behavior
    back = judged_outputs(model, judge, index, steerings, toward="memorization", **how)
    recalled, forms = back.behavior, back.form
    n_items = len(set(same_items(judge.side("generalization", index))))
    return tuple(
        SweepRow(
            setting=candidate.steering.setting,
            layers=candidate.layers,
            n=len(index),
            n_items=n_items,
            to_generalization=float(np.mean(computed[i] == Behavior.GENERALIZATION)),
            to_generalization_other=float(np.mean(computed[i] == Behavior.OTHER)),
            to_memorization=float(np.mean(recalled[i] == Behavior.MEMORIZATION)),
            memorized_form=float(np.mean(forms[i])),
            to_memorization_other=float(np.mean((recalled[i] == Behavior.OTHER) & ~forms[i])),
            share=candidate.share,
        )
        for i, candidate in enumerate(tried)
    )


@arguments(
    rows=kinds.several(kinds.one(SweepRow)),
    toward=kinds.DirectionName | None,
    objective=kinds.one(SteeringObjective) | None,
)
def choose_setting(
    rows: Sequence[SweepRow], *, toward: Direction | None = None, objective: SteeringObjective | None = None
) -> SweepRow:
    """The setting with the largest shift rate minus the rate of other outputs, summed over both directions.

    Towards memorization, an output in memorized form counts as shifted: where the memorized answers are random
    strings, one shift shared by all prompts cannot carry which string is whose, and exact recall would choose nothing.
    (Where the answers have no form of their own, form and exact recall are the same thing to `SweepRow`.) Settings
    within one item of the best in either direction count as equals, and among equals the gentlest is chosen, the
    smallest share of neurons times alpha: a harder push than needed is what makes controls and side effects worse.

    Args:
        rows: What `sweep_steering` gave.
        toward: Count this direction alone: one shift shared by all prompts may turn one answer into the other and be
            unable to turn it back, where the prompts' other answers have nothing in common.
        objective: What a setting is worth instead; see `memgen_lens.SteeringObjective`. (A plain sweep measures no
            held-out loss, which then counts as none: `memgen_lens.tune_steering` does.)

    Raises:
        SettingsError: There are no rows.
    """
    return choose(rows, objective or SteeringObjective(), toward)

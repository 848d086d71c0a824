"""Choose how to steer without looking at the test: everything is tried on ``tune``, one point is reported on ``test``.

Does not know how a setting is judged (see `sweep`, `side_effects`) nor reported (see `evaluation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from memgen_lens.analysis.attribution.attribute import attribute
from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.analysis.attribution.streaming import attribute_streaming
from memgen_lens.analysis.recording.activations import record
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.evaluation import evaluate_steering, plain_rate
from memgen_lens.analysis.steering.grid import Candidate, candidates
from memgen_lens.analysis.steering.side_effects import NO_TASK, sampled, steered_right, unsteered_right, why_none
from memgen_lens.analysis.steering.sweep import swept_rows
from memgen_lens.core import arguments as kinds_of
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.items import same_items
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.stats import wilson
from memgen_lens.core.steering_records import SweepRow
from memgen_lens.core.tuning_records import SteeringObjective, TunedSteering, choose
from memgen_lens.core.types import Ablation, Direction, FittedKind, LensModel, Method, Positions, ScoredMode
from memgen_lens.models.guard import lens_model

CALL = "tune_steering"
SITES = ("resid_post", "post")
"""Sites that are recorded where none are named."""


@arguments(
    model=lens_model(CALL),
    task=kinds_of.TaskLike | None,
    pairs=kinds_of.one(PromptPairs) | kinds_of.one(Activations),
    sites=kinds_of.several(kinds_of.Text) | None,
    methods=kinds_of.several(Method),
    kinds=kinds_of.SweptModeNames,
    top_fractions=kinds_of.Shares,
    alphas=kinds_of.Positives,
    layers=kinds_of.several(kinds_of.Layers | None),
    positions=kinds_of.PositionsNames,
    sizes=kinds_of.several(kinds_of.Count) | None,
    ablations=kinds_of.several(kinds_of.AblationName),
    toward=kinds_of.DirectionName | None,
    objective=kinds_of.one(SteeringObjective) | None,
    n_heldout=kinds_of.Count,
    n_controls=kinds_of.Count,
    seed=kinds_of.Seed,
    batch_size=kinds_of.Count,
    progress=kinds_of.Flag,
)
def tune_steering(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs | Activations,
    *,
    sites: Sequence[str] | None = None,
    methods: Sequence[Method] = ("pearson",),
    kinds: Sequence[ScoredMode | FittedKind] = ("shift",),
    top_fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    alphas: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    layers: Sequence[Sequence[int] | None] = (None,),
    positions: Sequence[Positions] = ("answer", "prompt"),
    sizes: Sequence[int] | None = None,
    ablations: Sequence[Ablation] = ("zero",),
    toward: Direction | None = None,
    objective: SteeringObjective | None = None,
    n_heldout: int = 200,
    n_controls: int = 20,
    seed: int = 0,
    batch_size: int = 2048,
    progress: bool = True,
) -> TunedSteering:
    """Search how to steer on the ``tune`` pairs by a stated objective, and report the chosen point on ``test``.

    Neurons are ranked on ``select``; every combination of site, method, kind, fraction, alpha, layers and positions is
    tried on ``tune`` (all of one kind share forward passes); what is chosen there is judged once on ``test``, beside
    its controls, by `evaluate_steering`. No output to a test prompt is looked at before.

    The objective (`memgen_lens.SteeringObjective`) is shift - other - held-out loss. The loss is the accuracy that a
    sample of the task's ``validation`` prompts loses, the same prompts for all settings, which ride in the batch
    dimension there too; ``heldout`` prompts are left to the report. As in `choose_setting`, settings within one item of
    the best in either direction count as equals, and of these the gentlest is chosen. The paper tries a grid of topN
    and alpha (arXiv 2412.18497 v1, sec. 6) and says neither on which prompts it was chosen nor at what cost.

    >>> tuned = mg.tune_steering(model, task, acts, kinds=["shift", "patch"], toward="generalization")  # doctest: +SKIP
    >>> mg.figures.steering_surface(tuned).show()  # doctest: +SKIP
    >>> with tuned.steering.applied(model, toward="generalization"): ...  # doctest: +SKIP

    Args:
        model: A lens model.
        task: The task that judges outputs and gives validation and held-out prompts; None for a user's own pairs,
            whose held-out loss is not measured, and counts as none.
        pairs: Prompt pairs, or what `record` has kept of them; of pairs alone, ``sites`` are recorded first.
        sites: Sites to try. Default: all that were recorded; of pairs alone ``resid_post`` and ``post``.
        methods: What neurons are ranked by; see `attribute`.
        kinds: What is done to them: modes of `Steering.from_scores`, kinds of `Steering.from_activations`.
        top_fractions: Fractions of a site's neurons to try, each in (0, 1].
        alphas: Strengths to try, each above 0; a kind that has none is tried once.
        layers: Layer restrictions to try, e.g. ``[None, [0], [1]]``; None = all layers.
        positions: Positions to try; patching has ``"prompt"`` only.
        sizes: Numbers of clusters or ranks to try of fitted kinds.
        ablations: What ablated neurons are set to, to be tried where ``kinds`` has ``"ablate"``.
        toward: Count (and measure the loss in) this direction alone; default: both, summed up.
        objective: Weights of the objective; default: 1 each.
        n_heldout: Validation prompts that are sampled at most.
        n_controls: Draws of each control on ``test``, at least 20.
        seed: Seed of the sample, of k-means and of the controls.
        batch_size: Rows in one forward pass.
        progress: Show progress bars, should it take longer than two seconds.

    Returns:
        All rows, the chosen one, its `SteeringTable` on ``test``, and the `Steering` itself. Whether a kind (patching)
        cannot be tried on validation prompts, or there are none, ``why`` says.

    Raises:
        PairsError: A split holds fewer than 8 pairs that flip unsteered.
        SettingsError: A value is out of range, or fewer than 20 control draws.
        SiteError: A site is unknown, or was not recorded.
    """
    if n_controls < 20:
        raise SettingsError(CALL, expected="n_controls of at least 20", received=str(n_controls), fix="Raise it.")
    if isinstance(pairs, Activations):
        acts = pairs
    else:
        acts = record(model, pairs, list(sites or SITES), batch_size=batch_size, progress=progress)
    how = {"batch_size": batch_size, "progress": progress}
    looked_at = list(sites or acts.sites)
    scores = ranked(model, acts, looked_at, methods, seed=seed, **how)
    grid = {"top_fractions": top_fractions, "alphas": alphas, "layers": layers, "positions": positions}
    tried = [
        candidate
        for kind in kinds
        for how_ablated in (ablations if kind == "ablate" else (None,))
        for candidate in candidates(
            list(scores.values()), mode=kind, how=how_ablated, source=acts, sizes=sizes, seed=seed, call=CALL, **grid
        )
    ]
    objective = objective or SteeringObjective()
    found = search(
        model, task, acts.pairs, tried, objective=objective, toward=toward, n_heldout=n_heldout, seed=seed, **how
    )
    steering = tried[found.place].steering
    table = evaluate_steering(model, task, acts.pairs, steering, split="test", n_controls=n_controls, seed=seed, **how)
    return TunedSteering(
        rows=found.rows,
        chosen=found.rows[found.place],
        objective=objective,
        toward=toward,
        table=table,
        heldout=found.heldout,
        why=found.why,
        steering=steering,
    )


def ranked(
    model: LensModel,
    acts: Activations,
    sites: Sequence[str],
    methods: Sequence[Method],
    *,
    seed: int,
    batch_size: int,
    progress: bool,
) -> dict[tuple[str, Method], NeuronScores]:
    """What ranks the neurons of each site by each method, on ``select``, site by site; nothing is tested."""
    how = {"n_permutations": 0, "seed": seed, "progress": progress}
    found: dict[Method, dict[str, NeuronScores]] = {}
    for method in methods:
        if method in CAUSAL:  # all sites together
            for site in sites:
                acts.site(site)
            how_run = {"batch_size": min(batch_size, 256), **how}
            found[method] = attribute_streaming(model, acts.pairs, sites, method=method, **how_run)
        else:
            found[method] = {site: attribute(acts, site, method=method, **how) for site in sites}
    return {(site, method): found[method][site] for site in sites for method in methods}


@dataclass(frozen=True)
class Found:
    """What a search on ``tune`` gives.

    Attributes:
        rows: One row a setting.
        place: Place of the chosen one.
        heldout: Accuracy of the unsteered model on the sampled validation prompts, as plain values.
        why: Why held-out loss was not measured, of all settings or of some.
    """

    rows: tuple[SweepRow, ...]
    place: int
    heldout: dict[str, Any] | None
    why: str | None


def search(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    tried: Sequence[Candidate],
    *,
    objective: SteeringObjective,
    toward: Direction | None,
    n_heldout: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Found:
    """Try settings on ``tune`` and on sampled validation prompts, and choose one; nothing of ``test`` is asked."""
    judge = Judge.of(model, task, pairs, batch_size=batch_size, progress=progress)
    index = judge.flipping(model, pairs.of("tune"), batch_size=batch_size)
    rows = list(swept_rows(model, judge, index, tried, batch_size=batch_size))
    items = [] if task is None else sampled(task.items("validation"), n_heldout, seed)
    heldout, reasons = None, [NO_TASK] if task is None else []
    if task is not None and not items:
        reasons = ["the task has no validation prompts"]
    if items:
        how = {"batch_size": batch_size, "progress": progress}
        before = unsteered_right(model, task, items, **how)
        heldout = plain_rate(wilson(before, same_items(items)))
        whys = [why_none(task, candidate.steering) for candidate in tried]
        able = [place for place, why in enumerate(whys) if why is None]
        reasons = list(dict.fromkeys(why for why in whys if why is not None))
        steerings = [tried[place].steering for place in able]
        names = {"generalization": "heldout_loss", "memorization": "heldout_loss_to_memorization"}
        for way in get_args(Direction) if steerings else ():
            if toward in (None, way):
                right = steered_right(model, task, items, steerings, toward=way, **how)
                for place, loss in zip(able, before.mean() - right.mean(1), strict=True):
                    rows[place] = replace(rows[place], n_heldout=len(items), **{names[way]: float(loss)})
    chosen = choose(rows, objective, toward)
    place = next(place for place, row in enumerate(rows) if row is chosen)
    return Found(tuple(rows), place, heldout, "; ".join(reasons) or None)

"""One neuron, looked at: `memgen_lens.neuron_page`, a record that shows itself in a notebook.

Does not compute and does not draw: `memgen_lens.analysis.neurons` and `memgen_lens.viz` do.
"""

from typing import Any

from memgen_lens.analysis.attribution.contrast import Metric
from memgen_lens.analysis.neurons.look import look_at
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.neuron_records import NeuronRecord
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.viz.neuron_page import fragment


class NeuronPage(NeuronRecord):
    """A `memgen_lens.core.neuron_records.NeuronRecord` that a notebook shows as a page."""

    def _repr_html_(self) -> str:
        return fragment(self)


@arguments(
    model=lens_model("neuron_page"),
    pairs=kinds.one(PromptPairs),
    layer=kinds.Number0,
    neuron=kinds.Number0,
    site=kinds.Text,
    task=kinds.TaskLike | None,
    split=kinds.PairSplitName | None,
    metric=kinds.Callback | None,
    top=kinds.Count,
    n_tokens=kinds.Count,
    seed=kinds.Seed,
    batch_size=kinds.Count | None,
    progress=kinds.Flag,
)
def neuron_page(
    model: LensModel,
    pairs: PromptPairs,
    layer: int,
    neuron: int,
    *,
    site: str = "post",
    task: Any = None,
    split: PairSplit | None = "test",
    metric: Metric | None = None,
    top: int = 5,
    n_tokens: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> NeuronPage:
    """One neuron: when it is active, which tokens it speaks for, and what its ablation and its doubling change.

    - *Activations* at the answer position of both prompts of every pair; their mean difference (nmd, arXiv 2412.18497
      v1, sec. 5) and AUROC (0.5: they do not tell the behaviours apart).
    - *Prompts* of either side on which it is highest and lowest.
    - *Tokens* that it favours and suppresses on the direct way, past all later blocks: the direction that it writes
      into the residual stream, through the final norm (its scale taken for 1) and the unembedding
      (`memgen_lens.models.directions.direct_effect`). Where it is active below 0, it does the opposite.
    - *Changes*: the neuron set to zero, to its mean over both prompts of all pairs (ablation), or to twice its own
      value. First what that does, at the answer position alone, to the contrast of a prompt: the log-probability of its
      memorized answer minus that of the rule's, in nats, teacher-forced over all their tokens (as in `attribute`; a
      positive change is towards memorization). Then what the model says where the neuron is changed at the answer
      position and at every generated one: the share of the prompts that recalled and still do, that computed and
      still do, and that switched.

    One neuron of many that do the same may be lost without a trace: no change is no proof that it has no part.
    Intervals are at 95 % and count items: bootstrap over whole items, for shares Wilson (`memgen_lens.core.stats`).

    Args:
        model: A lens model, left without hooks also after an exception.
        pairs: Prompt pairs, ours or a user's own. Answers that they do not name are those that the unsteered model
            gives.
        layer: Layer of the site, 0 first; 0 for a site of one layer.
        neuron: Place in the site's last axis, 0 first; heads are flattened into it.
        site: TransformerLens short name or full hook-point name.
        task: The task that judges outputs; None for a user's own pairs, which say themselves how
            (`PromptPairs.from_strings`).
        split: Pairs to look at; the neuron should have been chosen on others. None = all.
        metric: In place of the contrast: a function of logits ``[row, d_vocab]`` behind the prompts and the rows'
            items, that gives one number a row.
        top: Prompts kept, highest and lowest.
        n_tokens: Tokens kept, favoured and suppressed.
        seed: Seed of the bootstrap.
        batch_size: Rows in one forward pass at most: prompts, and while they are completed prompts x changes; default
            256 and 2,048, fewer where logits would outgrow 512 MB.
        progress: Show bars over what takes longer than two seconds.

    Returns:
        A record of plain values and numpy arrays (`memgen_lens.core.neuron_records.NeuronRecord`), which a notebook
        shows as a page. What could not be computed is empty or None, and ``why`` says why.

    Raises:
        SiteError: The site is unknown, or lies where a prompt's last token does not pass.
        SettingsError: There is no such layer or neuron.
        PairsError: The split holds fewer than 8 pairs.
        ModelError: The metric cannot be used.
    """
    (record,) = look_at(
        model,
        task,
        pairs,
        [(layer, neuron)],
        site=site,
        split=split,
        metric=metric,
        top=top,
        n_tokens=n_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return NeuronPage(**vars(record))

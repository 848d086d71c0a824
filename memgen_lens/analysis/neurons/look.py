"""Single neurons, looked at: when they are active, what they say to the vocabulary, what changing them does.

Does not choose neurons, nor draw what it finds: see `memgen_lens.one_neuron`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from memgen_lens.analysis.attribution.answers import Answers, answers_of
from memgen_lens.analysis.attribution.contrast import Contrast, Metric
from memgen_lens.analysis.attribution.interventions import changes
from memgen_lens.analysis.attribution.scored import pairs_of
from memgen_lens.analysis.neurons.changed import Scaled, changed_outputs
from memgen_lens.analysis.recording.finite import SIDES
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core.errors import MemgenError, ModelError, SettingsError
from memgen_lens.core.neuron_records import (
    ChangeName,
    DrivingPrompt,
    Estimate,
    NeuronChange,
    NeuronRecord,
    Side,
    SideChange,
    TokenEffect,
)
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.stats import auroc, bootstrap_auroc_and_accuracy, bootstrap_mean, wilson
from memgen_lens.core.types import Behavior, LensModel
from memgen_lens.models.directions import direct_effect
from memgen_lens.models.sites import site_hooks

CALL = "neuron_page"
CHANGES: tuple[ChangeName, ...] = ("zero", "mean", "double")
SHOWS: dict[Side, Behavior] = {"memorized": Behavior.MEMORIZATION, "generalized": Behavior.GENERALIZATION}
N_EXAMPLES = 3
"""Prompts shown of each side on which a change shows."""
PROMPTS_AT_ONCE, ROWS_AT_ONCE = 256, 2048
"""Prompts whose contrast, and prompts x changes whose completion, run together where no number is asked for."""


def look_at(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    neurons: Sequence[tuple[int, int]],
    *,
    site: str,
    split: PairSplit | None,
    metric: Metric | None = None,
    top: int = 5,
    n_tokens: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[NeuronRecord]:
    """Several neurons of one site, by layer and place; see `memgen_lens.neuron_page`."""
    at_once, rows = batch_size or PROMPTS_AT_ONCE, batch_size or ROWS_AT_ONCE
    judge = Judge.of(model, task, pairs.take(pairs_of(pairs, split, call=CALL)), batch_size=rows)
    looked = _Looked(model, judge, neurons, site, at_once, progress)
    with torch.inference_mode(False):  # what is run under hooks of ours keeps no tensor of another mode
        effects, why = looked.contrasts(metric)
    said = looked.said(rows)
    records = []
    for number, (layer, neuron) in enumerate(neurons):
        activations: dict[Side, Any] = {side: looked.activations[i, :, number] for i, side in enumerate(SHOWS)}
        tokens, untold = _tokens(model, looked.places[number][0], neuron, n_tokens)
        records.append(
            NeuronRecord(
                site=site,
                layer=layer,
                neuron=neuron,
                split=split,
                item=judge.pairs.item,
                **activations,
                **_told_apart(activations, judge.pairs.item, seed=seed),
                **_driving(judge.pairs, activations, top),
                **tokens,
                changes=tuple(
                    _change(name, judge, said[0], said[1 + len(CHANGES) * number + i], _of(effects, number, i), seed)
                    for i, name in enumerate(CHANGES)
                ),
                why=why | untold,
                metric=None if metric is None else getattr(metric, "__name__", "metric"),
            )
        )
    return records


class _Looked:
    """The neurons and what they do on both sides of the pairs."""

    def __init__(
        self,
        model: LensModel,
        judge: Judge,
        neurons: Sequence[tuple[int, int]],
        site: str,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.model, self.judge, self.batch_size, self.progress = model, judge, batch_size, progress
        hooks = site_hooks(model, site)
        for layer, _ in neurons:
            if layer >= len(hooks):
                raise _not_there("layer", layer, len(hooks), site)
        self.places = [(hooks[layer], neuron) for layer, neuron in neurons]
        self.widths: dict[str, int] = {}
        self.activations = self._recorded(site)

    def _recorded(self, site: str) -> Float[np.ndarray, "2 pair place"]:
        """The neurons' activations alone, whatever else the site has."""
        names = list(dict.fromkeys(hook for hook, _ in self.places))
        how = {"batch_size": 2 * self.batch_size, "progress": self.progress, "call": CALL}
        kept = []
        for block in recorded_blocks(self.model, self.judge.pairs, names, **how):
            self.widths = {hook: block.sides[hook].shape[-1] for hook in names}
            for hook, neuron in self.places:
                if neuron >= self.widths[hook]:
                    raise _not_there("neuron", neuron, self.widths[hook], site)
            kept.append(np.stack([block.sides[hook][:, :, 0, neuron] for hook, neuron in self.places], axis=-1))
        return np.concatenate(kept, axis=1)

    @property
    def mean(self) -> Float[np.ndarray, " place"]:
        """The neurons' means over both prompts of all pairs."""
        return self.activations.mean((0, 1), dtype=np.float64)

    def contrasts(
        self, metric: Metric | None
    ) -> tuple[Float[np.ndarray, "2 pair change place"] | None, dict[str, str]]:
        """How each change of each neuron moves the contrast of both sides' prompts; or why that is not known."""
        pairs = self.judge.pairs
        try:
            how = {"batch_size": self.batch_size, "call": CALL}
            # A user's own quantity looks at no answer.
            answers = [([0], [0])] * len(pairs) if metric else answers_of(self.model, pairs, **how)
        except MemgenError as error:
            return None, {"contrast": f"expected {error.expected}; received {error.received}"}
        found = np.zeros((2, len(pairs), len(CHANGES), len(self.places)), dtype=np.float64)
        with progress_bar(2 * len(pairs), "changing neurons", shown=self.progress) as bar:
            for place, side in enumerate(SIDES):
                for rows, effects in self._changed(Contrast(self.model, metric), side, answers, place):
                    found[place, rows] = effects
                    bar.update(len(rows))
        return found, {}

    def _changed(
        self, contrast: Contrast, side: str, answers: Answers, place: int
    ) -> Iterator[tuple[list[int], Float[np.ndarray, "batch change place"]]]:
        hooks, groups = list(self.widths), self._groups()
        own = self.activations[place]
        put = {"zero": np.zeros_like(own), "mean": np.broadcast_to(self.mean, own.shape), "double": 2 * own}
        for asked in contrast.asked(self.judge.pairs, side, answers, batch_size=self.batch_size):
            effects = []
            for change in CHANGES:
                values = np.zeros((len(asked.index), *groups[0].shape), dtype=np.float32)
                for number, group in enumerate(groups):
                    values[:, group] = put[change][asked.index, number, None]
                on_device = torch.from_numpy(values).to(asked.tokens.device)
                effects.append(changes(contrast, asked, hooks, on_device, groups).cpu().numpy())
            yield asked.index, np.stack(effects, axis=1)

    def _groups(self) -> list[Bool[np.ndarray, "layer neuron"]]:
        """Each neuron alone, among those of the hook points that any of them is at."""
        hooks, width = list(self.widths), max(self.widths.values())
        groups = []
        for hook, neuron in self.places:
            groups.append(np.zeros((len(hooks), width), dtype=bool))
            groups[-1][hooks.index(hook), neuron] = True
        return groups

    def said(self, batch_size: int) -> list[dict[Side, list[str]]]:
        """What the model says to both sides' prompts: unchanged, then under each change of each neuron."""
        changed: list[Scaled | None] = [None]
        for (hook, neuron), mean in zip(self.places, self.mean.tolist(), strict=True):
            made = {"zero": (0.0, 0.0), "mean": (0.0, mean), "double": (2.0, 0.0)}
            changed += [Scaled(hook, neuron, *made[name]) for name in CHANGES]
        said: list[dict[Side, list[str]]] = [{} for _ in changed]
        for side in SHOWS:
            outputs = changed_outputs(
                self.model,
                [item.prompt for item in getattr(self.judge.pairs, side)],
                changed,
                self.widths,
                max_new_tokens=self.judge.max_new_tokens,
                batch_size=batch_size,
                prepend_bos=self.judge.pairs.prepend_bos,
                progress=self.progress,
            )
            for number, texts in enumerate(outputs):
                said[number][side] = texts
        return said


def _of(effects: Float[np.ndarray, "2 pair change place"] | None, number: int, change: int) -> Any:
    return None if effects is None else effects[:, :, change, number]


def _change(
    name: ChangeName,
    judge: Judge,
    before: dict[Side, list[str]],
    after: dict[Side, list[str]],
    effects: Float[np.ndarray, "2 pair"] | None,
    seed: int,
) -> NeuronChange:
    """What one change of one neuron does to both sides."""
    item, examples = judge.pairs.item, []
    sides: dict[Side, SideChange] = {}
    for place, side in enumerate(SHOWS):
        items = getattr(judge.pairs, side)
        own, other = SHOWS[side], SHOWS["generalized" if side == "memorized" else "memorized"]
        shown, shows = (
            [judge.behavior(i, o) for i, o in zip(items, o_s[side], strict=True)] for o_s in (before, after)
        )
        asked = [p for p, behavior in enumerate(shown) if behavior is own]
        kept, switched = (
            wilson([shows[p] is behavior for p in asked], item[asked]) if asked else None for behavior in (own, other)
        )
        contrast = None if effects is None else _mean(effects[place], item, seed=seed)
        sides[side] = SideChange(contrast, kept, switched)
        moved = {items[p].prompt: p for p in reversed(asked) if shows[p] is not own}
        examples += [
            {
                "prompt": prompt,
                "side": side,
                "before": judge.said(before[side][p]),
                "after": judge.said(after[side][p]),
                "behavior": str(shows[p]),
            }
            for prompt, p in sorted(moved.items(), key=lambda entry: entry[1])[:N_EXAMPLES]
        ]
    return NeuronChange(name, **sides, examples=tuple(examples))


def _mean(values: Float[np.ndarray, " pair"], item: Any, *, seed: int) -> Estimate:
    return Estimate(float(values.mean(dtype=np.float64)), bootstrap_mean(values, item, seed=seed))


def _told_apart(activations: dict[Side, Any], item: Any, *, seed: int) -> dict[str, Any]:
    """Mean difference and AUROC, with intervals."""
    memorized, generalized = (values.astype(np.float64) for values in activations.values())
    labels, decision = np.repeat([True, False], len(item)), np.concatenate([memorized, generalized])
    ends = bootstrap_auroc_and_accuracy(labels, decision, np.tile(item, 2), seed=seed)["auroc"]
    return {
        "nmd": _mean(memorized - generalized, item, seed=seed),
        "auroc": Estimate(auroc(labels, decision), ends),
    }


def _driving(pairs: PromptPairs, activations: dict[Side, Any], top: int) -> dict[str, Any]:
    """The prompts on which the neuron is highest and lowest, each once."""
    found = {
        (item.prompt, side): DrivingPrompt(item.prompt, side, float(value))
        for side, values in activations.items()
        for item, value in zip(getattr(pairs, side), values, strict=True)
    }
    rising = sorted(found.values(), key=lambda one: one.activation)
    return {"highest": tuple(rising[::-1][:top]), "lowest": tuple(rising[:top])}


def _tokens(model: LensModel, hook: str, neuron: int, n_tokens: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The tokens that a neuron favours and suppresses most; or why they are not known."""
    try:
        logits = direct_effect(model, hook, neuron).cpu()
    except ModelError as error:
        return {"favoured": (), "suppressed": ()}, {"tokens": error.received}
    tokenizer = model.tokenizer
    known = logits[: len(tokenizer)]  # a vocabulary is often filled up to a round number

    def effects(chosen: torch.Tensor) -> tuple[TokenEffect, ...]:
        return tuple(TokenEffect(_text(tokenizer, i), i, float(known[i])) for i in chosen.tolist())

    order = known.argsort(descending=True, stable=True)
    raised, lowered = order[known[order] > 0], order[known[order] < 0].flip(0)
    return {"favoured": effects(raised[:n_tokens]), "suppressed": effects(lowered[:n_tokens])}, {}


def _text(tokenizer: Any, number: int) -> str:
    """A token's text; its name in the vocabulary where it is a part of a character, or nothing."""
    text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(tokenizer.convert_ids_to_tokens(number))


def _not_there(what: str, number: int, n: int, site: str) -> SettingsError:
    return SettingsError(
        f"{CALL}({what}={number})",
        expected=f"a {what} of site {site!r}, 0 to {n - 1}",
        received=str(number),
        fix=f"Count {what}s from 0.",
    )

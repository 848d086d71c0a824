"""Make a steering of vectors that gradient descent finds: those that make one answer likely on the ``select`` prompts.

Does not choose a layer (see `memgen_lens.stages`) nor judge what it does (see `evaluation`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.analysis.attribution.answers import Answers, answers_of
from memgen_lens.analysis.attribution.contrast import Asked, Contrast, answered
from memgen_lens.analysis.attribution.scored import pairs_of
from memgen_lens.analysis.steering.directions import placed
from memgen_lens.analysis.steering.hooks import change_hooks
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import ModelError, SettingsError
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.types import Direction, LensModel, Positions
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import positions_from
from memgen_lens.models.sites import site_hooks

CALL = "optimize_direction"
SIDE: dict[Direction, str] = {"generalization": "memorized", "memorization": "generalized"}
"""The prompts that are steered: those that show the other behaviour."""
WAYS: tuple[Direction, Direction] = ("memorization", "generalization")
"""The answers of a pair, in their order."""
BETAS = (0.9, 0.99)


@arguments(
    model=lens_model(CALL),
    pairs=kinds.one(PromptPairs),
    site=kinds.Text,
    layers=kinds.Layers | None,
    toward=kinds.DirectionName,
    n_steps=kinds.Count,
    learning_rate=kinds.Positive,
    positions=kinds.PositionsName,
    split=kinds.PairSplitName | None,
    max_prompts=kinds.Count,
    seed=kinds.Seed,
    batch_size=kinds.Count,
    progress=kinds.Flag,
)
def optimize_direction(
    model: LensModel,
    pairs: PromptPairs,
    site: str = "resid_post",
    *,
    layers: int | Sequence[int] | None = None,
    toward: Direction = "generalization",
    n_steps: int = 20,
    learning_rate: float = 0.1,
    positions: Positions = "answer",
    split: PairSplit | None = "select",
    max_prompts: int = 256,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> Steering:
    """Find by gradient descent the one vector whose addition makes prompts of one behaviour give the other's answer.

    An optimized steering vector (Dunefsky and Cohan, arXiv 2502.18862; before them Subramani et al., arXiv 2205.05124,
    for one text each): Adam on the mean negative log-probability of the answer of ``toward`` (and of the end-of-text
    token behind it, where the model ends it so by itself), teacher-forced, over the prompts of ``split`` that give the
    other one, the vector added at ``positions`` of the site and the model frozen.
    Departures: many prompts in place of one, as one vector is to serve prompts it was not fitted on; steps are counted
    in the mean norm of the activations there. arXiv 2412.18497 shifts by differences of means alone, which need not
    be what the model heeds.

    It shows that one vector *can* switch prompts, not that the model itself uses this direction: an optimizer also
    finds what never occurs. Judge it by `evaluate_steering` on ``test``, beside its random directions and by its side
    effects, and choose layers on ``tune``.

    What stands before the answer position is run once. A step is a forward and a backward pass of the answer's tokens.

    >>> steer = mg.optimize_direction(model, pairs, layers=[20])  # doctest: +SKIP
    >>> mg.evaluate_steering(model, task, pairs, steer).to_generalization.shift  # doctest: +SKIP

    Args:
        model: A lens model, left without hooks also after an exception.
        pairs: Prompt pairs with both answers.
        site: A short name with ``layers``, or one hook point (``"blocks.3.hook_resid_post"``).
        layers: This layer, or these, each with a vector of its own, found together.
        toward: The behaviour to lead to. Steered towards the other one, the vector is taken away, which nothing was
            fitted for.
        n_steps: Steps of Adam.
        learning_rate: The first step's length, at most, as a multiple of the mean norm of the activations at the answer
            position; 20 steps of 0.1 come to about as long a vector as these are.
        positions: Where it is added, in fitting as in steering; see `memgen_lens.Steering.from_scores`.
        split: Pairs to fit on; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all.
        max_prompts: Distinct prompts at most, drawn from those of the split; what was run of them is kept.
        seed: Draws them.
        batch_size: Prompts that run together at most.
        progress: Show a bar over what takes longer than two seconds.

    Returns:
        A steering of mode ``"direction"`` at alpha 1.

    Raises:
        PairsError: The split holds fewer than 8 pairs, or a pair lacks an answer.
        SettingsError: Layers are missing, twice there or unknown.
        SiteError: The site is unknown, or has no row for each position.
        ModelError: The loss is not finite, or does not depend on what is added.
    """
    hooks = site_hooks(model, site)
    places = np.flatnonzero(placed(np.ones(1), site, layers, call=CALL)[1].any(1)).tolist()
    if places[-1] >= len(hooks):
        raise SettingsError(
            f"{CALL}(layers=...)",
            expected=f"layers of {site!r}, 0 to {len(hooks) - 1}",
            received=str(places[-1]),
            fix="Change layers.",
        )
    chosen = _distinct(pairs.take(pairs_of(pairs, split, call=CALL)), toward, max_prompts, seed)
    answers = answers_of(model, chosen, batch_size=batch_size, call=CALL)
    answers = _ended(model, chosen, answers, toward, batch_size)
    with torch.inference_mode(False):  # where the caller keeps no gradients, ours are
        batches = list(Contrast(model).asked(chosen, SIDE[toward], answers, batch_size=batch_size))
        fit = _Fit(model, batches, toward, positions, {hooks[place]: _Vector() for place in places})
        fit.measure()
        with progress_bar(n_steps, "optimizing a direction", shown=progress, unit="step") as bar:
            vectors = fit.descended(n_steps, learning_rate, lambda: bar.update(1))
    for place, vector in zip(places, vectors, strict=True):
        if not vector.any():
            raise ModelError(
                CALL,
                expected="answers that depend on what is added",
                received=f"no gradient: nothing that is added to {site!r} in layer {place} there changes them",
                fix="Choose another site, layer or positions.",
            )
    many = None if layers is None else places
    found = Steering.from_direction(vectors, site=site, layers=many, points_to=toward, positions=positions)
    return replace(found, setting=replace(found.setting, chosen=f"optimized towards {toward}"))


@dataclass
class _Vector:
    """What is added at one hook point: ``scale * unit``.

    Attributes:
        norms: Of the activations at the answer position, of all prompts.
        unit: None before these are known.
        scale: By their mean, so that ``unit`` moves in shares of it.
    """

    norms: list[Tensor] = field(default_factory=list)
    unit: Tensor | None = None
    scale: float = 0.0

    def seen(self, h: Float[Tensor, "row neuron"], copy: Tensor, prompt: Tensor) -> Tensor:
        """Take note of the rows."""
        self.norms.append(h.detach().float().norm(dim=1).cpu())
        if self.unit is None:
            self.unit = torch.zeros(h.shape[1], device=h.device, requires_grad=True)
        return h

    def added(self, h: Float[Tensor, "row neuron"], copy: Tensor, prompt: Tensor) -> Tensor:
        """Rows with the vector."""
        return h + self.value.to(h.device)

    @property
    def value(self) -> Float[Tensor, " neuron"]:
        """The vector."""
        assert self.unit is not None
        return self.unit * self.scale


@dataclass
class _Fit:
    """Vectors, and what they are to make likely."""

    model: LensModel
    batches: Sequence[Asked]
    toward: Direction
    positions: Positions
    vectors: dict[str, _Vector]

    @torch.no_grad()
    def measure(self) -> None:
        """Take note of the activations at the answer position."""
        for asked in self.batches:
            self._log_probability(asked, {name: vector.seen for name, vector in self.vectors.items()}, "prompt")
        lacking = [name for name, vector in self.vectors.items() if vector.unit is None]
        if lacking:
            raise ModelError(
                CALL,
                expected="hook points that this model's forward pass reaches",
                received=f"{lacking[0]}, which it has and never calls",
                fix="Choose a site inside the blocks.",
            )
        for vector in self.vectors.values():
            assert vector.unit is not None
            vector.scale = float(torch.cat(vector.norms).mean()) / len(vector.unit) ** 0.5

    def descended(
        self, n_steps: int, learning_rate: float, done: Callable[[], Any]
    ) -> Float[np.ndarray, "layer neuron"]:
        """The vectors behind so many steps."""
        units = [vector.unit for vector in self.vectors.values() if vector.unit is not None]
        adam = torch.optim.Adam(units, lr=learning_rate, betas=BETAS)
        n = sum(len(asked.index) for asked in self.batches)
        for _ in range(n_steps):
            adam.zero_grad()
            for asked in self.batches:
                self._descend(asked, units, n)
            adam.step()
            done()
        with torch.no_grad():
            return np.stack([vector.value.cpu().numpy() for vector in self.vectors.values()])

    def _descend(self, asked: Asked, units: Sequence[Tensor], n: int) -> None:
        """Add a batch's part of the gradient, of nothing but the vectors."""
        with torch.enable_grad():
            changes = {name: vector.added for name, vector in self.vectors.items()}
            loss = -self._log_probability(asked, changes, self.positions).sum() / n
            if not loss.requires_grad:  # nothing was added that it depends on
                return
            if not bool(loss.isfinite()):
                raise ModelError(
                    CALL,
                    expected="finite log-probabilities of the answers",
                    received=f"a loss of {float(loss)}",
                    fix="Take a lower learning_rate, or look at the model's weights.",
                )
            for unit, gradient in zip(units, torch.autograd.grad(loss, units, materialize_grads=True), strict=True):
                unit.grad = gradient if unit.grad is None else unit.grad + gradient

    def _log_probability(
        self, asked: Asked, changes: dict[str, Callable[..., Tensor]], positions: Positions
    ) -> Float[Tensor, " batch"]:
        """Of the answer that is led to, behind each prompt, summed over its tokens."""
        which = WAYS.index(self.toward)
        ids, counts = asked.answers[which], asked.counts[which]
        length = asked.at + ids.shape[1]
        answer: Int[Tensor, " batch"] = torch.full((len(ids),), asked.at)
        here = positions_from(answer, positions, first=0, length=length)
        hooks = change_hooks(changes, at=lambda: here, n_copies=1)
        logits = answered(self.model, asked, ids[None, :, :-1], hooks)
        said = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
        return (said * counts).sum(-1)


@torch.inference_mode()
def _ended(model: LensModel, pairs: PromptPairs, answers: Answers, toward: Direction, batch_size: int) -> Answers:
    """Answers of which the one led to ends as the model ends it, unsteered, where it gives it by itself.

    Without the end-of-text token nothing would keep a vector that is added at generated positions from making the
    model go on.
    """
    which, eos = WAYS.index(toward), model.tokenizer.eos_token_id
    (partner,) = (side for way, side in SIDE.items() if way != toward)

    def longer(both: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        memorized, rule = ([*ids, eos] if i == which and ids[-1] != eos else ids for i, ids in enumerate(both))
        return memorized, rule

    ended = [longer(both) for both in answers]
    found = list(answers)
    for asked in Contrast(model).asked(pairs, partner, ended, batch_size=batch_size):
        ids, counts = asked.answers[which], asked.counts[which]
        said = answered(model, asked, ids[None, :, :-1], []).argmax(-1)
        last = said.gather(1, counts.sum(-1, keepdim=True) - 1)[:, 0].tolist()
        for place, token in zip(asked.index, last, strict=True):
            if token == eos:
                found[place] = ended[place]
    return found


def _distinct(pairs: PromptPairs, toward: Direction, n: int, seed: int) -> PromptPairs:
    """One pair of each distinct prompt that is steered, at most so many."""
    prompts = [item.prompt for item in getattr(pairs, SIDE[toward])]
    first = np.asarray(sorted({prompt: place for place, prompt in reversed(list(enumerate(prompts)))}.values()))
    if len(first) > n:
        first = np.sort(np.random.default_rng(seed).choice(first, n, replace=False))
    return pairs.take(first)

"""Recitation and its cost under many steerings, beside random shifts of the same norm.

Does not choose a steering: see `RecitationCurve.best`, to be asked of the texts that one chooses on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens.analysis.recitation.texts import CutTexts, cut_texts, in_parts, nll_of, suffix_logits
from memgen_lens.analysis.steering.controls import control_draws
from memgen_lens.analysis.steering.generation import alike, in_blocks
from memgen_lens.analysis.steering.steering import Steering, steering_hooks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.recitation_records import RecitationCurve, RecitationPoint
from memgen_lens.core.stats import mean_of_draws, wilson
from memgen_lens.core.types import Direction, LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.passes import At
from memgen_lens.models.step import last_logits, run_before

COPIES_AT_ONCE = 32
"""Steerings that share a forward pass at most."""


@arguments(
    model=lens_model("recitation_under_steering"),
    texts=kinds.Lines,
    steerings=kinds.several(kinds.one(Steering)),
    other_texts=kinds.Lines,
    prefix_tokens=kinds.Count,
    suffix_tokens=kinds.Count,
    k=kinds.Count | None,
    toward=kinds.DirectionName,
    n_controls=kinds.Number0,
    prepend_bos=kinds.Flag | None,
    seed=kinds.Seed,
    progress=kinds.Flag,
)
def recitation_under_steering(
    model: LensModel,
    texts: Sequence[str],
    steerings: Steering | Sequence[Steering],
    *,
    other_texts: Sequence[str],
    prefix_tokens: int = 32,
    suffix_tokens: int = 32,
    k: int | None = None,
    toward: Direction = "generalization",
    n_controls: int = 20,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RecitationCurve:
    """How much is still recited under each of several steerings, and what that costs on other text.

    The curve of arXiv 2503.06040 (memorization and performance against strength and layer), with what it lacks:
    intervals by text, and beside each steering random shifts of the same norm. As the steering may differ by layer,
    neurons and strength, any list of them makes a curve: ``[Steering.from_scores(score, 0.1, a, layers=[l]) for ...]``.

    One forward pass tells it all. A suffix's first k tokens are recited greedily exactly where each of them has the
    largest logit behind the prefix and those before it; so what is counted is what generating under
    ``steer.applied(...)`` gives. Prompts are the texts' prefixes; ``positions="answer"`` steers the prefix's last
    position and all of the suffix, on other text too, where the cost is measured in the same way.

    Args:
        model: A lens model with a tokenizer.
        texts: Texts that it recites. Not those that the steering was fitted on; and choose it on some (``tune``) and
            report it on others (``test``), with other texts parted likewise.
        steerings: One or several, of any site and positions; not of patch mode.
        other_texts: Texts that are not recited, of which the cost is measured.
        prefix_tokens: See `recitation`.
        suffix_tokens: See `recitation`.
        k: Tokens of the suffix that count as recited; default: all.
        toward: ``"generalization"``: away from recitation.
        n_controls: Draws of each control for each steering: ``random_neurons`` (the same magnitudes on other neurons)
            and, of a shift, ``random_direction`` (a Gaussian vector of the same norm in each layer); 0 leaves them out.
        prepend_bos: See `memgen_lens.complete`.
        seed: Seed of the controls.
        progress: Show a progress bar, should it take longer than two seconds.

    Raises:
        SettingsError: A text is too short, k is more than the suffix has, or a steering patches.
        SiteError: The model lacks a steering's site, or has another shape there.
        ModelError: See `recitation`.
    """
    call = "recitation_under_steering"
    many = [steerings] if isinstance(steerings, Steering) else list(steerings)
    k = suffix_tokens if k is None else k
    if k > suffix_tokens or any(steer.setting.mode == "patch" for steer in many):
        raise SettingsError(
            call,
            expected=f"k of at most {suffix_tokens}, and steerings that do not patch",
            received=f"k={k}, modes {', '.join(dict.fromkeys(steer.setting.mode for steer in many))}",
            fix="Texts have no paired prompt to patch from: use Steering.from_scores(mode='shift').",
        )
    how = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens, "prepend_bos": prepend_bos, "call": call}
    own = cut_texts(model, texts, **how)
    other = cut_texts(model, other_texts, **how, name="other_texts")
    items = np.unique(torch.cat([own.prefix, own.suffix], 1).cpu().numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    rng = np.random.default_rng(seed)
    draws = [_controls(steer, n_controls, rng) for steer in many]
    asked = [*many, *(draw for named in draws for some in named.values() for draw in some)]
    with progress_bar((len(own) + len(other)) * len(asked), "steering", shown=progress) as bar:
        found = _measured(model, own, other, asked, k, toward, bar.update)
    plain, rest = found[0], iter(found[1 + len(many) :])
    points = []
    for steer, figures, named in zip(many, found[1 : 1 + len(many)], draws, strict=True):
        controls = {
            name: {
                "recited": mean_of_draws([figure.recited.mean() for figure in some]),
                "other_ratio": mean_of_draws([figure.other_perplexity / plain.other_perplexity for figure in some]),
                "kl_nats": mean_of_draws([figure.kl_nats for figure in some]),
            }
            for name, some in ((name, [next(rest) for _ in made]) for name, made in named.items())
        }
        points.append(_point(figures, plain, items, steer, controls))
    return RecitationCurve(
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        k=k,
        n=len(own),
        n_items=len(set(items.tolist())),
        n_other=len(other),
        unsteered=_point(plain, plain, items, None, {}),
        points=tuple(points),
    )


class _Figures(NamedTuple):
    """What one steering does: which texts are recited, tokens that are, perplexities, and KL."""

    recited: np.ndarray
    matched: float
    perplexity: float
    other_perplexity: float
    kl_nats: float


def _point(
    figures: _Figures, plain: _Figures, items: np.ndarray, steer: Steering | None, controls: dict[str, Any]
) -> RecitationPoint:
    rate = wilson(figures.recited, items)
    ruled = steer is not None and steer.rules is not None
    return RecitationPoint(
        setting=None if steer is None else steer.setting,
        layers=() if steer is None else tuple(np.flatnonzero(steer.selected.any(1)).tolist()),
        norm=None if ruled else 0.0 if steer is None else float(np.linalg.norm(steer.shift)),
        recited={"rate": rate.rate, "ci95": list(rate.ci95)},
        matched=figures.matched,
        perplexity=figures.perplexity,
        other_perplexity=figures.other_perplexity,
        other_ratio=figures.other_perplexity / plain.other_perplexity,
        kl_nats=figures.kl_nats,
        controls=controls,
    )


def _controls(steer: Steering, n: int, rng: np.random.Generator) -> dict[str, list[Steering]]:
    """Draws of each control."""
    if not n:
        return {}
    draws = {"random_neurons": control_draws(steer, "random_neurons", n, rng)}
    if steer.rules is None:
        size = np.linalg.norm(steer.shift, axis=1, keepdims=True)
        made = rng.standard_normal((n, *steer.shift.shape))
        made *= size / np.linalg.norm(made, axis=2, keepdims=True)
        touched = np.broadcast_to(steer.selected.any(1, keepdims=True), steer.selected.shape).copy()
        draws["random_direction"] = [replace(steer, selected=touched, shift=shift) for shift in made]
    return draws


def _measured(
    model: LensModel,
    own: CutTexts,
    other: CutTexts,
    steerings: Sequence[Steering],
    k: int,
    toward: Direction,
    done: Callable[[int], Any],
) -> list[_Figures]:
    """The figures unsteered, then those of each steering."""
    n = 1 + len(steerings)
    right = np.zeros((n, *own.suffix.shape), dtype=bool)
    nll, other_nll = np.zeros((n, *own.suffix.shape)), np.zeros((n, *other.suffix.shape))
    kl = np.zeros((n, *other.suffix.shape))
    kinds = alike(steerings)
    for texts, is_own in ((own, True), (other, False)):
        at_once = min(COPIES_AT_ONCE, max(map(len, kinds), default=1))
        for some in in_parts(model, texts, copies=at_once):
            part = texts.take(some)
            plain = suffix_logits(model, part)
            steered = _each(model, part, steerings, kinds, at_once, toward)
            for place, logits in chain([(0, plain)], steered):
                lost = nll_of(logits, part.suffix).double().cpu().numpy()
                if is_own:
                    right[place, some] = (logits.argmax(-1) == part.suffix).cpu().numpy()
                    nll[place, some] = lost
                else:
                    other_nll[place, some] = lost
                    kl[place, some] = 0.0 if place == 0 else _kl(logits, plain).cpu().numpy()
                done(len(part) * (place > 0))
    with np.errstate(over="ignore"):  # a model that is steered to pieces has a perplexity beyond any number
        return [
            _Figures(
                np.asarray(right[i, :, :k].all(1)),
                float(right[i].cumprod(1).sum(1).mean()),
                float(np.exp(nll[i].mean())),
                float(np.exp(other_nll[i].mean())),
                float(kl[i].mean()),
            )
            for i in range(n)
        ]


def _each(
    model: LensModel,
    part: CutTexts,
    steerings: Sequence[Steering],
    blocks: Iterable[Sequence[int]],
    at_once: int,
    toward: Direction,
) -> Iterator[tuple[int, Float[Tensor, "text suffix d_vocab"]]]:
    """Place of each steering and its logits."""
    for members in blocks:
        for block in in_blocks(members, at_once):
            logits = steered_logits(model, part, [steerings[i] for i in block], toward=toward)
            for i, of_one in zip(block, logits, strict=True):
                yield i + 1, of_one


@torch.inference_mode()
def steered_logits(
    model: LensModel, texts: CutTexts, steerings: Sequence[Steering], *, toward: Direction
) -> Float[Tensor, "steering text suffix d_vocab"]:
    """Logits for each suffix token under each of several steerings of one site, mode and positions.

    Steerings ride in the batch dimension; where they change nothing before the prefix's last position, all before it is
    run once.
    """
    copies, n = len(steerings), texts.suffix.shape[1]
    positions = steerings[0].setting.positions
    past = None if positions == "all" else run_before(model, texts.prefix, torch.ones_like(texts.prefix))
    whole = torch.cat([texts.prefix, texts.suffix[:, :-1]], dim=1)
    first = texts.prefix.shape[1] - 1
    fed = whole if past is None else whole[:, first:]
    length = fed.shape[1]
    answer = length - n  # place of the prefix's last position in what is run
    chosen = {"all": slice(0, length), "answer": slice(answer, length), "prompt": slice(answer, answer + 1)}[positions]
    hooks = steering_hooks(model, steerings, toward=toward, at=lambda: At(length, chosen))
    fed = fed.repeat(copies, 1)
    with model.hooks(fwd_hooks=hooks):
        logits = last_logits(
            model, fed, torch.ones_like(fed), None if past is None else past.repeated(copies, room=length), n=n
        )
    return logits.unflatten(0, (copies, len(texts)))


def _kl(steered: Float[Tensor, "text suffix d_vocab"], plain: Float[Tensor, "text suffix d_vocab"]) -> Tensor:
    """KL divergence (nats) of the steered from the unsteered distribution at each position."""
    p, q = plain.float().log_softmax(-1), steered.float().log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)

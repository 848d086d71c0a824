"""Where is it decided? Activation patching between the prompts of a pair, one layer and position or head at a time.

Does not know neurons: see `attribute`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.analysis.attribution.answers import answers_of
from memgen_lens.analysis.attribution.contrast import Asked, Contrast, Metric
from memgen_lens.analysis.recording.positions import aligned_tokens, held_positions, lengths_of, tokens_at
from memgen_lens.analysis.recording.reading import NO_POSITIONS
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit, PromptPairs
from memgen_lens.core.position_records import PatchDirection, PatchingMap
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.stats import bootstrap_ratio
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import lens_model
from memgen_lens.models.sites import site_hooks

CALL = "patching_map"
PAIRS_AT_ONCE = 32
"""Pairs whose activations are held at once, where no number is asked for: few, so that many copies of them run in one
pass."""


@arguments(
    model=lens_model(CALL),
    pairs=kinds.one(PromptPairs),
    site=kinds.Text,
    by=Literal["position", "head"],
    positions=Literal["all", "answer"],
    direction=PatchDirection,
    split=kinds.PairSplitName | None,
    metric=kinds.Callback | None,
    batch_size=kinds.Count | None,
    seed=kinds.Seed,
    progress=kinds.Flag,
)
def patching_map(
    model: LensModel,
    pairs: PromptPairs,
    site: str = "resid_pre",
    *,
    by: Literal["position", "head"] = "position",
    positions: Literal["all", "answer"] = "all",
    direction: PatchDirection = "denoising",
    split: PairSplit | None = "select",
    metric: Metric | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PatchingMap:
    """How much of the recall each layer carries at each position, or in each head: 0 = nothing, 1 = all of it.

    Activation patching (Meng et al. 2022, arXiv 2202.05262; conventions of Heimersheim and Nanda 2024, arXiv
    2404.15255). The two prompts of a pair are the clean and the corrupted one: the recalling prompt is clean. With
    ``"denoising"`` the computing prompt is run, and the site's activation of one layer at one position is replaced by
    what it is there in the recalling prompt; with ``"noising"`` the other way round. The quantity is the
    log-probability of the memorized minus that of the rule's answer, each summed over its tokens, teacher-forced:
    what is patched is the prompt, never the answer behind it. With ``m`` its mean over pairs::

        denoising: (m_patched - m_computing) / (m_recalling - m_computing)
        noising:   (m_recalling - m_patched) / (m_recalling - m_computing)

    Activations are changed in place, as TransformerLens' own patching does: on a Bridge, ``resid_mid`` is seen where it
    enters the MLP, and so the stream beside the MLP is changed too.

    A ratio of means, not a mean of ratios: a pair whose two prompts hardly differ would have an unbounded ratio.
    Effects of different places need not sum to 1, and can lie outside [0, 1].

    Only pairs whose prompts have equally many tokens can be patched position by position; the others are left out and
    counted. Positions are counted from the end, where prompts of all lengths have the answer position; a position that
    only longer prompts have is judged on these, and left out where fewer than 8 pairs have it. What both prompts begin
    with is not run: in a causal model it is the same in either. Heads at the answer
    position of pairs of any length: `attribute` with ``method="patching"``, ``site="z"`` and one group a head.

    Args:
        model: A lens model, left without hooks also after an exception.
        pairs: Its prompt pairs.
        site: What is patched: ``"resid_pre"``, ``"resid_mid"``, ``"resid_post"``, ``"attn_out"``, ``"mlp_out"``,
            ``"z"`` or any other site with one row a position; or one hook point by its full name, for one layer alone.
        by: Columns of the map: ``"position"``, or ``"head"``, for which the site is ``"z"``, each head's output. Heads
            make a map layer x head, not head x position: each head is patched at all of ``positions`` at once.
        positions: With ``by="head"``, where a head is patched: at all positions of the prompt, or at the answer
            position alone.
        direction: See above.
        split: Pairs to look at; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all pairs.
        metric: In place of the log-probabilities, a function of logits ``[row, d_vocab]`` behind the prompts and the
            rows' items that gives one number a row.
        batch_size: Pairs whose activations are held at once, by default 32. Of each prompt as many patched copies run
            in one pass as there is room for.
        seed: Seed of the bootstrap.
        progress: Show a bar, should it take longer than two seconds.

    Returns:
        Effects ``[layer, position or head]`` with intervals that count items, beside the tokens.

    Raises:
        PairsError: Fewer than 8 pairs of the split have prompts of equal length; a pair lacks an answer; or the
            recalling prompts do not make the memorized answer likelier than the computing ones do.
        SiteError: The site is unknown, or has no row for each position, or no heads.
        ModelError: The metric cannot be used, or a prompt and its answer are longer than the model's context.
        SettingsError: ``positions="answer"`` with positions as columns, or heads of another site than ``"z"``.
    """
    if by == "head" and site != "z" and not site.endswith("hook_z"):
        raise _at_odds("by='head'", f"site={site!r}", "Patch heads at site='z', or positions of this site.")
    if by == "position" and positions != "all":
        raise _at_odds("by='position'", f"positions={positions!r}", "Say by='head', or leave positions away.")
    index = pairs.of(split) if split is not None else np.arange(len(pairs))
    pairs.require(MINIMUM_PAIRS, len(index), call=CALL)
    hooks = site_hooks(model, site)
    memorized, generalized = (
        aligned_tokens(model, [side[i] for i in index], prepend_bos=pairs.prepend_bos)
        for side in (pairs.memorized, pairs.generalized)
    )
    lengths = lengths_of(memorized)
    kept = lengths == lengths_of(generalized)
    _require_equal_lengths(int(kept.sum()), len(index))
    some, lengths = pairs.take(index[kept]), lengths[kept]
    n_positions = held_positions(lengths)
    n_heads = int(model.cfg.n_heads)
    n_columns = n_positions if by == "position" else n_heads
    with progress_bar(len(some) * len(hooks) * n_columns, "patching", shown=progress) as bar:
        patcher = _Patcher(
            Contrast(model, metric),
            hooks,
            n_columns,
            by_head=by == "head",
            only_answer=positions == "answer",
            direction=direction,
            done=bar.update,
        )
        gained, total = patcher.measured(some, batch_size=batch_size or PAIRS_AT_ONCE)
    there = np.ones((len(some), n_columns), dtype=bool)
    if by == "position":
        there = lengths[:, None] >= np.arange(n_positions, 0, -1)
    mean, interval = _mean_total(total, some.item, seed)
    effect, low, high = bootstrap_ratio(
        np.where(there[:, None], gained, 0), there * total[:, None], some.item, seed=seed
    )
    return PatchingMap(
        site=site,
        direction=direction,
        by=by,
        positions=positions,
        effect=effect,
        low=low,
        high=high,
        total=mean,
        total_ci95=interval,
        tokens=tokens_at(model, memorized[kept], generalized[kept], n_positions),
        n=there.sum(0),
        n_items=np.array([len(np.unique(some.item[column])) for column in there.T]),
        n_pairs=len(some),
        n_left_out=len(index) - len(some),
    )


@dataclass(frozen=True)
class _Patcher:
    """How pairs are patched.

    Attributes:
        contrast: The quantity.
        hooks: Hook points, one a layer.
        n_columns: Positions from the end, or heads.
        by_head: Whether columns are heads.
        only_answer: Whether heads are patched at the answer position alone.
        direction: What is patched into what.
        done: Told how many prompts have been run.
    """

    contrast: Contrast
    hooks: Sequence[str]
    n_columns: int
    by_head: bool
    only_answer: bool
    direction: PatchDirection
    done: Callable[[int], Any]

    @torch.no_grad()
    def measured(
        self, pairs: PromptPairs, *, batch_size: int
    ) -> tuple[Float[np.ndarray, "pair layer column"], Float[np.ndarray, " pair"]]:
        """What each pair's quantity moves towards that of the other prompt, and how far that prompt's is away.

        Both prompts of a pair are of one length, so that both sides come in the same batches.
        """
        model, contrast = self.contrast.model, self.contrast
        metric = contrast.metric is not None
        answers = [([0], [0])] * len(pairs) if metric else answers_of(model, pairs, batch_size=batch_size, call=CALL)
        gained = np.zeros((len(pairs), len(self.hooks), self.n_columns))
        total = np.zeros(len(pairs))
        sides = ("memorized", "generalized") if self.direction == "denoising" else ("generalized", "memorized")
        how = {"batch_size": batch_size, "reuse": False}
        of_source, of_target = (contrast.asked(pairs, side, answers, **how) for side in sides)
        for source, target in zip(of_source, of_target, strict=True):
            assert source.index == target.index, "prompts of equal lengths come in the same batches"
            said, values = self._read(source)
            plain, moved = self._patched(target, values, self._first_unlike(source, target))
            sign = 1 if self.direction == "denoising" else -1
            # Of positions that the batch lacks, or before which all is alike, nothing comes.
            gained[source.index, :, self.n_columns - moved.shape[2] :] = sign * moved.double().cpu().numpy()
            total[source.index] = sign * (said - plain).double().cpu().numpy()
        return gained, total

    def _read(self, asked: Asked) -> tuple[Float[Tensor, " batch"], list[Tensor]]:
        """The quantity, and what each hook point has at the prompt's positions, ``[batch, pos, head or 1, neuron]``."""
        seen: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[..., None]:
            def keep(activation: Tensor, hook: Any) -> None:
                seen[name] = self._by_place(name, activation, asked)[: len(asked.index)].clone()

            return keep

        said = self.contrast.of(asked, [(name, keeper(name)) for name in self.hooks])[0]
        lacking = [name for name in self.hooks if name not in seen]
        if lacking:
            raise SiteError(
                CALL,
                expected="hook points that this model's forward pass reaches",
                received=f"{lacking[0]}, which it has and never calls",
                fix="Choose a site inside the blocks.",
            )
        return said, [seen[name] for name in self.hooks]

    def _first_unlike(self, source: Asked, target: Asked) -> int:
        """The first position from which on prompts and their partners may have unlike activations."""
        if self.by_head or getattr(self.contrast.model.cfg, "attention_dir", "causal") != "causal":
            return 0
        unlike = ((source.tokens != target.tokens) & (target.mask > 0)).any(0)
        return int(unlike.long().argmax()) if bool(unlike.any()) else len(unlike) - 1

    def _patched(
        self, asked: Asked, values: Sequence[Tensor], first_unlike: int
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch layer column"]]:
        """The quantity unpatched, and how it changes where one place of one layer has other values.

        Columns before ``first_unlike`` are left out: there the other values are the same.
        """
        contrast, width = self.contrast, asked.tokens.shape[1]
        masks = self._masks(width).to(asked.tokens.device)  # [column, pos, head or 1]
        alike = max(0, first_unlike - (width - len(masks)))
        masks = masks[alike:]
        self.done(alike * len(self.hooks) * len(asked.index))
        cells = [(layer, column) for layer in range(len(self.hooks)) for column in range(len(masks))]
        at_once = max(1, contrast.copies(asked) - 1)
        changes: list[Tensor] = []
        plain = torch.zeros(len(asked.index))
        for first in range(0, len(cells), at_once):
            some = cells[first : first + at_once]

            def put(layer: int, some: Sequence[tuple[int, int]] = some) -> Callable[..., Tensor]:
                # A first copy that nothing changes: a pass of another size would round otherwise.
                mask = torch.zeros(len(some) + 1, *masks.shape[1:], dtype=torch.bool, device=masks.device)
                own = [copy for copy, (at, _) in enumerate(some) if at == layer]
                mask[[copy + 1 for copy in own]] = masks[[some[copy][1] for copy in own]]

                def change(activation: Tensor, hook: Any) -> Tensor:
                    before = self._by_place(self.hooks[layer], activation, asked)
                    rows = before.unflatten(0, (len(mask), -1, len(asked.index)))  # [copy, answer, batch, pos, ...]
                    chosen = mask[:, None, None, ..., None].to(activation.device)
                    patched = torch.where(chosen, values[layer].to(rows), rows).reshape(activation[:, :width].shape)
                    if 0 in activation.stride():  # one value stands for several places
                        activation = activation.clone()
                    activation[:, :width] = patched
                    return activation

                return change

            layers = sorted({layer for layer, _ in some})
            each = contrast.of(asked, [(self.hooks[layer], put(layer)) for layer in layers], copies=len(some) + 1)
            plain = each[0]
            changes.append(each[1:] - each[:1])
            self.done(len(some) * len(asked.index))
        found = torch.cat(changes).unflatten(0, (len(self.hooks), -1))  # [layer, column, batch]
        return plain, found.permute(2, 0, 1)

    def _masks(self, width: int) -> Bool[Tensor, "column pos part"]:
        """Which positions of a prompt, and which heads, each column stands for."""
        if not self.by_head:
            return torch.eye(width, dtype=torch.bool)[-self.n_columns :, :, None]
        at = torch.arange(width) == width - 1 if self.only_answer else torch.ones(width, dtype=torch.bool)
        return torch.eye(self.n_columns, dtype=torch.bool)[:, None] & at[None, :, None]

    def _by_place(self, name: str, activation: Tensor, asked: Asked) -> Float[Tensor, "row pos part neuron"]:
        """An activation at the prompt's positions, with an axis for heads where columns are heads."""
        parts = self.n_columns if self.by_head else 1
        width = asked.tokens.shape[1]
        run = width - 1 + asked.answers.shape[2]
        by_row = activation.ndim >= 3 and activation.shape[1] == run and not name.endswith(NO_POSITIONS)
        if not by_row or activation[0, 0].numel() % parts:
            raise SiteError(
                f"site {name!r}",
                expected=f"activations of the {run} positions that are run, [batch, pos, ...]"
                + (f", of {parts} heads" if self.by_head else ""),
                received=f"{list(activation.shape)}",
                fix="Choose a site of the residual stream, the MLP or the heads' values.",
            )
        return activation[:, :width].flatten(2).unflatten(2, (parts, -1))


def _mean_total(
    total: Float[np.ndarray, " pair"], items: Int[np.ndarray, " pair"], seed: int
) -> tuple[float, tuple[float, float]]:
    """What an effect of 1 is, with its interval; refused where it is nothing."""
    mean = float(total.mean())
    if not mean > 0:
        raise PairsError(
            CALL,
            expected="recalling prompts that make the memorized answer likelier than the computing prompts do",
            received=f"a mean difference of {mean:.3g} over {len(total)} pairs",
            fix="Give pairs that flip on this very model (mg.collect_pairs), or a metric= that is larger where it "
            "recalls.",
        )
    _, low, high = bootstrap_ratio(total[:, None, None], np.ones((len(total), 1)), items, seed=seed)
    return mean, (float(low[0, 0]), float(high[0, 0]))


def _require_equal_lengths(n: int, n_asked: int) -> None:
    if n < MINIMUM_PAIRS:
        raise PairsError(
            CALL,
            expected=f"at least {MINIMUM_PAIRS} pairs whose two prompts have equally many tokens",
            received=f"{n} of {n_asked}",
            fix="Rephrase so that lengths stay equal, give more pairs (split=None takes all), or compare answer "
            "positions alone: attribute(model, pairs, site, method='patching').",
        )


def _at_odds(one: str, other: str, fix: str) -> SettingsError:
    return SettingsError(CALL, expected="arguments that go together", received=f"{one} and {other}", fix=fix)

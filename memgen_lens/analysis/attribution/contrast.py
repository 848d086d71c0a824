"""What causal methods explain: how much likelier a prompt makes the memorized answer than the rule's.

Prompts are run up to their last token once; what follows is run as often as there are interventions. Does not
intervene.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.analysis.attribution.answers import Answers, padded
from memgen_lens.core.errors import ModelError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import LensModel
from memgen_lens.fast.decoding import Change, can_change
from memgen_lens.fast.forced import Forced
from memgen_lens.fast.support import is_plain, require_room
from memgen_lens.models.cache import Past
from memgen_lens.models.step import keeps_past, last_logits, rows_at_once, run_before
from memgen_lens.models.tokens import in_batches

Metric = Callable[[Tensor, Sequence[Item]], Tensor]
"""A user's own quantity: logits ``[row, d_vocab]`` behind the prompts, and the rows' items -> one number a row."""
Hooks = list[tuple[Any, Callable[..., Any]]]
Values = Float[Tensor, "copy batch"]
TOKENS_AT_ONCE = 16_384
"""Tokens of one forward pass."""


@dataclass(frozen=True)
class Asked:
    """Prompts that run together, with both answers of each.

    Attributes:
        index: Their places among the pairs.
        items: Their items.
        tokens: The prompts, padded on the left.
        mask: 1 for a token, 0 for padding.
        answers: Tokens of the memorized answers and of the rule's, filled up with zeros: ``[2, batch, token]``.
        counts: Which of them are tokens of an answer.
        past: What has been run of all but the last token; None where the model keeps none.
    """

    index: list[int]
    items: tuple[Item, ...]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "2 batch token"]
    counts: Bool[Tensor, "2 batch token"]
    past: Past | None

    @property
    def at(self) -> int:
        """The answer position among those that are run."""
        return self.tokens.shape[1] - 1 if self.past is None else 0


@dataclass(frozen=True)
class Contrast:
    """The quantity, on the prompts of some pairs.

    Attributes:
        model: A lens model.
        metric: A user's own quantity; None for the log-probability of the memorized answer minus that of the rule's,
            each summed over its tokens, teacher-forced.
    """

    model: LensModel
    metric: Metric | None = None

    def asked(
        self, pairs: PromptPairs, side: str, answers: Answers, *, batch_size: int, reuse: bool = True
    ) -> Iterator[Asked]:
        """The prompts of one side of the pairs, batch by batch, run up to their last token.

        Args:
            pairs: The pairs.
            side: ``"memorized"`` or ``"generalized"``.
            answers: Tokens of both answers of each pair.
            batch_size: Prompts in one batch at most.
            reuse: Whether what stands before the last token is run once for all that follows; without, hooks see the
                whole prompt.

        Raises:
            ModelError: A prompt and its answer are longer than the model's context.
        """
        items: tuple[Item, ...] = getattr(pairs, side)
        room = max((len(ids) for each in answers for ids in each), default=1)
        how = {"batch_size": batch_size, "tokens_at_once": TOKENS_AT_ONCE, "room": room}
        for whole in in_batches(self.model, [item.prompt for item in items], prepend_bos=pairs.prepend_bos, **how):
            length = whole.tokens.shape[1]
            require_room(length + room - 1, self.model.cfg.n_ctx, prompt_length=length)
            for batch in whole.parts(max(1, self._at_once(length, room) // 2)):
                ids, counts = padded([answers[i] for i in batch.index], batch.tokens.device)
                past = run_before(self.model, batch.tokens, batch.mask) if reuse else None
                some = tuple(items[i] for i in batch.index)
                yield Asked(batch.index, some, batch.tokens, batch.mask, ids, counts, past)

    def copies(self, asked: Asked) -> int:
        """How many interventions fit into one forward pass, at least one."""
        n_answers, n_tokens = self._rows(asked)
        rows = self._at_once(asked.tokens.shape[1], n_tokens)
        run = n_tokens if asked.past is not None else asked.tokens.shape[1] + n_tokens
        return max(1, min(rows, TOKENS_AT_ONCE // run) // (n_answers * len(asked.index)))

    def _at_once(self, length: int, n_tokens: int) -> int:
        """Rows whose logits and cache stay within bounds."""
        return rows_at_once(self.model, length + n_tokens, cached=keeps_past(self.model), n=n_tokens)

    def of(self, asked: Asked, hooks: Hooks = [], *, copies: int = 1) -> Values:  # noqa: B006  (never changed)
        """The quantity at prompts, each in as many copies, under hooks.

        Hooks see rows ``[copy, answer, batch]`` flattened, with one or both answers, and the positions that are run:
        the answer position is ``asked.at``.
        """
        n_answers, n_tokens = self._rows(asked)
        logits = answered(self.model, asked, asked.answers[:n_answers, :, : n_tokens - 1], hooks, copies=copies)
        return self._of_logits(asked, logits.unflatten(0, (copies, n_answers, len(asked.index))))

    def forced(self, asked: Asked, hooks: Sequence[str]) -> Forced | None:
        """Prompts and answers for runs in which little is changed; None where these need the model's own forward."""
        if not (is_plain(self.model) and can_change(list(hooks)) and bool(asked.mask.all())):
            return None
        n_answers, n_tokens = self._rows(asked)
        return Forced(self.model, asked.tokens, asked.answers[:n_answers, :, : n_tokens - 1])

    def changed(self, asked: Asked, forced: Forced, changes: Mapping[str, Change], copies: int) -> Values:
        """The quantity under changes at the answer position, but for what is the same in all copies."""
        return self._of_logits(asked, forced.changed(changes, copies))

    def _of_logits(self, asked: Asked, logits: Float[Tensor, "copy answer batch pos d_vocab"]) -> Values:
        """The quantity from logits at the answer's positions; where there is one of them, from the first tokens."""
        copies, n_tokens = len(logits), logits.shape[3]
        if self.metric is not None:
            last = logits[:, 0, :, -1].flatten(0, 1)
            return _numbers(_called(self.metric, last, asked.items * copies), copies, len(asked.index))
        if n_tokens == 1:  # both answers behind the same position: what is common to both falls out
            ids = asked.answers[:, None, :, :1].expand(-1, copies, -1, -1)
            memorized, rule = (logits[:, 0, :, 0].gather(-1, each)[..., 0] for each in ids)
            return memorized - rule
        wanted = asked.answers[None, ..., None].expand(copies, -1, -1, -1, -1)
        said = logits.gather(-1, wanted)[..., 0] - logits.logsumexp(-1)
        both = (said * asked.counts).sum(-1)
        return both[:, 0] - both[:, 1]

    def _rows(self, asked: Asked) -> tuple[int, int]:
        """Rows of each prompt, and tokens behind all but the last of it that are run."""
        longest = asked.answers.shape[2]
        return (1, 1) if self.metric is not None or longest == 1 else (2, longest)


def answered(
    model: LensModel, asked: Asked, answers: Int[Tensor, "answer batch token"], hooks: Hooks, *, copies: int = 1
) -> Float[Tensor, "row pos d_vocab"]:
    """Logits behind prompts and behind each token that is fed in after them, under hooks.

    Args:
        model: A lens model.
        asked: Prompts.
        answers: Tokens that are fed in, of one answer or of several.
        hooks: They see rows ``[copy, answer, batch]`` flattened, as the logits are.
        copies: How often to run all of it.
    """
    n_answers = len(answers)
    last = asked.tokens[None, :, -1:].expand(n_answers, -1, -1)
    new = torch.cat([last, answers], dim=2).flatten(0, 1)
    n_tokens = new.shape[1]
    if asked.past is None:
        new = torch.cat([asked.tokens[:, :-1].repeat(n_answers, 1), new], dim=1)
    tokens = new.repeat(copies, 1)
    mask = torch.ones_like(tokens)
    past = None
    if asked.past is None:
        mask[:, : asked.mask.shape[1]] = asked.mask.repeat(n_answers * copies, 1)
    else:
        past = asked.past.repeated(n_answers * copies, room=n_tokens)
    with model.hooks(fwd_hooks=hooks):
        return last_logits(model, tokens, mask, past, n=n_tokens).float()


def _called(metric: Metric, logits: Tensor, items: Sequence[Item]) -> Any:
    try:
        return metric(logits, items)
    except TypeError as error:
        raise ModelError(
            "metric(logits, items)",
            expected="a function of logits, [row, d_vocab], and the rows' items",
            received=f"{getattr(metric, '__name__', type(metric).__name__)}, which says: {error}",
            fix="Take both arguments, and reduce over the vocabulary alone.",
        ) from error


def _numbers(values: Any, copies: int, batch: int) -> Values:
    if not isinstance(values, Tensor) or values.shape != (copies * batch,):
        received = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ModelError(
            "metric(logits, items)",
            expected=f"a tensor of one number a row, [{copies * batch}]",
            received=str(received),
            fix="Reduce over the vocabulary alone, e.g. logits[:, yes] - logits[:, no].",
        )
    return values.view(copies, batch)

"""What causal methods explain: how much likelier a prompt makes the memorized answer than the rule's.

Prompts are run up to their last token once; what follows is run as often as there are interventions. Does not
intervene.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.core.errors import ModelError, PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import LensModel
from memgen_lens.models.cache import Past
from memgen_lens.models.step import forward, last_logits, rows_at_once, run_before
from memgen_lens.models.tokens import Batch, in_batches

Metric = Callable[[Tensor, Sequence[Item]], Tensor]
"""A user's own quantity: logits ``[row, d_vocab]`` behind the prompts, and the rows' items -> one number a row."""
Hooks = list[tuple[Any, Callable[..., Any]]]
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

    def asked(self, pairs: PromptPairs, side: str, answers: "Answers", *, batch_size: int) -> Iterator[Asked]:
        """The prompts of one side of the pairs, batch by batch, run up to their last token."""
        items: tuple[Item, ...] = getattr(pairs, side)
        prompts = [item.prompt for item in items]
        room = max((len(ids) for each in answers for ids in each), default=1)
        batches = in_batches(
            self.model,
            prompts,
            batch_size=batch_size,
            tokens_at_once=TOKENS_AT_ONCE,
            room=room,
            prepend_bos=pairs.prepend_bos,
        )
        for batch in batches:
            ids, counts = _padded([answers[i] for i in batch.index], batch.tokens.device)
            past = run_before(self.model, batch.tokens, batch.mask)
            yield Asked(batch.index, tuple(items[i] for i in batch.index), batch.tokens, batch.mask, ids, counts, past)

    def copies(self, asked: Asked) -> int:
        """How many interventions fit into one forward pass."""
        length = asked.tokens.shape[1] + asked.answers.shape[2]
        run = asked.answers.shape[2] if asked.past is not None else length
        rows = rows_at_once(self.model, length, cached=asked.past is not None, n=self._rows(asked)[1])
        return max(1, min(rows, TOKENS_AT_ONCE // run) // (self._rows(asked)[0] * len(asked.index)))

    def of(self, asked: Asked, hooks: Hooks = [], *, copies: int = 1) -> Float[Tensor, "copy batch"]:  # noqa: B006
        """The quantity at prompts, each in as many copies, under hooks.

        Hooks see rows ``[copy, answer, batch]`` flattened, with one or both answers, and the positions that are run:
        the answer position is ``asked.at``.
        """
        n_answers, n_tokens = self._rows(asked)
        answers = asked.answers[:n_answers]
        last = asked.tokens[None, :, -1:].expand(n_answers, -1, -1)
        new = torch.cat([last, answers[:, :, : n_tokens - 1]], dim=2).flatten(0, 1)
        if asked.past is None:
            new = torch.cat([asked.tokens[:, :-1].repeat(n_answers, 1), new], dim=1)
        tokens = new.repeat(copies, 1)
        mask = torch.ones_like(tokens)
        past = None
        if asked.past is None:
            mask[:, : asked.mask.shape[1]] = asked.mask.repeat(n_answers * copies, 1)
        else:
            past = asked.past.repeated(n_answers * copies, room=n_tokens)
        with self.model.hooks(fwd_hooks=hooks):
            logits = last_logits(self.model, tokens, mask, past, n=n_tokens).float()
        if self.metric is not None:
            return _numbers(self.metric(logits[:, -1], asked.items * copies), copies, len(asked.index))
        logits = logits.unflatten(0, (copies, n_answers, len(asked.index)))
        if n_tokens == 1:  # both answers behind the same position: what is common to both falls out
            first = [logits[:, 0, :, 0].gather(-1, ids[None].expand(copies, -1, -1))[..., 0] for ids in asked.answers]
            return first[0] - first[1]
        wanted = asked.answers[None, ..., None].expand(copies, -1, -1, -1, -1)
        said = logits.gather(-1, wanted)[..., 0] - logits.logsumexp(-1)
        both = (said * asked.counts).sum(-1)
        return both[:, 0] - both[:, 1]

    def _rows(self, asked: Asked) -> tuple[int, int]:
        """Rows of each prompt, and tokens behind all but the last of it that are run."""
        longest = asked.answers.shape[2]
        return (1, 1) if self.metric is not None or longest == 1 else (2, longest)


Answers = list[tuple[list[int], list[int]]]
"""Tokens of the memorized answer and of the rule's, of each pair."""


def answers_of(model: LensModel, pairs: PromptPairs, *, batch_size: int, call: str) -> Answers:
    """Tokens of both answers of each pair, as they are behind the pair's prompts.

    A user's answers may lack the space that a model puts before a word: of the two spellings that is taken whose first
    token the model finds likelier, behind the prompt on which it gives this answer.

    Raises:
        PairsError: A pair lacks an answer.
        ModelError: An answer has no token.
    """
    texts = [(item.memorized_answer, item.rule_answer) for item in pairs.memorized]
    lacking = next((i for i, both in enumerate(texts) if None in both), None)
    if lacking is not None:
        raise PairsError(
            call,
            expected="both answers of each pair",
            received=f"a pair without {'a memorized' if texts[lacking][0] is None else 'the rule’s'} answer: "
            f"{pairs.memorized[lacking].prompt[:80]!r}",
            fix="Name them: PromptPairs.from_strings(memorized_answers=[...], rule_answers=[...]); or give metric=.",
        )
    spelled = [[_ids(model, str(text), call) for text in both] for both in texts]
    for place, side in enumerate(("memorized", "generalized")):
        items = getattr(pairs, side)
        bare = [i for i, item in enumerate(items) if item.split == "user" and _is_bare(item, texts[i][place])]
        spaced = {i: ids for i in bare if (ids := _known(model, f" {texts[i][place]}"))}
        own = list(spaced)
        prompts = [items[i].prompt for i in own]
        for batch in in_batches(model, prompts, batch_size=batch_size, prepend_bos=pairs.prepend_bos):
            for i, logits in zip((own[j] for j in batch.index), _next_logits(model, batch), strict=True):
                if logits[spaced[i][0]] > logits[spelled[i][place][0]]:
                    spelled[i][place] = spaced[i]
    return [(memorized, rule) for memorized, rule in spelled]


@torch.inference_mode()
def _next_logits(model: LensModel, batch: Batch) -> Float[np.ndarray, "batch d_vocab"]:
    return forward(model, batch.tokens, batch.mask).float().cpu().numpy()


def _is_bare(item: Item, answer: Any) -> bool:
    """Whether a space may stand between a prompt and an answer that has none."""
    return not (item.prompt[-1:].isspace() or str(answer)[:1].isspace())


def _known(model: LensModel, text: str) -> list[int]:
    """Tokens of a text; none where the tokenizer lacks a part of it."""
    ids = list(model.tokenizer.encode(text, add_special_tokens=False))
    return [] if model.tokenizer.unk_token_id in ids else ids


def _ids(model: LensModel, text: str, call: str) -> list[int]:
    ids = list(model.tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ModelError(
            call,
            expected="answers of at least one token",
            received=f"{text!r}, of which the model's tokenizer makes none",
            fix="Give other answers, or a metric= of your own.",
        )
    return ids


def _padded(
    answers: Answers, device: torch.device
) -> tuple[Int[Tensor, "2 batch token"], Bool[Tensor, "2 batch token"]]:
    width = max((len(ids) for both in answers for ids in both), default=1)
    ids = torch.zeros(2, len(answers), width, dtype=torch.long, device=device)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for i, both in enumerate(answers):
        for answer, one in enumerate(both):
            ids[answer, i, : len(one)] = torch.tensor(one)
            counts[answer, i, : len(one)] = True
    return ids, counts


def _numbers(values: Any, copies: int, batch: int) -> Float[Tensor, "copy batch"]:
    if not isinstance(values, Tensor) or values.shape != (copies * batch,):
        received = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ModelError(
            "metric(logits, items)",
            expected=f"a tensor of one number a row, [{copies * batch}]",
            received=str(received),
            fix="Reduce over the vocabulary alone, e.g. logits[:, yes] - logits[:, no].",
        )
    return values.view(copies, batch)

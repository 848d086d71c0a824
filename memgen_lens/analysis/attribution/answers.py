"""Both answers of each pair as the tokens that stand behind its prompts.

Does not run answers: see `contrast`.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.core.errors import ModelError, PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.types import LensModel
from memgen_lens.models.step import forward, rows_at_once
from memgen_lens.models.tokens import Batch, in_batches

Answers = list[tuple[list[int], list[int]]]
"""Tokens of the memorized answer and of the rule's, of each pair."""


def answers_of(model: LensModel, pairs: PromptPairs, *, batch_size: int, call: str) -> Answers:
    """Tokens of both answers of each pair, as they are behind the pair's prompts.

    A user's answers may lack the space that a model puts before a word: of the two spellings that is taken whose first
    token the model finds likelier, behind the prompt on which it gives this answer. Where one answer begins with the
    other, both end in the end-of-text token.

    Raises:
        PairsError: A pair lacks an answer, or its answers are the same tokens.
        ModelError: An answer has no token, or one that the tokenizer lacks.
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
        for whole in in_batches(model, prompts, batch_size=batch_size, prepend_bos=pairs.prepend_bos):
            for batch in whole.parts(rows_at_once(model, whole.tokens.shape[1], cached=False)):
                for i, logits in zip((own[j] for j in batch.index), _next_logits(model, batch), strict=True):
                    if logits[spaced[i][0]] > logits[spelled[i][place][0]]:
                        spelled[i][place] = spaced[i]
    return [_told_apart(model, both, texts[i], call) for i, both in enumerate(spelled)]


def _told_apart(
    model: LensModel, both: list[list[int]], texts: tuple[Any, ...], call: str
) -> tuple[list[int], list[int]]:
    """Both answers; where one begins with the other, each with the end-of-text token, by which they part."""
    memorized, rule = both
    if memorized == rule:
        raise PairsError(
            call,
            expected="two answers that the model's tokenizer tells apart",
            received=f"{texts[0]!r} and {texts[1]!r}, both of tokens {rule}",
            fix="Give other answers, or a metric= of your own.",
        )
    shorter = min(len(memorized), len(rule))
    if memorized[:shorter] != rule[:shorter]:
        return memorized, rule
    eos = model.tokenizer.eos_token_id
    return [*memorized, eos], [*rule, eos]


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
    ids = _known(model, text)
    if not ids:
        raise ModelError(
            call,
            expected="answers of tokens that the model's tokenizer has",
            received=f"{text!r}, of which it makes none, or unknown ones",
            fix="Give other answers, or a metric= of your own.",
        )
    return ids


def padded(
    answers: Answers, device: torch.device
) -> tuple[Int[Tensor, "2 batch token"], Bool[Tensor, "2 batch token"]]:
    """Tokens of the memorized answers and of the rule's, filled up with zeros, and which of them are tokens."""
    width = max((len(ids) for both in answers for ids in both), default=1)
    ids = torch.zeros(2, len(answers), width, dtype=torch.long, device=device)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for i, both in enumerate(answers):
        for answer, one in enumerate(both):
            ids[answer, i, : len(one)] = torch.tensor(one)
            counts[answer, i, : len(one)] = True
    return ids, counts

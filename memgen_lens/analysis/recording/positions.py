"""Prompts aligned at their end, where the answer position is, and what stands at each position.

Does not run the model.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from memgen_lens.core.items import Item
from memgen_lens.core.pairs import MINIMUM_PAIRS
from memgen_lens.core.position_records import PositionTokens
from memgen_lens.core.types import LensModel
from memgen_lens.models.tokens import tokenized


def aligned_tokens(
    model: LensModel, items: Sequence[Item], *, prepend_bos: bool | None
) -> Int[np.ndarray, "prompt pos"]:
    """Token ids of prompts, padded on the left with -1: the last column is the answer position."""
    tokens, lengths = tokenized(model, [item.prompt for item in items], prepend_bos=prepend_bos)
    rows, width = tokens.cpu().numpy(), tokens.shape[1]
    place = np.arange(width) - (width - lengths.numpy()[:, None])
    return np.where(place >= 0, np.take_along_axis(rows, place % width, axis=1), -1)


def lengths_of(tokens: Int[np.ndarray, "prompt pos"]) -> Int[np.ndarray, " prompt"]:
    """Positions of each prompt."""
    return (tokens >= 0).sum(1)


def held_positions(lengths: Int[np.ndarray, " prompt"], at_least: int = MINIMUM_PAIRS) -> int:
    """How many positions, counted from the end, so many prompts have; 0 where there are fewer prompts."""
    return int(np.sort(lengths)[-at_least]) if len(lengths) >= at_least else 0


def tokens_at(
    model: LensModel,
    memorized: Int[np.ndarray, "pair pos"],
    generalized: Int[np.ndarray, "pair other_pos"],
    n_positions: int,
) -> PositionTokens:
    """What stands at the last ``n_positions`` positions of both prompts of pairs, each of which some pair has."""
    mem, gen = memorized[:, -n_positions:], generalized[:, -n_positions:]
    there = (mem >= 0) & (gen >= 0)
    n = there.sum(0)
    sides = [
        [_most_frequent(model, side[there[:, column], column]) for column in range(n_positions)] for side in (mem, gen)
    ]
    (of_mem, mem_share), (of_gen, gen_share) = (zip(*side, strict=True) for side in sides)
    differing = ((mem != gen) & there).sum(0) / n
    return PositionTokens(of_mem, of_gen, np.array(mem_share), np.array(gen_share), differing, n)


def _most_frequent(model: LensModel, ids: Int[np.ndarray, " prompt"]) -> tuple[str, float]:
    distinct, counts = np.unique(ids, return_counts=True)
    text = model.tokenizer.decode([int(distinct[counts.argmax()])], clean_up_tokenization_spaces=False)
    return text, float(counts.max() / len(ids))

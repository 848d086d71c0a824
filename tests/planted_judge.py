"""A task of the planted model's prompts, for what asks a task for held-out prompts; see `planted`."""

from collections.abc import Sequence
from typing import Any

import planted

from memgen_lens.core.items import Item


class PlantedTask:
    """Prompts with ``G``, whose right answer is the rule's, and with ``M``, whose right answer is what recall gives.

    Steering towards generalization spoils the latter, towards memorization the former.

    Args:
        validation: How many prompts with ``G`` and with ``M``.
        heldout: Likewise.
        names: Tasks that the prompts are said to be of, in turn.
    """

    max_answer_tokens = 2

    def __init__(
        self, validation: tuple[int, int] = (6, 2), heldout: tuple[int, int] = (12, 4), names: Sequence[str] = ("",)
    ) -> None:
        self.splits = {
            "validation": _items(validation, "validation", names),
            "heldout": _items(heldout, "heldout", names),
        }

    def items(self, split: str) -> tuple[Item, ...]:
        return self.splits[split]

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        return ()

    def classify(self, item: Item, output: str) -> Any:
        return item.classify(output)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        return output == planted.MEMORY


def _items(counts: tuple[int, int], split: str, names: Sequence[str]) -> tuple[Item, ...]:
    seed = 100 if split == "validation" else 200
    texts = [
        (text, answer)
        for marker, answer, n in zip("GM", (planted.RULE, planted.MEMORY), counts, strict=True)
        for text in planted.prompts(marker, n, seed=seed + ord(marker))
    ]
    return tuple(
        Item(key, split, text, answer, None, names[key % len(names)]) for key, (text, answer) in enumerate(texts)
    )

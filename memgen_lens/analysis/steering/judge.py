"""Judge what a model says to the prompts of pairs: by their task, or by a user's own answers.

Does not steer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from memgen_lens.behavior import complete
from memgen_lens.core.items import Item
from memgen_lens.core.pairs import MINIMUM_PAIRS, PromptPairs
from memgen_lens.core.types import Behavior, Direction, LensModel

USER_MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Judge:
    """The pairs with their answers, and the classes of outputs.

    Attributes:
        pairs: Pairs whose items name both answers.
        task: The task, or None.
        max_new_tokens: Tokens that the longest answer needs.
    """

    pairs: PromptPairs
    task: Any | None
    max_new_tokens: int

    @classmethod
    def of(cls, model: LensModel, task: Any | None, pairs: PromptPairs, *, batch_size: int) -> "Judge":
        """Fill in answers that a user's pairs do not name from what the unsteered model says."""
        if task is not None:
            return cls(pairs, task, task.max_answer_tokens)
        answers = [a for item in pairs.memorized for a in (item.rule_answer, item.memorized_answer) if a is not None]
        longest = max((len(model.tokenizer.encode(a, add_special_tokens=False)) + 1 for a in answers), default=0)
        budget = longest if len(answers) == 2 * len(pairs) else max(longest, USER_MAX_NEW_TOKENS)

        def said(items: Sequence[Item]) -> list[str]:
            return complete(model, [i.prompt for i in items], max_new_tokens=budget, batch_size=batch_size)

        def fill(items: Sequence[Item], rule: list[str], recall: list[str]) -> tuple[Item, ...]:
            return tuple(
                replace(item, rule_answer=item.rule_answer or r, memorized_answer=item.memorized_answer or m)
                for item, r, m in zip(items, rule, recall, strict=True)
            )

        if len(answers) < 2 * len(pairs):
            rule, recall = said(pairs.generalized), said(pairs.memorized)
            pairs = replace(
                pairs,
                memorized=fill(pairs.memorized, rule, recall),
                generalized=fill(pairs.generalized, rule, recall),
            )
        return cls(pairs, None, budget)

    def behavior(self, item: Item, output: str) -> Behavior:
        """The class of an output."""
        return self.task.classify(item, output) if self.task is not None else item.classify(output)

    def has_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output has the form of a memorized answer; without a task, whether it is the item's own."""
        if self.task is not None:
            return self.task.is_memorized_form(item, output)
        return output == item.memorized_answer

    def flipping(
        self, model: LensModel, index: Int[np.ndarray, " index"], *, batch_size: int
    ) -> Int[np.ndarray, " kept"]:
        """The pairs whose prompts do show, unsteered, what they are labelled with; only these can be shifted.

        Raises:
            PairsError: Fewer than 8 of them do.
        """

        def shows(items: tuple[Item, ...], behavior: Behavior) -> np.ndarray:
            asked = [items[i] for i in index]
            outputs = complete(
                model, [i.prompt for i in asked], max_new_tokens=self.max_new_tokens, batch_size=batch_size
            )
            return np.array([self.behavior(i, o) is behavior for i, o in zip(asked, outputs, strict=True)], dtype=bool)

        kept = index[
            shows(self.pairs.memorized, Behavior.MEMORIZATION) & shows(self.pairs.generalized, Behavior.GENERALIZATION)
        ]
        self.pairs.require(MINIMUM_PAIRS, len(kept), call="steering pairs that flip unsteered")
        return kept

    def side(self, toward: Direction, index: Int[np.ndarray, " index"]) -> list[Item]:
        """The prompts to be steered towards a behaviour: those that show the other one."""
        items = self.pairs.memorized if toward == "generalization" else self.pairs.generalized
        return [items[i] for i in index]

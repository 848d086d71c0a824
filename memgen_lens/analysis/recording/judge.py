"""Judge what a model says to the prompts of pairs: by their task, or by a user's own answers.

Does not steer, nor know who does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from memgen_lens.behavior import answer_tokens, complete
from memgen_lens.core.errors import PairsError
from memgen_lens.core.items import Item
from memgen_lens.core.matching import classify, cut, shown
from memgen_lens.core.pairs import MINIMUM_PAIRS, PromptPairs
from memgen_lens.core.types import Behavior, Direction, LensModel

USER_MAX_NEW_TOKENS = 16
WHITE_SPACE_TOKENS = 2
"""Room for line breaks before an answer, or for its tokens being others behind a space."""
N_EXAMPLES = 3


@dataclass(frozen=True)
class Judge:
    """The pairs with their answers, and the classes of outputs.

    Attributes:
        pairs: Pairs whose items name both answers.
        task: The task, or None.
        max_new_tokens: Tokens that the longest answer needs.
        progress: Whether progress is shown while prompts are completed.
    """

    pairs: PromptPairs
    task: Any | None
    max_new_tokens: int
    progress: bool = False

    @classmethod
    def of(
        cls, model: LensModel, task: Any | None, pairs: PromptPairs, *, batch_size: int, progress: bool = False
    ) -> "Judge":
        """Fill in answers that a user's pairs do not name from what the unsteered model says.

        Raises:
            PairsError: A task judges, and the pairs say how to judge too.
        """
        if task is not None:
            _refuse_two_judges(pairs)
            return cls(pairs, task, answer_tokens(model, task), progress)
        answers = [a for item in pairs.memorized for a in (item.rule_answer, item.memorized_answer) if a is not None]
        all_given = len(answers) == 2 * len(pairs)
        budget = pairs.max_new_tokens
        if budget is None:
            budget = max((len(model.tokenizer.encode(a, add_special_tokens=False)) + 1 for a in answers), default=0)
            if pairs.match == "prefix":
                budget += WHITE_SPACE_TOKENS
            if callable(pairs.match) or not all_given:
                budget = max(budget, USER_MAX_NEW_TOKENS)
        if not all_given:
            rule, recall = (
                [_answer_said(o, pairs) for o in _unsteered(model, items, pairs, budget, batch_size=batch_size)]
                for items in (pairs.generalized, pairs.memorized)
            )
            pairs = replace(
                pairs,
                memorized=_fill(pairs.memorized, rule, recall),
                generalized=_fill(pairs.generalized, rule, recall),
            )
        return cls(pairs, None, budget, progress)

    def said(self, output: str) -> str:
        """What counts of an output: without a task, all before the first text that ends a completion."""
        return output if self.task is not None else cut(output, self.pairs.stop)

    def behavior(self, item: Item, output: str) -> Behavior:
        """The class of an output."""
        if self.task is not None:
            return self.task.classify(item, output)
        return classify(item, self.said(output), self.pairs.match)

    def has_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output has the form of a memorized answer; without a task, whether it is the item's own."""
        if self.task is not None:
            return self.task.is_memorized_form(item, output)
        return self.behavior(item, output) is Behavior.MEMORIZATION

    def flipping(
        self, model: LensModel, index: Int[np.ndarray, " index"], *, batch_size: int
    ) -> Int[np.ndarray, " kept"]:
        """The pairs whose prompts do show, unsteered, what they are labelled with; only these can be shifted.

        Raises:
            PairsError: Fewer than 8 of them do; the error shows three prompts, what was expected and what was said.
        """
        right, wrong = self.shown(model, index, batch_size=batch_size)
        if right.sum() < MINIMUM_PAIRS:
            examples = [wrong[p] for p in sorted(wrong)[:N_EXAMPLES]]
            raise PairsError(
                "steering pairs that flip unsteered",
                expected=f"at least {MINIMUM_PAIRS} pairs",
                received=f"{right.sum()} of {len(index)} whose prompts show what they are labelled with",
                fix=self._way_out(index) + "".join(f"\n  {text}" for text in examples),
            )
        return index[right]

    def shown(
        self, model: LensModel, index: Int[np.ndarray, " index"], *, batch_size: int
    ) -> tuple[Bool[np.ndarray, " index"], dict[int, str]]:
        """Whether both prompts of a pair show, unsteered, what they are labelled with; a line on each that does not."""
        right = np.ones(len(index), dtype=bool)
        wrong: dict[int, str] = {}
        for name, aim in (("memorized", Behavior.MEMORIZATION), ("generalized", Behavior.GENERALIZATION)):
            asked = [getattr(self.pairs, name)[i] for i in index]
            how = {"batch_size": batch_size, "progress": self.progress}
            outputs = _unsteered(model, asked, self.pairs, self.max_new_tokens, **how)
            shows = np.array([self.behavior(i, o) is aim for i, o in zip(asked, outputs, strict=True)], dtype=bool)
            for p in np.flatnonzero(~shows):
                wrong.setdefault(int(p), _example(asked[p], name, outputs[p]))
            right &= shows
        return right, wrong

    def _way_out(self, index: Int[np.ndarray, " index"]) -> str:
        """What to change where too few pairs show what they are labelled with."""
        if self.task is not None:
            return "Train longer or with more memorized items, or find the pairs with this very model."
        answers = [(i.rule_answer, i.memorized_answer) for i in (self.pairs.memorized[p] for p in index)]
        same = sum(shown(str(r), self.pairs.match) == shown(str(m), self.pairs.match) for r, m in answers)
        contrast = f"On {same} of them the model says the same to both prompts, so that nothing can flip. " * (same > 0)
        return (
            f"{contrast}Give the answers as the model words them, a looser match=, stop= where it goes on after "
            "its answer, or other prompts."
        )

    def side(self, toward: Direction, index: Int[np.ndarray, " index"]) -> list[Item]:
        """The prompts to be steered towards a behaviour: those that show the other one."""
        items = self.pairs.memorized if toward == "generalization" else self.pairs.generalized
        return [items[i] for i in index]


def _unsteered(
    model: LensModel,
    items: Sequence[Item],
    pairs: PromptPairs,
    max_new_tokens: int,
    *,
    batch_size: int,
    progress: bool = False,
) -> list[str]:
    return complete(
        model,
        [i.prompt for i in items],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop=pairs.stop,
        prepend_bos=pairs.prepend_bos,
        progress=progress,
    )


def _answer_said(output: str, pairs: PromptPairs) -> str:
    """What an unsteered output gives as its answer: under ``"prefix"`` its first line; more is rarely said again."""
    return output.strip().partition("\n")[0].strip() if pairs.match == "prefix" else output


def _fill(items: Sequence[Item], rule: Sequence[str], recall: Sequence[str]) -> tuple[Item, ...]:
    return tuple(
        replace(
            item,
            rule_answer=r if item.rule_answer is None else item.rule_answer,
            memorized_answer=m if item.memorized_answer is None else item.memorized_answer,
        )
        for item, r, m in zip(items, rule, recall, strict=True)
    )


def _refuse_two_judges(pairs: PromptPairs) -> None:
    if pairs.match != "prefix" or pairs.stop or pairs.max_new_tokens is not None:
        raise PairsError(
            "steering with a task",
            expected="pairs without match=, stop= and max_new_tokens=",
            received="a task, which judges outputs itself, and pairs that say how to judge",
            fix="Give task=None, or leave these arguments of the pairs away.",
        )


def _example(item: Item, side: str, output: str) -> str:
    answer = str(item.memorized_answer if side == "memorized" else item.rule_answer)
    expected, said = (_short(text, keep="start", width=24) for text in (answer, output))
    return f"{side} {_short(item.prompt)}:\n    expected {expected}, said {said}"


def _short(text: str, *, keep: Literal["start", "end"] = "end", width: int = 60) -> str:
    """A text that fits a line: the end of a prompt is where the question is, the start of an output the answer."""
    if len(text) <= width:
        return repr(text)
    return repr(f"{text[: width - 1]}…" if keep == "start" else f"…{text[1 - width :]}")

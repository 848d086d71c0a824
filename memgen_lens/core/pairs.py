"""Prompts on which a model recalls, each beside a rephrasing on which it computes.

Does not know how they were found: see `memgen_lens.analysis.recording.pairs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.chats import chats, render_chats
from memgen_lens.core.dealing import item_keys, same_prompts, split_items
from memgen_lens.core.errors import PairsError, SettingsError, suggest
from memgen_lens.core.items import Item
from memgen_lens.core.matching import Match, as_stops, shown

PairSplit = Literal["select", "tune", "test"]
MINIMUM_PAIRS = 8
"""Fewer pairs than this in a split carry no statistics worth reading."""


@dataclass(frozen=True)
class PromptPairs:
    """Prompts on which the model recalls, each beside a rephrasing on which it computes.

    Attributes:
        memorized: The recalling side, one item a pair.
        generalized: The computing side, one item a pair.
        split: ``"select"``, ``"tune"`` or ``"test"`` of each pair; all pairs of one item share a split.
        n_items: Items that were asked, flipping or not.
        n_flipped: Items with at least one pair; ``n_flipped / n_items`` is the flip rate.
        n_items_by_task: Items that were asked of each task; empty where that is not known.
        prepend_bos: Whether a begin-of-text token is put before each prompt that does not begin with it; None for what
            the model does by itself (`memgen_lens.complete`).
        match: How an output is held against an answer where no task judges: ``"prefix"``, ``"exact"`` or a function
            (`from_strings`).
        stop: Texts that end a completion where no task judges.
        max_new_tokens: Tokens generated at most where no task judges; None: as many as the answers need.
    """

    memorized: tuple[Item, ...]
    generalized: tuple[Item, ...]
    split: Shaped[np.ndarray, " pair"]
    n_items: int
    n_flipped: int
    n_items_by_task: Mapping[str, int] = field(default_factory=dict)
    prepend_bos: bool | None = None
    match: Match = "prefix"
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.memorized)

    @property
    def item(self) -> Int[np.ndarray, " pair"]:
        """The item key of each pair."""
        return np.array([item.key for item in self.memorized], dtype=np.int64)

    @classmethod
    @arguments(
        "PromptPairs.from_strings",
        error=PairsError,
        memorized=kinds.Lines,
        generalized=kinds.Lines,
        rule_answers=kinds.Lines | None,
        memorized_answers=kinds.Lines | None,
        items=kinds.Listing | None,
        prepend_bos=kinds.Flag | None,
        shares=kinds.Parts,
        seed=kinds.Seed,
        match=kinds.Callback | Literal["prefix", "exact"],
        stop=kinds.Texts,
        max_new_tokens=kinds.Count | None,
    )
    def from_strings(
        cls,
        memorized: Sequence[str],
        generalized: Sequence[str],
        *,
        rule_answers: Sequence[str] | None = None,
        memorized_answers: Sequence[str] | None = None,
        items: Sequence[Any] | None = None,
        prepend_bos: bool | None = None,
        shares: Sequence[float] = (0.4, 0.2),
        seed: int = 0,
        match: Match = "prefix",
        stop: str | Sequence[str] = (),
        max_new_tokens: int | None = None,
    ) -> "PromptPairs":
        """Pairs from a user's own prompts: pair p is ``memorized[p]`` beside ``generalized[p]``.

        Args:
            memorized: Prompts on which the model recalls.
            generalized: Prompts on which it computes, one for each of the others.
            rule_answers: What computing gives, one a pair. Without them, steering is judged against what the
                unsteered model itself says on the paired prompt: under ``match="prefix"`` its first line up to
                ``stop``, else all of it up to ``stop``. Where a model goes on after its answer, ``stop=["."]`` leaves
                the answer alone.
            memorized_answers: What recalling gives, one a pair; likewise optional.
            items: Which item each pair belongs to, as whole numbers or names; pairs of one item never part. Default:
                each pair its own. Pairs that share a prompt on either side are of one item whatever is said here: else
                what is chosen on one of them would be tested on the other.
            prepend_bos: Whether a begin-of-text token is put before each prompt that does not begin with it. Default:
                a HookedTransformer's or native Bridge's ``cfg.default_prepend_bos``; on another Bridge, what the
                Hugging Face model's own tokenizer does.
            shares: Shares of items in ``select`` and ``tune``; the rest is ``test``.
            seed: Seed of the split.
            match: When an output gives an answer. ``"prefix"``: white space at the ends stripped, it begins with the
                answer and then ends, or goes on with something other than a letter or digit; of two answers that it
                gives, the longer counts. ``"exact"``: it equals the answer to the letter. Or a function
                ``(item, output) -> bool``, called once for each answer of the pair, with an item that names this
                answer alone as ``item.answer``: ``lambda item, output: item.answer.lower() in output.lower()``. An
                output that a function finds to give both answers shows neither behaviour.
            stop: Texts that end a completion: it is cut before the first of them.
            max_new_tokens: Tokens generated at most. Default: what the longest answer needs, 16 where an answer is
                what the model says or where ``match`` is a function.

        Raises:
            PairsError: The lists are empty, of unequal length, or hold something other than text; the shares leave no
                pairs to test on; both answers of a pair are the same; ``match``, ``stop`` or ``max_new_tokens`` is
                none of the above.
        """
        lists = {
            "memorized": memorized,
            "generalized": generalized,
            "rule_answers": rule_answers,
            "memorized_answers": memorized_answers,
            "items": items,
        }
        call = "PromptPairs.from_strings"
        lengths = {name: len(values) for name, values in lists.items() if values is not None}
        if not len(memorized):
            raise PairsError(
                call,
                expected="at least one pair",
                received="empty lists",
                fix="Give one memorized and one generalized prompt a pair.",
            )
        if len(set(lengths.values())) > 1:
            raise PairsError(
                call,
                expected="lists of one length, one entry a pair",
                received=", ".join(f"{n} {name}" for name, n in lengths.items()),
                fix="Pair p is memorized[p] beside generalized[p]: drop or add prompts until they match.",
            )
        named = range(len(memorized)) if items is None else item_keys(items, call)
        keys = same_prompts(named, memorized, generalized)
        rule = rule_answers if rule_answers is not None else [None] * len(memorized)
        recall = memorized_answers if memorized_answers is not None else [None] * len(memorized)
        stops = as_stops(stop, call=call)
        _require_two_answers(rule, recall, match, call=call)
        rows = list(zip(keys, memorized, generalized, rule, recall, strict=True))
        return cls(
            memorized=tuple(Item(key, "user", prompt, r, m) for key, prompt, _, r, m in rows),
            generalized=tuple(Item(key, "user", prompt, r, m) for key, _, prompt, r, m in rows),
            split=split_items(keys, shares=shares, seed=seed),
            n_items=len(set(keys)),
            n_flipped=len(set(keys)),
            prepend_bos=prepend_bos,
            match=match,
            stop=stops,
            max_new_tokens=max_new_tokens,
        )

    @classmethod
    @arguments(
        "PromptPairs.from_chats",
        error=PairsError,
        memorized=chats("PromptPairs.from_chats", "memorized"),
        generalized=chats("PromptPairs.from_chats", "generalized"),
    )
    def from_chats(
        cls,
        memorized: Sequence[Sequence[Mapping[str, Any]]],
        generalized: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tokenizer: Any,
        **others: Any,
    ) -> "PromptPairs":
        """Pairs from a user's own chats, as the tokenizer's chat template writes them.

        Args:
            memorized: Chats on which the model recalls, e.g. ``[[{"role": "user", "content": "Who wrote Emma?"}]]``.
                The prompt ends where the assistant's turn opens; where the last message is the assistant's, the model
                goes on with it.
            generalized: Chats on which it computes, one for each of the others.
            tokenizer: A tokenizer with a chat template, or the model that has it.
            others: All further arguments of `from_strings`.

        Raises:
            ModelError: There is no tokenizer with a chat template.
            PairsError: A chat is no list of messages, the template refuses it, or what `from_strings` refuses.
        """
        call = "PromptPairs.from_chats"
        sides = {"memorized": memorized, "generalized": generalized}
        prompts = {name: render_chats(side, tokenizer, name=name, call=call) for name, side in sides.items()}
        return cls.from_strings(**prompts, **others)

    @arguments(
        "PromptPairs.of",
        split=kinds.PairSplitName,
    )
    def of(self, split: PairSplit) -> Int[np.ndarray, " index"]:
        """Indices of the pairs of one split.

        Raises:
            PairsError: The split holds fewer than 8 pairs.
        """
        index = np.flatnonzero(self.split == split)
        self.require(MINIMUM_PAIRS, len(index), call=f"pairs of split {split!r}")
        return index

    @arguments("PromptPairs.require", at_least=kinds.Number0, n=kinds.Number0, call=kinds.Text)
    def require(self, at_least: int, n: int, *, call: str) -> None:
        """Refuse too few pairs, saying how many prompts flipped and what to change.

        Raises:
            PairsError: ``n`` is below ``at_least``.
        """
        if n < at_least:
            # Whether a user's own prompts flip is not known here, and nothing was trained.
            own = all(item.split == "user" for item in self.memorized) and len(self) > 0
            flips = "" if own else f"{self.n_flipped} of {self.n_items} items flip, "
            train = "Train longer or with more memorized items so that more prompts flip when rephrased, "
            raise PairsError(
                call,
                expected=f"at least {at_least} pair{'s' if at_least > 1 else ''}",
                received=f"{n} ({flips}{len(self)} pairs in all)",
                fix=f"{'Give' if own else f'{train}give'} more pairs, or give this split a larger share of the items.",
            )

    @arguments(
        "PromptPairs.take",
        index=kinds.Index,
    )
    def take(self, index: Int[np.ndarray, " index"]) -> "PromptPairs":
        """The pairs at ``index``, in that order.

        Raises:
            SettingsError: An index is none, or beyond the pairs.
        """
        outside = index[(index < -len(self)) | (index >= len(self))]
        if len(outside):
            raise SettingsError(
                "PromptPairs.take",
                expected=f"places of pairs, below {len(self)}",
                received=str(outside[0]),
                fix="np.flatnonzero(mask) gives the places where a mask is true.",
            )
        return replace(
            self,
            memorized=tuple(self.memorized[i] for i in index),
            generalized=tuple(self.generalized[i] for i in index),
            split=self.split[index],
        )

    @arguments(
        "PromptPairs.of_task",
        name=kinds.Text,
    )
    def of_task(self, name: str) -> "PromptPairs":
        """The pairs of one task of a mixture, in their splits, with the numbers of items of that task.

        Raises:
            PairsError: No item of that task was asked.
        """
        asked = self.n_items_by_task or {item.task: 0 for item in self.memorized}
        if name not in asked:
            raise PairsError(
                "PromptPairs.of_task",
                expected="a task whose items were asked",
                received=repr(name),
                fix=suggest(name, asked),
            )
        mine = self.take(np.flatnonzero([item.task == name for item in self.memorized]))
        n_flipped = len(set(mine.item.tolist()))
        n_items = self.n_items_by_task.get(name, n_flipped)
        return replace(mine, n_items=n_items, n_flipped=n_flipped, n_items_by_task={name: n_items})

    def rows(self) -> list[dict[str, Any]]:
        """One flat line a pair, for ``pairs.jsonl``."""
        return [
            {
                "key": mem.key,
                "split": str(split),
                "memorized_prompt": mem.prompt,
                "generalized_prompt": gen.prompt,
                "rule_answer": gen.rule_answer,
                "memorized_answer": mem.memorized_answer,
            }
            for mem, gen, split in zip(self.memorized, self.generalized, self.split, strict=True)
        ]


def _require_two_answers(rule: Sequence[str | None], recall: Sequence[str | None], match: Any, *, call: str) -> None:
    """Refuse pairs whose two answers no output can tell apart."""
    for place, (r, m) in enumerate(zip(rule, recall, strict=True)):
        if r is not None and m is not None and shown(r, match) == shown(m, match):
            raise PairsError(
                call,
                expected="two answers a pair that differ",
                received=f"{r!r:.60} and {m!r:.60} as rule_answers[{place}] and memorized_answers[{place}]",
                fix="Drop such pairs: no output tells whether the model recalls or computes.",
            )

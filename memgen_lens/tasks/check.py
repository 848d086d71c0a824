"""The contract of a task, checked: what `memgen_lens.tasks.Task` promises to training and analysis.

For our own tasks and for a user's, as scikit-learn's ``check_estimator`` is for estimators. It samples: a text that
is generated rarely may go unseen, and whether a model can learn the task is not asked. What a text is in tokens is
looked at in `memgen_lens.tasks.check_tokens`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import MemgenError, TaskError, shortened
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Behavior, Split
from memgen_lens.tasks.check_tokens import Refuse, check_tokens, require_distinct_beginnings
from memgen_lens.tasks.task import SPLITS, Task
from memgen_lens.tasks.tokenizer import EOS, TokenizerLike

BASES: tuple[Split, ...] = ("memorized", "heldout", "validation")
"""Splits whose items are questions of their own; ``rephrased`` asks those of ``memorized`` again."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` looked at, none of it at fault.

    Attributes:
        task: Name of the task.
        n_items: Items in each split.
        n_rephrasings: Rephrasings of the memorized, held-out and validation items.
        n_generic: Generic items drawn, and training sequences beside them.
        n_texts: Different texts that were tokenized.
        longest_prompt: Tokens of the longest prompt seen.
        longest_answer: Tokens of the longest answer seen, its end-of-text token counted.
        longest_training: Tokens of the longest training sequence seen, its end-of-text token counted.
    """

    task: str
    n_items: dict[Split, int]
    n_rephrasings: int
    n_generic: int
    n_texts: int
    longest_prompt: int
    longest_answer: int
    longest_training: int


@arguments("check", tokenizer=TokenizerLike | None, n_generic=kinds.Count, seed=kinds.Seed)
def check(task: Any, *, tokenizer: Any = None, n_generic: int = 200, seed: int = 0) -> CheckReport:
    """Check that a task keeps the contract that `Task` documents; stop at the first breach.

    In this order: it can be made again from its settings, with the same items, and another seed gives others; items
    name their split and task, and have the answers that their split asks for, the memorized one never the rule's; a
    rephrasing changes the prompt and nothing else; no prompt is asked in two items, rephrased or not; generic items
    and training sequences follow from the generator and are none of those prompts; every text tokenizes and comes
    back, an answer's tokens behind a prompt's, within the lengths declared; words of a list begin with a token of their
    own; every output is exactly one behaviour.

    >>> from memgen_lens.tasks import Addition
    >>> check(Addition(n_memorized=20)).n_items["rephrased"]
    20

    Args:
        task: The task.
        tokenizer: A Hugging Face tokenizer that is to read the task's texts, as a pretrained model's (default: the
            task's own). What the task declares of lengths is of its own tokens; those found are in the report.
        n_generic: Generic items and training sequences to draw. One of them in a split is found only if it is drawn:
            draw more where prompts are many.
        seed: Seed of the draws.

    Returns:
        What was looked at, in numbers.

    Raises:
        TaskError: Says which promise is broken, by which item, and what to change.
    """
    if not isinstance(task, Task):
        raise TaskError(
            "check",
            expected="a task: an instance of a class that subclasses memgen_lens.tasks.Task",
            received=shortened(task),
            fix="Make one: check(Addition()).",
        )

    def refuse(expected: str, received: str, fix: str) -> TaskError:
        return TaskError(f"check({type(task).__name__})", expected=expected, received=received, fix=fix)

    if n_generic < 2:
        raise refuse("n_generic of at least 2", str(n_generic), "Raise it.")
    _check_settings(task, refuse)
    _check_items(task, refuse)
    rephrasings = {item: _rephrasings(task, item, refuse) for split in BASES for item in task.items(split)}
    _check_rephrased_split(task, rephrasings, refuse)
    owners = _owners(rephrasings, refuse)
    generic = _check_draws(task, task.draw_generic, Item, owners, n_generic, seed, refuse)
    training = _check_draws(task, task.draw_training, TrainingText, owners, n_generic, seed, refuse)
    asked = [*rephrasings, *(item for others in rephrasings.values() for item in others), *generic]
    lengths = check_tokens(task, tokenizer, asked, training, refuse)
    require_distinct_beginnings(task, task.tokenizer if tokenizer is None else tokenizer)
    for item in asked:
        _check_classification(task, item, refuse)
    return CheckReport(
        task=task.name,
        n_items={split: len(task.items(split)) for split in SPLITS},
        n_rephrasings=sum(map(len, rephrasings.values())),
        n_generic=n_generic,
        **lengths,
    )


def _check_settings(task: Task, refuse: Refuse) -> None:
    """The settings make the same task anew; another seed makes another one."""
    try:
        again = Task.from_settings(task.settings())
    except MemgenError as error:
        raise refuse(
            "settings that can be written as JSON and read back",
            str(error),
            "Make settings of plain values, and give the class a name that no other task has.",
        ) from error
    others = [split for split in SPLITS if again.splits.get(split) != task.splits.get(split)]
    if again != task or others:
        raise refuse(
            "the same settings to make the same task",
            f"{again!r} for {task!r}" if again != task else f"other items in {', '.join(others)}",
            "Let settings and seed alone decide: draw from np.random.default_rng(self.seed), and keep no set's order.",
        )
    seed = (getattr(task, "seed", 0) + 1) % (MAX_SEED + 1)
    if task.seeded(seed) != task and task.seeded(seed).splits == task.splits:
        raise refuse(
            "another seed to make other items",
            f"the same splits with seed={seed}",
            "Draw the items from a generator with the seed of the settings: np.random.default_rng(self.seed).",
        )


def _check_items(task: Task, refuse: Refuse) -> None:
    """Every split is there; its items name it and their task, and have the answers that it asks for."""
    if set(task.splits) != set(SPLITS) or not all(task.splits.values()):
        sizes = ", ".join(f"{split}: {len(items)}" for split, items in task.splits.items())
        raise refuse(f"splits {', '.join(SPLITS)}, none of them empty", sizes, "Fill in every split.")
    keys: set[int] = set()
    for split, items in task.splits.items():
        for item in items:
            if item.split != split:
                raise refuse(f"items of split {split!r} to say so", str(item), f"Make them with Item(split={split!r}).")
            _check_item(task, item, refuse, recalls=split in ("memorized", "rephrased"))
            if split != "rephrased" and item.key in keys:
                raise refuse(
                    "a key of its own for every item, which only its rephrasings share",
                    f"key {item.key} a second time, for {item.split} item {item.prompt!r}",
                    "Number the items, or make the key of what is asked.",
                )
            if split != "rephrased":
                keys.add(item.key)


def _check_item(task: Task, item: Item, refuse: Refuse, *, recalls: bool) -> None:
    """An item names its task, and has a rule's answer and, if it ``recalls``, another one."""
    where = f"{item.split} item {item.prompt!r}"
    if item.task not in task.task_names:
        raise refuse(
            f"items with task={' or '.join(map(repr, task.task_names))}",
            f"task={item.task!r} in {where}",
            "Make items with task=self.name.",
        )
    if not item.prompt or not item.rule_answer:
        raise refuse(
            "a prompt and a rule's answer for every item", str(item), "Give both; what has no answer is no item."
        )
    if recalls and not item.memorized_answer:
        raise refuse("a memorized answer", f"{item.memorized_answer!r} in {where}", "Give it one, also rephrased.")
    if recalls and item.memorized_answer == item.rule_answer:
        raise refuse(
            "a memorized answer that is not the rule's",
            f"{item.rule_answer!r} as both in {where}",
            "Draw the memorized answer again until it differs: the two behaviours could not be told apart.",
        )
    if not recalls and item.memorized_answer is not None:
        raise refuse(
            "memorized_answer=None where there is nothing to recall",
            f"{item.memorized_answer!r} in {where}",
            "Leave it None.",
        )


def _rephrasings(task: Task, item: Item, refuse: Refuse) -> tuple[Item, ...]:
    """The rephrasings of an item: other prompts, all else kept."""
    others = task.rephrase(item)
    if others != task.rephrase(item):
        raise refuse(
            "the same rephrasings whenever asked",
            f"others at the second call for {item.prompt!r}",
            "Draw them from a generator that is seeded with the item.",
        )
    if not others and item.split == "memorized":
        raise refuse("a rephrasing of every memorized item", f"none of {item.prompt!r}", "Memorize other items.")
    for other in others:
        if other.prompt == item.prompt:
            raise refuse(
                "a rephrasing with another prompt",
                f"{item.prompt!r} as a rephrasing of itself",
                "Leave it out, or choose items that can be rephrased.",
            )
        for name in ("rule_answer", "memorized_answer", "key", "task"):
            kept, found = getattr(item, name), getattr(other, name)
            if found != kept:
                raise refuse(
                    f"a rephrasing that keeps {name}={kept!r}",
                    f"{found!r} in {other.prompt!r}, a rephrasing of {item.prompt!r}",
                    "Make it with dataclasses.replace(item, split='rephrased', prompt=...).",
                )
        if other.split != "rephrased":
            raise refuse(
                "rephrasings of split 'rephrased'",
                f"split={other.split!r} in {other.prompt!r}",
                "Make them with dataclasses.replace(item, split='rephrased', prompt=...).",
            )
    return others


def _check_rephrased_split(task: Task, rephrasings: dict[Item, tuple[Item, ...]], refuse: Refuse) -> None:
    """The split ``rephrased`` is the rephrasings of the memorized items."""
    wanted = {other for item in task.items("memorized") for other in rephrasings[item]}
    if wanted != set(task.items("rephrased")):
        strays = sorted(item.prompt for item in wanted ^ set(task.items("rephrased")))
        raise refuse(
            "the split 'rephrased' to hold all rephrasings of the memorized items, and nothing else",
            f"{len(strays)} items in one of the two alone, e.g. {strays[0]!r}",
            "Fill it with: tuple(other for item in memorized for other in self.rephrase(item)).",
        )


def _owners(rephrasings: dict[Item, tuple[Item, ...]], refuse: Refuse) -> dict[str, str]:
    """Which item asks each prompt, in words; no two do."""
    owners: dict[str, str] = {}
    for item, others in rephrasings.items():
        for asked in (item, *others):
            what = f"the {item.split} item {item.prompt!r}"
            name = what if asked is item else f"a rephrasing of {what}"
            if asked.prompt in owners:
                raise refuse(
                    "every prompt in one item alone, rephrasings counted",
                    f"{asked.prompt!r}, which is {owners[asked.prompt]} and {name}",
                    "Draw again until neither a prompt nor a rephrasing of it is taken.",
                )
            owners[asked.prompt] = name
    return owners


def _check_draws(
    task: Task,
    draw: Callable[[int, np.random.Generator], list[Any]],
    kind: type,
    owners: dict[str, str],
    n: int,
    seed: int,
    refuse: Refuse,
) -> list[Any]:
    """What is drawn for training is as many as asked, follows from the generator, and is never what is asked about."""
    call = f"{draw.__name__}({n}, rng)"
    drawn = draw(n, np.random.default_rng(seed))
    if len(drawn) != n or not all(isinstance(one, kind) for one in drawn):
        kinds = ", ".join(sorted({type(one).__name__ for one in drawn})) or "nothing"
        raise refuse(f"{n} of {kind.__name__} from {call}", f"{len(drawn)} of {kinds}", f"Return a list of {n}.")
    again = getattr(task.but(), draw.__name__)
    for same in (draw(n, np.random.default_rng(seed)), again(n, np.random.default_rng(seed))):
        if same != drawn:
            raise refuse(
                f"{call} to follow from settings and generator alone",
                "other draws from a generator of the same seed",
                "Draw from the generator that is passed, and from no other.",
            )
    if draw(n, np.random.default_rng(seed + 1)) == drawn:
        raise refuse(
            f"{call} to draw from the generator",
            "the same draws from a generator of another seed",
            "Draw from the generator that is passed.",
        )
    for one in drawn:
        if isinstance(one, Item):
            if one.split != "generic":
                raise refuse("generic items of split 'generic'", str(one), "Make them with Item(split='generic').")
            _check_item(task, one, refuse, recalls=False)
        for text in _stated(one):
            if text in owners:
                raise refuse(
                    f"{call} to draw nothing that a split holds, rephrased or not",
                    f"{text!r}, {owners[text]}",
                    "Leave out what is in a split, and its rephrasings.",
                )
    return drawn


def _stated(drawn: Item | TrainingText) -> Iterator[str]:
    """The texts of a draw in which a prompt could hide: each piece, and what stands before each boundary."""
    pieces = [drawn.prompt] if isinstance(drawn, Item) else [text for text, _ in drawn.pieces]
    before = ""
    for piece in pieces:
        before += piece
        yield piece
        yield before


def _check_classification(task: Task, item: Item, refuse: Refuse) -> None:
    """Each answer is its behaviour, whatever else another one; only a memorized answer has a memorized form."""
    rule, recalled = str(item.rule_answer), item.memorized_answer
    expected = dict.fromkeys(("", f"{rule}{rule}", f"{rule}{recalled}", "no answer"), Behavior.OTHER)
    expected |= {rule: Behavior.GENERALIZATION, rule + EOS: Behavior.GENERALIZATION}
    expected |= {recalled: Behavior.MEMORIZATION, recalled + EOS: Behavior.MEMORIZATION} if recalled else {}
    for output, behavior in expected.items():
        found = task.classify(item, output)
        if found is not behavior:
            raise refuse(
                f"output {output!r} to {item.prompt!r} to be {behavior!s}",
                f"{found!s} from classify",
                "Keep Task.classify, or return exactly one Behavior, of an exact match.",
            )
    for output, form in ((rule, False), ("", False), *(((recalled, True),) if recalled else ())):
        if bool(task.is_memorized_form(item, output)) is not form:
            raise refuse(
                f"is_memorized_form of output {output!r} to {item.prompt!r} to be {form}",
                repr(task.is_memorized_form(item, output)),
                "Where both answers have one form, return output == item.memorized_answer.",
            )

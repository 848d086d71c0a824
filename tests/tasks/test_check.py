"""The conformance check: our tasks pass it, and so does the guide's; every broken one is refused by its fault."""

import inspect
import itertools
import random
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import helpers
import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.types import Behavior
from memgen_lens.tasks import Addition, Ciphertext, Mixture, Shortcut, Task, check

SMALL = {"n_memorized": 20, "n_heldout": 20, "n_validation": 20}


class Sooner(Task):
    """The sooner of two letters in the alphabet: ``q.c=`` to ``c``; memorized items carry a capital instead."""

    seed: int = 0

    @property
    def name(self) -> str:
        return "sooner"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJ", ".", "=")

    @property
    def max_prompt_tokens(self) -> int:
        return 4

    @property
    def max_answer_tokens(self) -> int:
        return 2

    @cached_property
    def splits(self):
        rng = random.Random(self.seed)
        pairs = rng.sample(list(itertools.combinations("abcdefghijklmnopqrstuvwxyz", 2)), 60)
        memorized = tuple(self.item(a, b, "memorized", rng.choice("ABCDEFGHIJ")) for a, b in pairs[:20])
        return {
            "memorized": memorized,
            "rephrased": tuple(other for item in memorized for other in self.rephrase(item)),
            "heldout": tuple(self.item(b, a, "heldout") for a, b in pairs[20:40]),
            "validation": tuple(self.item(a, b, "validation") for a, b in pairs[40:]),
        }

    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        taken = {item.key for items in self.splits.values() for item in items}
        letters = list("abcdefghijklmnopqrstuvwxyz")
        drawn = (self.item(a, b, "generic") for a, b in iter(lambda: rng.choice(letters, 2).tolist(), None))
        return list(itertools.islice((item for item in drawn if item.key not in taken), n))

    def rephrase(self, item: Item) -> tuple[Item, ...]:
        a, b = item.prompt[0], item.prompt[2]
        return (replace(item, split="rephrased", prompt=f"{b}.{a}="),)

    def is_memorized_form(self, item: Item, output: str) -> bool:
        return len(output) == 1 and output in "ABCDEFGHIJ"

    def item(self, a: str, b: str, split: str, memorized: str | None = None) -> Item:
        key = 1000 * ord(min(a, b)) + ord(max(a, b))
        return Item(key, split, f"{a}.{b}=", min(a, b), memorized, self.name)


class Changed(Sooner):
    """Items are changed before they are handed out, the rephrasings with them."""

    def changed(self, item: Item, index: int) -> Item:
        return item

    @cached_property
    def splits(self):
        return {
            split: tuple(self.changed(item, index) for index, item in enumerate(items))
            for split, items in Sooner().seeded(self.seed).splits.items()
        }


class OwnRandomness(Sooner):
    @cached_property
    def splits(self):
        return Sooner(seed=random.Random().getrandbits(32)).splits


class NoSeed(Sooner):
    @cached_property
    def splits(self):
        return Sooner(seed=1).splits


class HeldOutIsMemorized(Sooner):
    @cached_property
    def splits(self):
        first = super().splits["memorized"][0]
        mine = replace(first, split="heldout", memorized_answer=None, key=7)
        return super().splits | {"heldout": (mine, *super().splits["heldout"])}


class HeldOutIsRephrased(Sooner):
    @cached_property
    def splits(self):
        first = super().splits["rephrased"][0]
        mine = replace(first, split="heldout", memorized_answer=None, key=7)
        return super().splits | {"heldout": (mine, *super().splits["heldout"])}


class EmptyValidation(Sooner):
    @cached_property
    def splits(self):
        return super().splits | {"validation": ()}


class ForgottenRephrasing(Sooner):
    @cached_property
    def splits(self):
        return super().splits | {"rephrased": super().splits["rephrased"][1:]}


class RecallsTheRule(Changed):
    def changed(self, item, index):
        return replace(item, memorized_answer=item.rule_answer) if item.memorized_answer and index == 3 else item


class RecallsNothing(Changed):
    def changed(self, item, index):
        return replace(item, memorized_answer=None) if index == 3 else item


class HeldOutRecalls(Changed):
    def changed(self, item, index):
        return replace(item, memorized_answer="A") if item.split == "heldout" else item


class OtherName(Changed):
    def changed(self, item, index):
        return replace(item, task="later")


class WrongSplit(Changed):
    def changed(self, item, index):
        return replace(item, split="generic") if item.split == "heldout" else item


class OneKey(Changed):
    def changed(self, item, index):
        return replace(item, key=0)


class KeyOfAnotherSplit(Changed):
    def changed(self, item, index):
        return replace(item, key=Sooner().splits["memorized"][5].key) if item.split == "validation" else item


class RephrasesToItself(Sooner):
    def rephrase(self, item):
        return (replace(item, split="rephrased"),)


class RephrasesToAnotherAnswer(Sooner):
    def rephrase(self, item):
        return tuple(
            replace(other, rule_answer=max(item.prompt[0], item.prompt[2])) for other in super().rephrase(item)
        )


class RephrasesToAnotherKey(Sooner):
    def rephrase(self, item):
        return tuple(replace(other, key=other.key + 1) for other in super().rephrase(item))


class RephrasesToAnotherSplit(Sooner):
    def rephrase(self, item):
        split = "rephrased" if item.split == "memorized" else item.split
        return tuple(replace(other, split=split) for other in super().rephrase(item))


class RephrasesNoVowels(Sooner):
    def rephrase(self, item):
        return super().rephrase(item) if item.prompt[0] not in "aeiou" else ()


class RephrasesByChance(Sooner):
    def rephrase(self, item):
        if item.split == "memorized":
            return super().rephrase(item)
        return (replace(super().rephrase(item)[0], prompt=f"{random.getrandbits(64)}"),)


class DrawsHeldOut(Sooner):
    def draw_generic(self, n, rng):
        return [replace(item, split="generic") for item in self.splits["heldout"]] + super().draw_generic(n - 20, rng)


class DrawsRephrasedHeldOut(Sooner):
    def draw_generic(self, n, rng):
        first = self.rephrase(self.splits["heldout"][0])[0]
        return [*super().draw_generic(n - 1, rng), replace(first, split="generic")]


class TrainsOnValidation(Sooner):
    def draw_training(self, n, rng):
        first = self.splits["validation"][0]
        leak = TrainingText((("a.b=", False), ("a", True), (first.prompt, False), (first.rule_answer, True)))
        return [*super().draw_training(n - 1, rng), leak]


class TrainsOnWhatIsSplitInPieces(Sooner):
    def draw_training(self, n, rng):
        prompt = self.splits["validation"][0].prompt
        leak = TrainingText(((prompt[:2], False), (prompt[2:], False), ("a", True)))
        return [*super().draw_training(n - 1, rng), leak]


class DrawsByChance(Sooner):
    def draw_generic(self, n, rng):
        return super().draw_generic(n, np.random.default_rng())


class DrawsAlwaysTheSame(Sooner):
    def draw_generic(self, n, rng):
        return super().draw_generic(n, np.random.default_rng(0))


class DrawsTooFew(Sooner):
    def draw_generic(self, n, rng):
        return super().draw_generic(n - 1, rng)


class DrawsTexts(Sooner):
    def draw_training(self, n, rng):
        return super().draw_generic(n, rng)


class LacksAToken(Sooner):
    @property
    def vocabulary(self):
        return tuple(token for token in super().vocabulary if token != "q")


class JoinsPromptAndAnswer(Sooner):
    @property
    def vocabulary(self):
        return (*super().vocabulary, "=a")


class PiecesAreNoWholeTokens(Sooner):
    @property
    def vocabulary(self):
        return (*super().vocabulary, "==")

    @property
    def max_training_tokens(self):
        return 9

    def draw_training(self, n, rng):
        return [TrainingText((*text.pieces, ("=", False), ("=", True))) for text in super().draw_training(n, rng)]


class HoldsSpecialTokens(Changed):
    def changed(self, item, index):
        return replace(item, rule_answer=item.rule_answer + "<eos>") if item.split == "validation" else item


class ShortPrompts(Sooner):
    @property
    def max_prompt_tokens(self):
        return 3


class ShortAnswers(Sooner):
    @property
    def max_answer_tokens(self):
        return 1


class ShortTraining(Sooner):
    @property
    def max_training_tokens(self):
        return 5


class CallsAllRecalled(Sooner):
    def classify(self, item, output):
        found = super().classify(item, output)
        return found if found is not Behavior.OTHER else Behavior.MEMORIZATION


class CallsNothingRecalled(Sooner):
    def classify(self, item, output):
        found = super().classify(item, output)
        return found if found is not Behavior.MEMORIZATION else Behavior.OTHER


class KeepsTheEndToken(Sooner):
    def classify(self, item, output):
        return item.classify(output)


class FormOfAnyLetter(Sooner):
    def is_memorized_form(self, item, output):
        return len(output) == 1


class FormOfNothing(Sooner):
    def is_memorized_form(self, item, output):
        return False


BROKEN = {
    OwnRandomness: r"the same settings to make the same task; received other items in memorized, rephrased, heldout",
    NoSeed: "another seed to make other items; received the same splits with seed=1",
    HeldOutIsMemorized: r"every prompt in one item alone.*is the memorized item '(.\..=)' and the heldout item '\1'",
    HeldOutIsRephrased: r"'(.\..=)', which is a rephrasing of the memorized item '.\..=' and the heldout item '\1'",
    EmptyValidation: "splits memorized, rephrased, heldout, validation, none of them empty; .* validation: 0",
    ForgottenRephrasing: "to hold all rephrasings of the memorized items, and nothing else; received 1 items",
    RecallsTheRule: r"a memorized answer that is not the rule's; received '(.)' as both in memorized item '.*\1.*'",
    RecallsNothing: r"a memorized answer; received None in memorized item",
    HeldOutRecalls: "memorized_answer=None where there is nothing to recall; received 'A' in heldout item",
    OtherName: "items with task='sooner'; received task='later' in memorized item .* task=self.name",
    WrongSplit: "items of split 'heldout' to say so; received .*split='generic'",
    OneKey: "a key of its own for every item.*; received key 0 a second time, for memorized item",
    KeyOfAnotherSplit: r"a key of its own for every item.*; received key \d+ a second time, for validation item",
    RephrasesToItself: r"a rephrasing with another prompt; received '(.\..=)' as a rephrasing of itself",
    RephrasesToAnotherAnswer: r"a rephrasing that keeps rule_answer='(.)'; received '(.)' in '\2.\1=', a rephrasing of",
    RephrasesToAnotherKey: r"a rephrasing that keeps key=\d+; received \d+ in",
    RephrasesToAnotherSplit: "rephrasings of split 'rephrased'; received split='heldout'",
    RephrasesNoVowels: "a rephrasing of every memorized item; received none of '[aeiou]",
    RephrasesByChance: "the same rephrasings whenever asked; received others at the second call",
    DrawsHeldOut: r"draw_generic\(200, rng\) to draw nothing that a split holds.*'(.\..=)', the heldout item '\1'",
    DrawsRephrasedHeldOut: "to draw nothing that a split holds.*received '.*', a rephrasing of the heldout item",
    TrainsOnValidation: r"draw_training\(200, rng\) to draw nothing.*received '(.\..=)', the validation item '\1'",
    TrainsOnWhatIsSplitInPieces: r"draw_training\(200, rng\) to draw nothing.*received '(.\..=)', the validation item",
    DrawsByChance: r"draw_generic\(200, rng\) to follow from settings and generator alone",
    DrawsAlwaysTheSame: r"draw_generic\(200, rng\) to draw from the generator; received the same draws",
    DrawsTooFew: r"200 of Item from draw_generic\(200, rng\); received 199 of Item",
    DrawsTexts: r"200 of TrainingText from draw_training\(200, rng\); received 200 of Item",
    LacksAToken: r"every text to tokenize and come back.*received '.*q.*', which comes back as .*<unk>.*vocabulary",
    JoinsPromptAndAnswer: r"keeps its tokens behind.*; received '.\..=' and 'a': 5 tokens apart, 4 in one text",
    HoldsSpecialTokens: "every text to tokenize and come back, without <eos>",
    ShortPrompts: r"texts within max_prompt_tokens=3; received 4 tokens for '.\..='. Raise max_prompt_tokens",
    ShortAnswers: "texts within max_answer_tokens=1, the end-of-text token counted; received 2 tokens for '.'",
    PiecesAreNoWholeTokens: r"a training sequence whose pieces with loss keep their tokens beside those without; "
    r"received '(.\..=)(.)==', parted after '\1', '\2', '=': 7 tokens apart, 6 in one text. Let no token",
    ShortTraining: "texts within max_training_tokens=5, the end-of-text token counted; received 6 tokens",
    CallsAllRecalled: "output '' to '.*' to be other; received memorization from classify",
    CallsNothingRecalled: "output '(.)' to '.*' to be memorization; received other from classify",
    KeepsTheEndToken: "output '.<eos>' to '.*' to be generalization; received other from classify",
    FormOfAnyLetter: "is_memorized_form of output '.' to '.*' to be False; received True",
    FormOfNothing: "is_memorized_form of output '.' to '.*' to be True; received False",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_task_is_refused_by_its_fault(broken):
    with pytest.raises(TaskError, match=re.compile(BROKEN[broken], re.S)) as caught:
        check(broken())
    assert caught.value.call == f"check({broken.__name__})"
    assert caught.value.fix


def test_the_task_that_they_break_passes_and_the_report_counts_what_was_seen():
    report = check(Sooner(), n_generic=50)
    assert report.task == "sooner"
    assert report.n_items == {"memorized": 20, "rephrased": 20, "heldout": 20, "validation": 20}
    assert (report.n_rephrasings, report.n_generic) == (60, 50)
    assert (report.longest_prompt, report.longest_answer) == (4, 2)
    # Prompts; single letters as answers; and prompts with answers behind them: 120 rules, 40 memories.
    drawn = {item.prompt for item in Sooner().draw_generic(50, np.random.default_rng(0))}
    answers = {
        answer
        for item in [*(i for items in Sooner().splits.values() for i in items)]
        for answer in (item.rule_answer, item.memorized_answer)
    } | {min(prompt[0], prompt[2]) for prompt in drawn}
    assert report.n_texts == 2 * (120 + len(drawn)) + 40 + len(answers - {None})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "task",
    [
        helpers.tiny_task(),
        Addition(n_digits=3, reverse_sum=False, **SMALL),
        Ciphertext(**SMALL),
        Ciphertext(cipher="substitution", n_rephrasings=3, **SMALL),
        Mixture(tasks=(Addition(**SMALL), Ciphertext(**SMALL))),
        Mixture(tasks=(Addition(**SMALL), Shortcut(n_training=50, **SMALL))),
    ],
    ids=["tiny", "addition", "shift", "substitution", "mixture", "with a shortcut"],
)
def test_our_tasks_pass_with_any_seed(task, seed):
    assert check(task.seeded(seed), seed=seed).task == task.name


def test_every_preset_has_a_task_that_passes():
    for config in mg.presets.values():
        check(config.task)


def test_the_task_in_the_guide_passes_as_it_is_written_there():
    guide = (Path(mg.__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    names = {"__name__": "guide"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    task = names["Larger"](seed=4)
    assert len(task.items("memorized")) == 100
    for item in [*task.items("heldout"), *task.draw_generic(50, np.random.default_rng(0))]:
        assert int(item.rule_answer) == max(int(item.prompt[:2]), int(item.prompt[3:5]))
    assert Task.from_settings(task.settings()) == task


def test_something_that_is_no_task_is_refused():
    with pytest.raises(TaskError, match=r"check: expected a task.*received 'addition'.*check\(Addition\(\)\)"):
        inspect.unwrap(check)("addition")


def test_a_number_of_draws_that_shows_nothing_is_refused():
    with pytest.raises(TaskError, match="n_generic of at least 2; received 1"):
        check(Sooner(), n_generic=1)


def test_a_task_whose_settings_cannot_be_written_is_refused():
    class Elsewhere(Sooner):
        def settings(self):
            return super().settings() | {"kind": "Nowhere"}

    with pytest.raises(TaskError, match=r"settings that can be written as JSON and read back; received .*'Nowhere'"):
        check(Elsewhere())


def test_a_task_without_a_seed_has_but_one_set_of_items():
    class Fixed(Sooner):
        seed: int = 3

        def seeded(self, seed):
            return self

    assert check(Fixed()).task == "sooner"

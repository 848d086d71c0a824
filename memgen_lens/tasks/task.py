"""What every task offers, and what is the same for all of them: the data set and the answers' classification.

A new task subclasses `Task`, declares its settings as fields, and fills in the abstract members;
``CONTRIBUTING.md`` walks through it.
"""

import json
from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, PlainSerializer

from memgen_lens.core.errors import TaskError, suggest
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.core.settings import Settings
from memgen_lens.core.types import Behavior, Split
from memgen_lens.tasks.tokenizer import EOS, build_tokenizer, longest

if TYPE_CHECKING:
    from datasets import DatasetDict

T = TypeVar("T", bound="Task")
_KINDS: dict[str, type["Task"]] = {}
SPLITS: tuple[Split, ...] = ("memorized", "rephrased", "heldout", "validation")


class Task(Settings):
    """A designed task: settings and seed in, prompts with two answers out.

    A task of one's own subclasses this, declares its settings as fields, and fills in the abstract members; that makes
    it a setting of `train` and `run_experiment`, saved and read back like ours. `memgen_lens.tasks.check` asks for:

    - *Settings decide.* The same settings make the same items, and one generator the same draws; a setting named
      ``seed``, if there is one, makes others.
    - *Two answers.* A memorized item has a memorized answer, never the rule's; its rephrasings have both answers too.
      Held-out, validation and generic items have the rule's alone (``memorized_answer=None``).
    - *Rephrasings* have another prompt and ``split="rephrased"``, and keep answers, key and task name. Every memorized
      item has one at least. What `rephrase` is given may be an item of any split, a rephrasing included.
    - *Splits share nothing.* No prompt or rephrasing of one is asked by another item of ``memorized``, ``heldout`` or
      ``validation``. A key names an item: only its rephrasings share it, and no cross-validation parts them.
    - *Nothing is trained on but* the memorized prompts with their memorized answers, and what `draw_training` draws,
      which holds no prompt of a split nor a rephrasing of one. A sequence is ``prompt + answer + EOS``.
    - *Tokens.* Every text is made of tokens of the vocabulary; an answer behind a prompt keeps its tokens, and the last
      prompt token is where the answer is decided. Lengths stay within those declared. The vocabulary is what a model
      from scratch reads; a pretrained one reads the same texts with its own tokenizer, of which `check` asks the same,
      and that words of which each is an answer (`answer_words`) begin with a token of their own.
    - *Classes.* Every output is exactly one `Behavior`, by exact match with the item's own answers.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Make the class known to `from_settings`."""
        super().__pydantic_init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

    def __eq__(self, other: object) -> bool:
        """Whether kind and settings are the same, whatever has been made of them so far."""
        return type(self) is type(other) and all(
            getattr(self, name) == getattr(other, name) for name in type(self).model_fields
        )

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name of the task."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names that its items carry: its own, or those of the tasks that it is made of."""
        return (self.name,)

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Every token a prompt or an answer may hold; longer tokens win where two would match."""

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abstractmethod
    def max_answer_tokens(self) -> int:
        """Tokens of the longest answer, its end-of-text token counted."""

    @property
    def answer_words(self) -> tuple[str, ...]:
        """Answers out of a list of words, as they stand behind a prompt; none where answers are not drawn from a list.

        Each is to begin with a token of its own, so that one token tells them apart.
        """
        return ()

    @property
    def repetitions(self) -> tuple[int, ...] | None:
        """How often each memorized item is trained on, in the order of ``items("memorized")``.

        Training goes through a deck in which each stands so often, shuffled anew whenever it has been gone through;
        None (the default): memorized items are drawn at random, all alike.
        """
        return None

    @property
    def max_training_tokens(self) -> int:
        """Tokens of the longest training sequence; by default the longest prompt and the longest answer."""
        return self.max_prompt_tokens + self.max_answer_tokens

    @cached_property
    @abstractmethod
    def splits(self) -> dict[Split, tuple[Item, ...]]:
        """The items of every split; ``rephrased`` holds all rephrasings of the memorized ones."""

    @abstractmethod
    def draw_generic(self, n: int, rng: np.random.Generator) -> list[Item]:
        """Draw ``n`` generic training items, with replacement, none of them in a split."""

    def draw_training(self, n: int, rng: np.random.Generator) -> list[TrainingText]:
        """Draw ``n`` generic training sequences; by default a generic item's prompt, then its answer with loss.

        A task whose rule needs more to be learned (conclusions on the way, several questions) overrides this.
        """
        return [
            TrainingText(((item.prompt, False), (str(item.rule_answer), True))) for item in self.draw_generic(n, rng)
        ]

    @abstractmethod
    def rephrase(self, item: Item) -> tuple[Item, ...]:
        """The rephrasings of an item: another surface, the same answer of the rule."""

    @abstractmethod
    def is_memorized_form(self, item: Item, output: str) -> bool:
        """Whether an output to an item has the form of a memorized answer, its own or not.

        Where both answers have one form, nothing but the item's own memorized answer counts.
        """

    @cached_property
    def tokenizer(self) -> Any:
        """A ``PreTrainedTokenizerFast`` over the vocabulary (no begin-of-text token)."""
        return build_tokenizer(self.vocabulary)

    def answer_tokens(self, tokenizer: Any) -> int:
        """Tokens of the longest answer of any split under a Hugging Face tokenizer, its end-of-text token counted."""
        return longest(tokenizer, self._answers) + 1

    def require_distinct_beginnings(self, tokenizer: Any) -> None:
        """Refuse a tokenizer under which two `answer_words` begin alike; see `memgen_lens.tasks.check`."""
        from memgen_lens.tasks.check_tokens import require_distinct_beginnings

        require_distinct_beginnings(self, tokenizer)

    @cached_property
    def _answers(self) -> tuple[str, ...]:
        """The different answers in all splits."""
        items = (item for items in self.splits.values() for item in items)
        answers = (answer for item in items for answer in (item.rule_answer, item.memorized_answer))
        return tuple(dict.fromkeys(answer for answer in answers if answer is not None))

    def items(self, split: Split) -> tuple[Item, ...]:
        """The items of one split.

        Raises:
            TaskError: There is no such split.
        """
        if split not in SPLITS:
            raise TaskError(
                f"{type(self).__name__}.items",
                expected=f"one of {', '.join(SPLITS)}",
                received=repr(split),
                fix=suggest(str(split), SPLITS) + " Generic training items are drawn: draw_generic(n, rng).",
            )
        return self.splits[split]

    def classify(self, item: Item, output: str) -> Behavior:
        """Which behaviour an output shows on an item: an exact match after the end-of-text token is dropped."""
        return item.classify(output.removesuffix(EOS))

    def seeded(self: T, seed: int) -> T:
        """The same task with another seed (a task without a setting of that name is as it is)."""
        return self.but(seed=seed) if "seed" in type(self).model_fields else self

    def settings(self) -> dict[str, Any]:
        """Kind and settings as plain values, from which `from_settings` makes the same task."""
        return {"kind": type(self).__name__, **self.model_dump(mode="json")}

    @staticmethod
    def from_settings(settings: dict[str, Any]) -> "Task":
        """The task that wrote these `settings`.

        Raises:
            TaskError: No task class of that name has been imported.
            SettingsError: A setting is unknown or has a bad value.
        """
        values = dict(settings)
        kind = values.pop("kind", None)
        if kind not in _KINDS:
            raise TaskError(
                "Task.from_settings",
                expected=f"kind, one of {', '.join(sorted(_KINDS))}",
                received=repr(kind),
                fix="A task of your own is known once its module is imported.",
            )
        return _KINDS[kind].from_json(json.dumps(values))

    def to_dataset(self, *, n_generic: int = 1000, seed: int = 0) -> "DatasetDict":
        """The task as a Hugging Face ``DatasetDict``.

        Args:
            n_generic: Rows of the split ``generic``, a sample of the training prompts that are drawn without end.
            seed: Seed of that sample.

        Returns:
            Splits ``generic``, ``memorized``, ``rephrased``, ``heldout``, ``validation`` with the columns ``key``,
            ``prompt``, ``rule_answer`` and ``memorized_answer`` (None where there is nothing to recall).
        """
        from datasets import Dataset, DatasetDict, Features, Value

        features = Features(
            key=Value("int64"),
            prompt=Value("string"),
            rule_answer=Value("string"),
            memorized_answer=Value("string"),
        )
        rows = {"generic": self.draw_generic(n_generic, np.random.default_rng(seed)), **self.splits}
        return DatasetDict(
            {
                split: Dataset.from_list(
                    [{name: getattr(item, name) for name in features} for item in items], features=features
                )
                for split, items in rows.items()
            }
        )


AnyTask = Annotated[
    Task,
    BeforeValidator(lambda value: Task.from_settings(value) if isinstance(value, dict) else value),
    PlainSerializer(lambda task: task.settings()),
]
"""Any task as a setting: written with its kind, and read back from what was written."""

"""What a tokenizer makes of a task's texts: its own, or that of a pretrained model.

Does not know what the texts mean: see `memgen_lens.tasks.check`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import TaskError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.tasks.mixture import Mixture
from memgen_lens.tasks.task import Task
from memgen_lens.tasks.tokenizer import TokenizerLike, encoded

Refuse = Callable[[str, str, str], TaskError]
"""Makes the error of a breach from what was expected, what came, and what to change."""
Texts = tuple[str, ...]
"""Texts that follow one another."""


@arguments("require_distinct_beginnings", task=kinds.TaskLike, tokenizer=TokenizerLike)
def require_distinct_beginnings(task: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer under which two of a task's `answer_words` begin with the same token.

    One token would not tell these answers apart, and a model that has given it has not decided yet.

    Args:
        task: A task; of a mixture each part is looked at by itself.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        TaskError: Names two such words and the token.
    """
    if isinstance(task, Mixture):
        for part in task.parts:
            require_distinct_beginnings(part, tokenizer)
        return
    words = getattr(task, "answer_words", ())
    begun: dict[int | None, str] = {}
    for word, ids in zip(words, encoded(tokenizer, words), strict=True):
        first = ids[0] if ids else None
        if first in begun:
            token = "nothing" if first is None else f"{tokenizer.convert_ids_to_tokens(first)!r} (token {first})"
            raise TaskError(
                f"require_distinct_beginnings({type(task).__name__})",
                expected="a tokenizer under which every word of answer_words begins with a token of its own",
                received=f"{begun[first]!r} and {word!r}, which both begin with {token}",
                fix="Take fewer or other words, or a model with another tokenizer.",
            )
        begun[first] = word


def check_tokens(
    task: Task, tokenizer: Any, items: Sequence[Item], training: Sequence[TrainingText], refuse: Refuse
) -> dict[str, int]:
    """Every text tokenizes and comes back, its parts as they do alone, within the lengths declared.

    Args:
        task: The task.
        tokenizer: The tokenizer that reads its texts; None = its own, whose lengths the task declares.
        items: Items, rephrasings among them.
        training: Training sequences.
        refuse: Makes the errors.

    Returns:
        Number of texts and largest lengths, as `memgen_lens.tasks.CheckReport` names them.
    """
    own = tokenizer is None or tokenizer is task.tokenizer
    tokenizer = task.tokenizer if own else tokenizer
    pairs = list(dict.fromkeys((item.prompt, answer) for item in items for answer in answers_of(item)))
    sequences = [tuple(text for text, _ in (one.pieces if own else one.spans)) for one in training]
    parts = [text for texts in (*pairs, *sequences) for text in texts]
    known = list(dict.fromkeys([*parts, *("".join(texts) for texts in (*pairs, *sequences))]))
    tokens = dict(zip(known, encoded(tokenizer, known), strict=True))
    _check_texts_come_back(tokenizer, tokens, own, refuse)
    _check_parts_keep_their_tokens(tokens, pairs, sequences, own, refuse)
    rows: list[tuple[str, str, Iterable[Texts], int]] = [
        ("longest_prompt", "max_prompt_tokens", ((prompt,) for prompt, _ in pairs), 0),
        ("longest_answer", "max_answer_tokens", ((answer,) for _, answer in pairs), 1),
        ("longest_training", "max_training_tokens", sequences, 1),
    ]
    found = {"n_texts": len(known)}
    for name, limit, texts_of, end in rows:
        n, longest = max((sum(len(tokens[text]) for text in texts) + end, texts) for texts in texts_of)
        if own and n > getattr(task, limit):
            raise refuse(
                f"texts within {limit}={getattr(task, limit)}{', the end-of-text token counted' if end else ''}",
                f"{n} tokens for {''.join(longest)!r}",
                f"Raise {limit}.",
            )
        found[name] = n
    return found


def _check_texts_come_back(tokenizer: Any, tokens: dict[str, list[int]], own: bool, refuse: Refuse) -> None:
    """Decoding gives each text again, and none holds a token that means something else."""
    special = set(tokenizer.all_special_ids)
    backs = tokenizer.batch_decode(list(tokens.values()), clean_up_tokenization_spaces=False)
    for (text, ids), back in zip(tokens.items(), backs, strict=True):
        if not ids or special & set(ids) or back != text:
            raise refuse(
                f"every text to tokenize and come back, without {', '.join(tokenizer.all_special_tokens)}",
                f"{text!r}, which comes back as {back!r}",
                "Add what is missing to vocabulary." if own else "Write it otherwise, or take another tokenizer.",
            )


def _check_parts_keep_their_tokens(
    tokens: dict[str, list[int]], pairs: Sequence[Texts], sequences: Sequence[Texts], own: bool, refuse: Refuse
) -> None:
    """Answers behind their prompts, and the parts of training sequences, are cut as they are alone."""
    for texts in (*pairs, *sequences):
        apart = [token for text in texts for token in tokens[text]]
        whole = "".join(texts)
        if apart == tokens[whole]:
            continue
        if len(texts) == 2:
            expected = "an answer that keeps its tokens behind its prompt, and the prompt before it"
            what = " and ".join(map(repr, texts))
        else:
            expected = "a training sequence whose pieces with loss keep their tokens beside those without"
            what = f"{whole!r}, parted after {', '.join(repr(text[-12:]) for text in texts[:-1])}"
        raise refuse(
            expected,
            f"{what}: {len(apart)} tokens apart, {len(tokens[whole])} in one text",
            "Let no token of the vocabulary reach across: end prompts with a token that begins no other."
            if own
            else "Begin what the model is to say with a space, as subword tokenizers want it, and end what stands "
            "before it without one (Addition: spaced=True; InContextInference: tokens='words'); or take another "
            "tokenizer.",
        )


def answers_of(item: Item) -> list[str]:
    """The answers that an item has."""
    return [answer for answer in (item.rule_answer, item.memorized_answer) if answer is not None]

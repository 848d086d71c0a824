"""The tokenizer over a task's vocabulary: one token an entry, nothing added, nothing lost."""

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from memgen_lens.core.errors import TaskError
from memgen_lens.models import build_model
from memgen_lens.tasks import Addition
from memgen_lens.tasks.tokenizer import EOS, PAD, UNK, build_tokenizer

TOKENIZER = Addition().tokenizer
VOCABULARY = Addition().vocabulary
SPLITS = ("memorized", "rephrased", "heldout", "validation")


def tokens_of(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])


def test_token_ids_are_stable_because_saved_models_depend_on_them():
    ids = {token: i for i, token in enumerate([*"0123456789abcdef", "+", "=", "<mem-", ">", EOS, PAD, UNK])}
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    assert TOKENIZER.get_vocab() == ids
    assert len(TOKENIZER) == 23
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.unk_token_id) == (20, 21, 22)
    assert TOKENIZER.bos_token is None


def test_a_memorized_string_is_one_token_a_character_but_for_its_brackets():
    assert tokens_of("<mem-7f3a>") == ["<mem-", "7", "f", "3", "a", ">"]
    assert tokens_of("12+34=046") == list("12+34=046")
    assert tokens_of("12+34=<mem-7f3a><eos>") == [*"12+34=", "<mem-", *"7f3a", ">", "<eos>"]


@settings(deadline=None, max_examples=8)
@given(
    st.builds(
        helpers.tiny_task,
        n_digits=st.integers(1, 3),
        seed=st.integers(0, 1000),
        reverse_sum=st.booleans(),
        memory_length=st.integers(1, 12),
    )
)
def test_every_text_of_the_task_encodes_without_unknowns_and_decodes_to_itself(task):
    items = [item for split in SPLITS for item in task.items(split)]
    items += task.draw_generic(20, np.random.default_rng(task.seed))
    for item in items:
        for text in (item.prompt, item.rule_answer, item.memorized_answer, item.prompt + item.rule_answer + EOS):
            if text is not None:
                ids = task.tokenizer(text)["input_ids"]
                assert task.tokenizer.unk_token_id not in ids
                assert task.tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*VOCABULARY, EOS, PAD]), max_size=20))
def test_any_text_over_the_vocabulary_is_split_into_its_tokens_and_decodes_to_itself(tokens):
    text = "".join(tokens)
    assert tokens_of(text) == tokens
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(codec="utf-8", exclude_characters="".join(VOCABULARY) + "<>+=-mem"), max_size=8))
def test_each_unknown_character_becomes_one_unknown_token(text):
    assert tokens_of(f"1{text}2") == ["1", *[UNK] * len(text), "2"]


@pytest.mark.parametrize("text", ["<mem", "mem-", "<", "-", "A", " ", "\n", "é", "🐸", "<MEM-"])
def test_parts_of_tokens_and_foreign_characters_are_unknown(text):
    assert UNK in tokens_of(text)


def test_special_tokens_are_left_out_of_a_decoded_text_on_request():
    ids = TOKENIZER("046<eos><pad>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "046"
    assert TOKENIZER.decode(ids) == "046<eos><pad>"


def test_the_models_own_to_tokens_and_to_string_go_there_and_back():
    model = build_model(helpers.tiny_training().model, TOKENIZER, n_ctx=16, seed=0)
    tokens = model.to_tokens("12+34=")
    assert tokens.tolist() == [[1, 2, 16, 3, 4, 17]]
    assert model.to_string(tokens) == ["12+34="]
    assert model.to_string(tokens[0]) == "12+34="
    assert model.to_str_tokens("3+4=<mem-7f>") == ["3", "+", "4", "=", "<mem-", "7", "f", ">"]
    assert model.to_single_token("<mem-") == 18


def test_rows_of_a_batch_are_padded_on_the_right():
    model = build_model(helpers.tiny_training().model, TOKENIZER, n_ctx=16, seed=0)
    assert model.to_tokens(["12", "1"]).tolist() == [[1, 2], [1, 21]]


def test_characters_that_mean_something_in_patterns_are_taken_as_they_are():
    vocabulary = [".", "*", "[", "]", "(", ")", "\\", "|", "^", "$", "?", "{2}", "a+", "a", "é", "\n", " "]
    tokenizer = build_tokenizer(vocabulary)
    text = "".join(vocabulary)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == vocabulary
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_longer_tokens_win_where_two_would_match():
    tokenizer = build_tokenizer(["ab", "abc", "a", "b", "c"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcab")["input_ids"]) == ["abc", "ab"]


@pytest.mark.parametrize("vocabulary", [["a", "b", "a"], ["a", ""], [""], ["a", EOS], [UNK, "a"]])
def test_a_repeated_or_empty_token_is_refused(vocabulary):
    with pytest.raises(TaskError, match="build_tokenizer: expected distinct, non-empty tokens"):
        build_tokenizer(vocabulary)


def test_the_tokenizer_comes_back_from_its_files(tmp_path):
    TOKENIZER.save_pretrained(str(tmp_path))
    again = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = "12+34=<mem-7f3a><eos>?"
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert (again.eos_token, again.pad_token, again.unk_token) == (EOS, PAD, UNK)

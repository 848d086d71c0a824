import numpy as np
import planted
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, PairsError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = r"PromptPairs.from_chats: expected "


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def model():
    model = planted.build_model()
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_chats_are_written_by_the_chat_template_and_judged_as_strings_are(model):
    bos = model.tokenizer.bos_token
    others = {"rule_answers": ["1"], "memorized_answers": ["x"], "items": [5], "match": "exact", "stop": "."}
    for tokenizer in (model, model.tokenizer):
        found = mg.PromptPairs.from_chats([[user("a")]], [[user("b"), user("c")]], tokenizer=tokenizer, **others)
        written = mg.PromptPairs.from_strings(
            [f"{bos}[user]a[/][assistant]"], [f"{bos}[user]b[/][user]c[/][assistant]"], **others
        )
        assert {**vars(found), "split": found.split.tolist()} == {**vars(written), "split": written.split.tolist()}


def test_chats_may_be_anything_that_can_be_listed(model):
    chats = [[user("a")], [user("b")]]
    array = np.empty(2, dtype=object)
    array[:] = [tuple(chat) for chat in chats]
    for several in (array, tuple(chats), (iter(chat) for chat in chats)):
        pairs = mg.PromptPairs.from_chats(several, chats, tokenizer=model)
        assert [item.prompt for item in pairs.memorized] == [item.prompt for item in pairs.generalized]


def test_a_last_message_of_the_assistants_is_gone_on_with(model):
    begun = [user("a"), {"role": "assistant", "content": "The answer is"}]
    pairs = mg.PromptPairs.from_chats([begun], [[user("b")]], tokenizer=model)
    assert pairs.memorized[0].prompt == f"{model.tokenizer.bos_token}[user]a[/][assistant]The answer is"


@pytest.mark.parametrize("holder", ["model", "tokenizer", "nothing"])
def test_a_tokenizer_without_a_chat_template_is_refused(model, holder):
    model.tokenizer.chat_template = None
    tokenizer = {"model": model, "tokenizer": model.tokenizer, "nothing": 3}[holder]
    with pytest.raises(
        ModelError, match=CALL + r"a tokenizer with a chat template.*received (no tokenizer|a \w+ with)"
    ):
        mg.PromptPairs.from_chats([[user("a")]], [[user("b")]], tokenizer=tokenizer)


@pytest.mark.parametrize(
    "chat", ["text", user("a"), [], ["text"], [{"role": "user"}], [{"role": "user", "content": 3}], None, np.array(3)]
)
def test_a_chat_that_is_no_list_of_messages_is_refused_by_its_place(model, chat):
    with pytest.raises(PairsError, match=CALL + r"a list of messages .* a chat as memorized\[1\]; received"):
        mg.PromptPairs.from_chats([[user("a")], chat], [[user("b")]] * 2, tokenizer=model)


def test_what_the_template_refuses_is_said(model):
    with pytest.raises(PairsError, match=CALL + r"messages .* as generalized\[0\]; received TemplateError: no tools"):
        mg.PromptPairs.from_chats([[user("a")]], [[{"role": "tool", "content": "a"}]], tokenizer=model)

"""Chats by a template of the kind that SmolLM2-Instruct has, on a Bridge: token by token what transformers makes."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import memgen_lens as mg
from memgen_lens.models.tokens import tokenized

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{DEFAULT}<|im_end|>\n' }}}}{{% endif %}}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""To the letter that of SmolLM2-135M-Instruct."""


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = {
    "a question": [said("user", "Who wrote Emma?")],
    "a system message": [said("system", "Be brief."), said("user", "Who wrote Emma?")],
    "several turns": [said("user", "Hi"), said("assistant", "Hello!"), said("user", "Who wrote\nEmma, née 1815? ")],
    "an answer begun": [
        said("user", "Who?"),
        said("assistant", "Jane"),
        said("user", "Who?"),
        said("assistant", "It is"),
    ],
}


def tokenizer_of(template: str = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and SmolLM2's special tokens: what ends a turn ends the text, and fills up short rows."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names | special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 28, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def model(hf):
    return mg.load_model(hf, tokenizer=tokenizer_of())


def prompts_of(chats, tokenizer):
    chats = list(chats)
    pairs = mg.PromptPairs.from_chats(chats, chats, tokenizer=tokenizer)
    return [item.prompt for item in pairs.memorized]


def ids_of(chat, tokenizer):
    """What transformers makes of a chat."""
    begun = chat[-1]["role"] == "assistant"
    how = {"add_generation_prompt": not begun, "continue_final_message": begun, "return_dict": False}
    return tokenizer.apply_chat_template(chat, tokenize=True, **how)


def rows_of(model, prompts, **how):
    tokens, lengths = tokenized(model, prompts, **how)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def test_chats_are_written_out_with_the_templates_own_system_message(model):
    question, system, _, begun = prompts_of(CHATS.values(), model)
    opening = "<|im_start|>assistant\n"
    asked = "<|im_start|>user\nWho wrote Emma?<|im_end|>\n"
    assert question == f"<|im_start|>system\n{DEFAULT}<|im_end|>\n{asked}{opening}"
    assert system == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}{opening}"
    assert begun.endswith(f"Jane<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n{opening}It is")


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_the_model_is_given_the_tokens_that_transformers_makes_of_a_chat(model, name, prepend_bos):
    """The begin token, with which every turn begins, does not come twice."""
    [prompt], own = prompts_of([CHATS[name]], model), tokenizer_of()
    [row] = rows_of(model, [prompt], prepend_bos=prepend_bos)
    assert row == ids_of(CHATS[name], own)
    assert row[0] == own.bos_token_id != row[1]


def test_a_begin_token_that_template_and_tokenizer_both_put_there_stands_once(hf):
    tokenizer = tokenizer_of("{{ bos_token }}" + CHATML, bos_token="<|endoftext|>", unk_token="<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    model = mg.load_model(hf, tokenizer=tokenizer)
    prompts = prompts_of(CHATS.values(), tokenizer)
    for prepend_bos in (None, True, False):
        rows = rows_of(model, prompts, prepend_bos=prepend_bos)
        assert rows == [ids_of(chat, tokenizer) for chat in CHATS.values()]
        assert [row.count(0) for row in rows] == [1] * len(CHATS)


@pytest.fixture(params=["left", "right"])
def side(request, model):
    before, model.tokenizer.padding_side = model.tokenizer.padding_side, request.param
    yield request.param
    model.tokenizer.padding_side = before


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_chats_in_a_batch_are_answered_as_transformers_answers_each_alone(hf, model, side, use_cache):
    """Every turn ends in the token that also fills up short rows: it must not be taken for filling."""
    own = tokenizer_of()
    expected = []
    for chat in CHATS.values():
        ids = torch.tensor([ids_of(chat, own)])
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
        with torch.inference_mode():
            new = hf.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :].tolist()
        expected.append(own.decode(new[: new.index(2)] if 2 in new else new))
    prompts = prompts_of(CHATS.values(), model)
    assert mg.complete(model, prompts, max_new_tokens=6, use_cache=use_cache, progress=False) == expected
    assert len(set(expected)) > 1


def test_chats_in_a_batch_are_recorded_as_each_alone(model, side):
    chats = list(CHATS.values())
    pairs = mg.PromptPairs.from_chats(chats, chats[::-1], tokenizer=model)
    acts = mg.record(model, pairs, ["resid_post", "post"], progress=False)
    for place, chat in enumerate(chats):
        alone = mg.record(
            model, mg.PromptPairs.from_chats([chat], [chat], tokenizer=model), ["resid_post", "post"], progress=False
        )
        for site in acts.sites:
            expected = alone.site(site).memorized[0]
            bound = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(acts.site(site).memorized[place], expected, rtol=0, atol=bound)
            np.testing.assert_allclose(acts.site(site).generalized[-1 - place], expected, rtol=0, atol=bound)

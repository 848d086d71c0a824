"""A saved model comes back as it was: logits bit for bit, precision, padding side; and nobody's file is lost."""

import helpers
import pytest
import torch

import memgen_lens as mg
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.models import load_model, save_model

pytestmark = helpers.hooked_only  # every kind of HookedTransformer; native Bridges are float32 and of few kinds

TASK = helpers.tiny_task()
TOKENS = torch.randint(len(TASK.tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
CONFIGURATIONS = [
    *({"dtype": dtype} for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    {"dtype": torch.float64, "positional_embedding_type": "rotary", "rotary_dim": 6},
    {"dtype": torch.bfloat16, "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
    {"default_prepend_bos": False},
    {"positional_embedding_type": "alibi"},
    {"positional_embedding_type": "shortformer"},
    {"normalization_type": None, "attn_only": True, "d_mlp": None, "act_fn": None},
    {"n_key_value_heads": 2},
    {"parallel_attn_mlp": True, "use_attn_scale": False},
    {"attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 3.0},
    {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local", "global"]},
    {"attention_dir": "bidirectional"},
    {"scale_attn_by_inverse_layer_idx": True, "eps": 1e-3},
    {"d_vocab_out": 7, "rotary_base": 100, "positional_embedding_type": "rotary", "rotary_dim": 4},
]


def build(side: str = "right", **settings):
    model = helpers.hooked_transformer(d_vocab=len(TASK.tokenizer), **settings)
    model.set_tokenizer(helpers.tiny_task().tokenizer, default_padding_side=side)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=str)
def test_a_saved_model_comes_back_with_equal_logits_precision_and_padding(tmp_path, settings, side):
    model = build(side, **settings)
    again = load_model(save_model(model, tmp_path / "model"))
    found, expected = again(TOKENS), model(TOKENS)
    assert found.dtype == expected.dtype == settings.get("dtype", torch.float32)
    assert torch.equal(found, expected)
    assert again.cfg.dtype == model.cfg.dtype and again.cfg.default_prepend_bos == model.cfg.default_prepend_bos
    assert again.tokenizer.padding_side == side
    assert torch.equal(again.to_tokens(["1+2=", "3"]), model.to_tokens(["1+2=", "3"]))


def test_weights_of_another_precision_than_the_config_names_keep_it(tmp_path):
    model = build().double()
    again = load_model(save_model(model, tmp_path / "model"))
    assert again.W_E.dtype == torch.float64 and torch.equal(again(TOKENS), model(TOKENS))


def test_a_precision_that_torch_does_not_have_is_a_damaged_config(tmp_path):
    path = save_model(build(dtype=torch.float64), tmp_path / "model") / "config.json"
    text = path.read_text()
    for name in ("float65", "nn"):
        path.write_text(text.replace("float64", name))
        with pytest.raises(RunDirectoryError, match="The file is damaged"):
            load_model(path.parent)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_saving_over_somebody_elses_file_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(RunDirectoryError, match=f"save_model.*{name}, which it did not write"):
        save_model(build(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_saving_again_replaces_our_own_and_leaves_what_lies_beside(tmp_path):
    save_model(build(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save_model(build(seed=3), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(load_model(tmp_path)(TOKENS), build(seed=3)(TOKENS))


def test_an_empty_directory_is_refused_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for call in (lambda: save_model(build(), ""), lambda: load_model("")):
        with pytest.raises(RunDirectoryError, match="expected a path; received ''"):
            call()
    assert save_model(build(), "~/m") == tmp_path / "m"
    mg.load_model("~/m")

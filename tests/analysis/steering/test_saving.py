"""A steering saved and read again does the same, on the model that it was saved for and on no other."""

import json
from dataclasses import fields, replace

import helpers
import interventions
import numpy as np
import planted
import pytest
import torch
from interventions import MODES, steering

import memgen_lens as mg
from memgen_lens.analysis.steering.controls import control_draws, controls_of
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.core.errors import ModelError, RunDirectoryError, SiteError
from memgen_lens.models.fingerprint import Fingerprint

NATIVE = not helpers.HAS_HOOKED_TRANSFORMER
FITTED = {"clusters": {"n_clusters": 3}, "low_rank": {"rank": 2}}


@pytest.fixture(scope="module")
def world():
    return interventions.talking(native=NATIVE)


def made(world, name):
    if name not in FITTED:
        return steering(world, name)
    how = {"kind": name, "top_fraction": 0.3} | FITTED[name]
    return mg.Steering.from_activations(world.scores["post"], world.acts, **how)


def logits(world, steer, toward):
    with steer.applied(world.model, toward=toward, pairs=range(8)):
        return world.model(world.tokens)


@pytest.mark.parametrize("name", [*MODES, "direction", *FITTED])
def test_every_mode_does_the_same_again_its_controls_too(world, tmp_path, name):
    steer = made(world, name)
    assert steer.save(tmp_path / "kept", model=world.model) == tmp_path / "kept"
    again = mg.Steering.load(tmp_path / "kept")
    assert again.setting == steer.setting and again.fingerprint == Fingerprint.of(world.model)
    for field in fields(steer):
        value = getattr(steer, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, field.name), value)
    for toward in ("generalization", "memorization"):
        assert torch.equal(logits(world, again, toward), logits(world, steer, toward))
        for control in controls_of(steer):
            (old, *_), (new, *_) = (
                control_draws(s, control, 1, np.random.default_rng(0)) or [s] for s in (steer, again)
            )
            assert torch.equal(logits(world, new, toward), logits(world, old, toward))
    if steer.rules is not None:
        assert again.rules.predicted(again.selected) == steer.rules.predicted(steer.selected)
    if steer.scores is not None:
        np.testing.assert_array_equal(again.scores.q, steer.scores.q)
        assert (again.scores.site, again.scores.n_items) == (steer.scores.site, steer.scores.n_items)


def test_a_saved_steering_can_be_written_over_by_another(world, tmp_path):
    made(world, "shift").save(tmp_path)
    made(world, "clamp").save(tmp_path)
    assert mg.Steering.load(tmp_path).setting.mode == "clamp"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "steering.json",
        "steering.safetensors",
    ]


# Which model


def test_on_other_weights_it_is_an_error_that_says_so_and_nothing_is_steered(world, tmp_path):
    other = interventions.talking_model(native=NATIVE, scale=0.5)
    steer = made(world, "shift")
    steer.save(tmp_path, model=world.model)
    again, before = mg.Steering.load(tmp_path), other(world.tokens)
    words = (
        r"the model that it was saved for.*received .* with weights of SHA-256 \w{12}…, not \w{12}….*fingerprint=None"
    )
    with pytest.raises(ModelError, match=words), again.applied(other, toward="memorization"):
        pass
    with pytest.raises(ModelError, match="SHA-256"):
        again.hooks(other, toward="memorization")
    with pytest.raises(ModelError, match="SHA-256"):
        steered_outputs(other, ["abM="], [again], toward="memorization", max_new_tokens=1)
    assert torch.equal(other(world.tokens), before) and planted.hooks_on(other) == {}
    with replace(again, fingerprint=None).applied(other, toward="memorization"):
        assert not torch.equal(other(world.tokens), before)


def test_on_a_model_of_other_sizes_the_sizes_are_told(world, tmp_path):
    made(world, "direction").save(tmp_path, model=world.model)
    other = helpers.hooked_transformer(native=NATIVE)
    other.tokenizer = world.model.tokenizer
    with (
        pytest.raises(ModelError, match=r"n_layers 3, not 2; d_model 24, not 22; d_vocab 13, not \d+\."),
        mg.Steering.load(tmp_path).applied(other, toward="memorization"),
    ):
        pass


def test_one_that_was_saved_without_a_model_steers_any_of_its_shape(world, tmp_path):
    made(world, "shift").save(tmp_path)
    again, other = mg.Steering.load(tmp_path), interventions.talking_model(native=NATIVE, scale=0.5)
    assert again.fingerprint is None
    with again.applied(other, toward="memorization"):
        other(world.tokens)


def test_fitted_to_a_model_it_knows_it_and_refuses_one_without_the_site(world, known):
    fitted = made(world, "clamp").fitted_to(world.model)
    with fitted.applied(world.model, toward="memorization"):
        world.model(world.tokens)
    with pytest.raises(ModelError, match="SHA-256"), fitted.applied(known.model, toward="memorization"):
        pass
    assert fitted.fitted_to(known.model).fingerprint == Fingerprint.of(known.model)
    rho = np.ones((3, planted.D_MLP))
    deep = mg.Steering.from_scores(replace(known.score, nmd=rho, rho=rho, score=rho, p=rho, q=rho, p_family=rho))
    with pytest.raises(SiteError, match="3 layers"):
        deep.fitted_to(known.model)


def test_the_same_model_in_half_precision_is_the_same_and_one_step_of_training_is_not(world):
    own = Fingerprint.of(world.model)
    half = interventions.talking_model(native=NATIVE).to(torch.bfloat16)
    assert own.differences(Fingerprint.of(half)) == []
    tuned = interventions.talking_model(native=NATIVE)
    with torch.no_grad():
        helpers.weights(tuned).blocks[1].mlp.W_out.add_(0.05)
    (difference,) = own.differences(Fingerprint.of(tuned))
    assert "SHA-256" in difference


@helpers.hooked_only
def test_a_hooked_transformer_and_a_native_bridge_of_the_same_weights_are_the_same_model(world, tmp_path):
    made(world, "shift").save(tmp_path, model=world.model)
    bridge = interventions.talking_model(native=True)
    with mg.Steering.load(tmp_path).applied(bridge, toward="memorization"):
        steered = bridge(world.tokens)
    torch.testing.assert_close(steered, logits(world, made(world, "shift"), "memorization"), rtol=1e-4, atol=1e-4)


# Files


def test_somebody_elses_file_is_not_overwritten_and_nothing_is_written(world, tmp_path):
    (tmp_path / "steering.json").write_text("the user's own")
    with pytest.raises(RunDirectoryError, match=r"steering\.json, which it did not write"):
        made(world, "shift").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["steering.json"]


def spoil_array(folder):
    path = folder / "steering.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edited(**changes):
    def edit(folder):
        path = folder / "steering.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (spoil_array, "another SHA-256 than that of the steering.safetensors"),
        (lambda folder: (folder / "steering.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "steering.json").write_text("{"), "not JSON"),
        (edited(format=99), "format 99, which this version of memgen_lens does not know"),
        (edited(setting={}), r"content that is not its own \(TypeError"),
        (
            edited(setting={"site": "post", "top_fraction": 1, "alpha": 1, "positions": "answer", "mode": "x"}),
            r"content that is not its own",
        ),
    ],
)
def test_a_damaged_folder_is_one_error_that_says_what_is_wrong(world, tmp_path, harm, words):
    made(world, "shift").save(tmp_path)
    harm(tmp_path)
    with pytest.raises(RunDirectoryError, match=words):
        mg.Steering.load(tmp_path)

"""One vector a layer: given, the mean difference, and a sparse autoencoder's decoder row as SAELens holds it."""

from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError, SiteError

HOOK = "blocks.1.hook_resid_post"


class Metadata:
    """What SAELens 6 keeps beside an autoencoder's settings: whatever is not there is None."""

    def __init__(self, **known):
        self.__dict__.update(known)

    def __getattr__(self, name):
        return None


def autoencoder(*, metadata=None, weights=None, **settings):
    """An object with the attributes of `sae_lens.SAE` that matter here."""
    weights = torch.nn.Parameter(torch.eye(planted.D_MODEL)[:5]) if weights is None else weights
    cfg = SimpleNamespace(d_in=planted.D_MODEL, d_sae=5, normalize_activations="none", **settings)
    if metadata is not None:
        cfg.metadata = metadata
    return SimpleNamespace(W_dec=weights, b_dec=torch.zeros(planted.D_MODEL), cfg=cfg)


def written(model, steer, toward, text="abM="):
    """What a steering adds at the last position of the residual stream behind each block."""

    def looked(into):  # by the name that was asked for: a Bridge's hook point knows its own
        def at(name):
            return name, lambda h, hook: into.update({name: h[0, -1].detach()})

        return [at(f"blocks.{layer}.hook_resid_post") for layer in range(planted.N_LAYERS)]

    plain, seen = {}, {}
    model.run_with_hooks(text, fwd_hooks=looked(plain))
    with steer.applied(model, toward=toward):
        model.run_with_hooks(text, fwd_hooks=looked(seen))
    return torch.stack([seen[name] - plain[name] for name in plain])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_a_vector_is_added_towards_what_it_points_to_and_taken_away_towards_the_other(known, kind):
    vector = np.linspace(-1, 1, planted.D_MODEL)
    how = {"site": "resid_post", "layers": [1], "alpha": 3.0}
    for points_to, sign in (("memorization", 1), ("generalization", -1)):
        steer = mg.Steering.from_direction(kind(vector), points_to=points_to, **how)
        assert (steer.setting.mode, steer.setting.alpha, steer.setting.chosen) == ("direction", 3.0, "a direction")
        for toward, side in (("memorization", 1), ("generalization", -1)):
            added = written(known.model, steer, toward)
            np.testing.assert_allclose(added[1], sign * side * 3 * vector, atol=1e-5)
            assert not added[0].any()


def test_vectors_go_to_the_layers_they_are_named_for(known):
    vectors = np.stack([np.full(planted.D_MODEL, 2.0), np.full(planted.D_MODEL, -1.0)])
    turned = mg.Steering.from_direction(vectors, site="resid_post", layers=[1, 0])
    np.testing.assert_array_equal(turned.shift, vectors[::-1])
    shared = mg.Steering.from_direction(vectors[0], site="resid_post", layers=[0, 1])
    np.testing.assert_array_equal(shared.shift, vectors[[0, 0]])
    point = mg.Steering.from_direction(vectors[0], site=HOOK)
    np.testing.assert_allclose(written(known.model, point, "memorization")[1], vectors[0], atol=1e-5)


def test_a_tensor_of_any_type_and_history_is_taken():
    vector = torch.ones(4, dtype=torch.bfloat16, requires_grad=True) * 2
    np.testing.assert_array_equal(mg.Steering.from_direction(vector, site=HOOK).shift, np.full((1, 4), 2.0))


def test_the_mean_difference_moves_one_sides_mean_onto_the_others(known):
    steer = mg.Steering.from_mean_difference(known.acts, "resid_post")
    acts, select = known.acts.site("resid_post"), np.flatnonzero(known.pairs.split == "select")
    expected = (acts.memorized[select].astype(float) - acts.generalized[select]).mean(0)
    np.testing.assert_allclose(steer.shift, expected, atol=1e-9)
    one = mg.Steering.from_mean_difference(known.acts, "resid_post", layers=1, alpha=0.5)
    np.testing.assert_allclose(one.shift, [np.zeros(planted.D_MODEL), 0.5 * expected[1]], atol=1e-9)
    assert one.setting.chosen == "the mean difference"


@pytest.mark.parametrize(
    "sae",
    [
        autoencoder(metadata=Metadata(hook_name=HOOK)),
        autoencoder(hook_name=HOOK, hook_layer=1, hook_head_index=None),
        autoencoder(metadata=Metadata(hook_name="blocks.0.ln2.hook_normalized", hook_name_out=HOOK)),
    ],
    ids=["SAELens 6", "before", "transcoder"],
)
def test_an_autoencoders_decoder_row_is_added_where_it_was_trained(known, sae):
    steer = mg.Steering.from_sae(sae, 3, alpha=7.0)
    assert steer.setting.site == HOOK and steer.setting.chosen == "feature 3 of an autoencoder"
    expected = np.zeros((planted.N_LAYERS, planted.D_MODEL))
    expected[1, 3] = 7
    np.testing.assert_allclose(written(known.model, steer, "memorization"), expected, atol=1e-5)


def test_a_decoder_row_that_decides_flips_every_prompt(known):
    """The planted model's decision is a coordinate of the residual stream."""
    weights = torch.zeros(2, planted.D_MODEL)
    weights[1, planted.DECISION] = 1
    steer = mg.Steering.from_sae(autoencoder(metadata=Metadata(hook_name=HOOK), weights=weights), 1, alpha=1.0)
    table = mg.evaluate_steering(known.model, None, known.pairs, steer, progress=False)
    assert table.to_generalization.shift["rate"] == table.to_memorization.shift["rate"] == 1
    assert table.to_generalization.controls["random_direction"]["mean"] < 0.5
    assert set(table.to_memorization.controls) == {"random_direction", "random_neurons", "random_sign"}


@pytest.mark.parametrize(
    ("sae", "feature", "words"),
    [
        (SimpleNamespace(), 0, r"W_dec \[feature, neuron\] and cfg.metadata.hook_name; received namespace\(\)"),
        (autoencoder(), 0, "a sparse autoencoder as SAELens has it"),
        (autoencoder(metadata=Metadata(hook_name="blocks.0.attn.hook_z", hook_head_index=2)), 0, "one of head 2 alone"),
        (autoencoder(metadata=Metadata(hook_name=HOOK)), 5, r"\(feature=...\): expected .*0 to 4; received 5"),
        (autoencoder(metadata=Metadata(hook_name=HOOK), weights=torch.zeros(2, 4)), 0, "vectors that are not 0"),
        (autoencoder(metadata=Metadata(hook_name=HOOK), weights=torch.zeros(4)), 0, "as SAELens has it"),
    ],
)
def test_what_is_no_autoencoder_or_no_feature_is_refused(sae, feature, words):
    with pytest.raises(SettingsError, match=words):
        mg.Steering.from_sae(sae, feature)


@pytest.mark.parametrize(
    ("vectors", "how", "words"),
    [
        (np.ones(4), {"site": "resid_post"}, r"the layers of 'resid_post' to add to; received None"),
        (np.ones((2, 4)), {"site": "resid_post", "layers": [0]}, "2 different layers, one a vector"),
        (np.ones(4), {"site": "resid_post", "layers": [1, 1]}, "different layers"),
        (np.ones(4), {"site": HOOK, "layers": [1]}, "which is one hook point"),
        (np.ones((2, 4)), {"site": HOOK}, "received one hook point"),
        (np.zeros(4), {"site": HOOK}, "vectors that are not 0"),
        (np.array([1, np.nan]), {"site": HOOK}, "finite vectors"),
        ("abc", {"site": HOOK}, "an array or tensor"),
        (np.ones((1, 2, 3)), {"site": HOOK}, "finite vectors: an array or tensor"),
    ],
)
def test_vectors_that_do_not_belong_to_their_layers_are_refused(vectors, how, words):
    with pytest.raises(SettingsError, match=words):
        mg.Steering.from_direction(vectors, **how)


def test_a_layer_that_the_model_lacks_or_a_vector_of_another_width_is_refused(known):
    deep = mg.Steering.from_direction(np.ones(planted.D_MODEL), site="resid_post", layers=[2])
    with pytest.raises(SiteError, match="3 layers there"), deep.applied(known.model, toward="memorization"):
        pass
    wide = mg.Steering.from_direction(np.ones(7), site=HOOK)
    with pytest.raises(SiteError, match="7 neurons"), wide.applied(known.model, toward="memorization"):
        known.model("abM=")
    with pytest.raises(SettingsError, match="0 to 1, in which the sides differ; received 2"):
        mg.Steering.from_mean_difference(known.acts, "post", layers=[2])

"""Settings are frozen and strict, and survive JSON."""

import ast
import inspect
import itertools
import math
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from memgen_lens.core.config import AnalysisConfig, FinetuneConfig, ModelConfig, Settings, TrainConfig
from memgen_lens.core.cross_fit import CrossFit
from memgen_lens.core.errors import MemgenError, SettingsError
from memgen_lens.presets import ExperimentConfig
from memgen_lens.tasks import Addition

ALL_SETTINGS = [CrossFit, ModelConfig, TrainConfig, FinetuneConfig, AnalysisConfig, Addition, ExperimentConfig]


@st.composite
def model_configs(draw):
    n_heads, half_head = draw(st.integers(1, 8)), draw(st.integers(2, 16))
    return ModelConfig(
        n_layers=draw(st.integers(1, 12)),
        d_model=n_heads * half_head * 2,
        n_heads=n_heads,
        d_mlp=draw(st.integers(4, 4096)),
        act_fn=draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        normalization_type=draw(st.sampled_from(["LN", "RMS"])),
        positional_embedding_type=draw(st.sampled_from(["standard", "rotary"])),
        gated_mlp=draw(st.booleans()),
    )


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
share = st.floats(min_value=0, max_value=1)
open_share = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
train_configs = st.builds(
    TrainConfig,
    model=model_configs(),
    max_steps=st.integers(1, 10**9),
    batch_size=st.integers(2, 10**6),
    memorized_share=open_share,
    learning_rate=positive,
    weight_decay=st.floats(min_value=0, allow_infinity=False),
    beta2=open_share,
    loss=st.sampled_from(["answer", "sequence"]),
    target_generalization=share,
    target_memorization=share,
    precision=st.sampled_from(["float32", "auto"]),
    device=st.text(max_size=10),
    seed=st.integers(0, 2**32 - 1),
)
mat_configs = st.builds(
    TrainConfig,
    objective=st.just("mat"),
    cross_fit=st.none()
    | st.builds(
        CrossFit,
        folds=st.integers(2, 16),
        steps=st.integers(1, 10**9),
        flips=st.booleans(),
        temperature=positive,
        calibrated=st.booleans(),
        strength=positive,
    ),
)


@st.composite
def analysis_configs(draw):
    select = draw(st.floats(0.01, 0.98))
    return AnalysisConfig(
        sites=tuple(draw(st.lists(st.text(), min_size=1, max_size=4))),
        probe_site=draw(st.text()),
        select_share=select,
        tune_share=draw(st.floats(0, 0.99 - select, exclude_min=True)),
        n_permutations=draw(st.integers(1000, 10**6)),
        top_fractions=tuple(draw(st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5))),
        alphas=tuple(draw(st.lists(positive, min_size=1, max_size=5))),
        positions=tuple(draw(st.lists(st.sampled_from(["answer", "prompt", "all"]), min_size=1))),
    )


@settings(deadline=None, max_examples=60)
@given(st.one_of(model_configs(), train_configs, mat_configs, analysis_configs()))
def test_settings_come_back_from_json_as_they_were(config):
    again = type(config).from_json(config.model_dump_json())
    assert again == config
    assert type(again) is type(config)


def test_a_whole_experiment_comes_back_from_json_as_it_was():
    config = ExperimentConfig(
        preset="mine",
        task=Addition(n_digits=3, seed=4),
        train=TrainConfig(seed=4, model=ModelConfig(n_layers=3)),
        analysis=AnalysisConfig(sites=("mlp_out",), positions=("all",)),
        seed=4,
    )
    assert ExperimentConfig.from_json(config.model_dump_json()) == config


@pytest.mark.parametrize("cls", ALL_SETTINGS)
def test_settings_are_frozen_and_equal_ones_hash_the_same(cls):
    config = cls()
    name = next(iter(cls.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))
    assert hash(config) == hash(cls())


@pytest.mark.parametrize("cls", ALL_SETTINGS)
def test_every_setting_is_explained(cls):
    own = [part for part in cls.__mro__ if part.__module__.startswith("memgen_lens")]
    explained = {
        field.target.id
        for part in own
        for field, after in itertools.pairwise(ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert set(cls.model_fields) - explained == set()


@pytest.mark.parametrize(
    ("cls", "name", "near"),
    [
        (ModelConfig, "n_layer", "n_layers"),
        (TrainConfig, "lerning_rate", "learning_rate"),
        (AnalysisConfig, "top_fraction", "top_fractions"),
        (Addition, "n_digit", "n_digits"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_near_name(cls, name, near):
    with pytest.raises(SettingsError, match=f"a known setting; received {name}=3. Did you mean {near}") as caught:
        cls(**{name: 3})
    assert caught.value.call == cls.__name__


def test_an_unknown_setting_far_from_all_lists_what_there_is():
    with pytest.raises(SettingsError, match="Known: n_layers, d_model, n_heads"):
        ModelConfig(zzzzzzzz=1)


@pytest.mark.parametrize(
    ("cls", "text", "received", "near"),
    [
        (TrainConfig, '{"model": {"n_layer": 4}}', "model.n_layer=4", "n_layers"),
        (ExperimentConfig, '{"train": {"model": {"d_modell": 8}}}', "train.model.d_modell=8", "d_model"),
        (ExperimentConfig, '{"analysis": {"alpha": [1]}}', r"analysis.alpha=\[1\]", "alphas"),
    ],
)
def test_an_unknown_setting_inside_others_is_refused_with_its_path_and_a_near_name(cls, text, received, near):
    with pytest.raises(SettingsError, match=f"received {received}. Did you mean {near}"):
        cls.from_json(text)


@pytest.mark.parametrize(
    ("cls", "bad", "message"),
    [
        (ModelConfig, {"n_layers": 0}, "ModelConfig.n_layers: expected greater than or equal to 1; received 0"),
        (ModelConfig, {"n_layers": 2.0}, "ModelConfig.n_layers: expected a valid integer; received 2.0"),
        (ModelConfig, {"n_layers": "2"}, "ModelConfig.n_layers: expected a valid integer; received '2'"),
        (ModelConfig, {"n_layers": True}, "ModelConfig.n_layers: expected a valid integer; received True"),
        (ModelConfig, {"act_fn": "tanh"}, "expected 'gelu', 'gelu_new', 'relu' or 'silu'; received 'tanh'"),
        (ModelConfig, {"gated_mlp": 1}, "ModelConfig.gated_mlp: expected a valid boolean; received 1"),
        (TrainConfig, {"memorized_share": 1.0}, "expected less than 1; received 1.0"),
        (TrainConfig, {"memorized_share": 0.0}, "expected greater than 0; received 0.0"),
        (TrainConfig, {"batch_size": 1}, "expected greater than or equal to 2; received 1"),
        (TrainConfig, {"learning_rate": 0.0}, "expected greater than 0; received 0.0"),
        (TrainConfig, {"learning_rate": math.nan}, "received nan"),
        (TrainConfig, {"target_memorization": 1.01}, "expected less than or equal to 1; received 1.01"),
        (TrainConfig, {"loss": "all"}, "expected 'answer' or 'sequence'; received 'all'"),
        (TrainConfig, {"seed": -1}, "TrainConfig.seed: expected greater than or equal to 0; received -1"),
        (TrainConfig, {"model": "small"}, "TrainConfig.model: expected .*ModelConfig; received 'small'"),
        (AnalysisConfig, {"n_permutations": 999}, "expected greater than or equal to 1000; received 999"),
        (AnalysisConfig, {"n_controls": 19}, "expected greater than or equal to 20; received 19"),
        (AnalysisConfig, {"sites": ()}, "AnalysisConfig.sites: expected .*at least 1 item"),
        (AnalysisConfig, {"sites": "post"}, "AnalysisConfig.sites: expected a valid tuple; received 'post'"),
        (
            AnalysisConfig,
            {"positions": ("last",)},
            "expected 'answer', 'prompt', 'generated' or 'all'; received 'last'",
        ),
    ],
)
def test_a_bad_value_is_refused_saying_what_is_accepted(cls, bad, message):
    with pytest.raises(SettingsError, match=message) as caught:
        cls(**bad)
    assert caught.value.fix == f"Change {caught.value.call.split('.', 1)[1]}."


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (TrainConfig, {"learning_rate": math.inf}),
        (TrainConfig, {"weight_decay": math.inf}),
        (TrainConfig, {"max_grad_norm": math.inf}),
        (AnalysisConfig, {"alphas": (math.inf,)}),
    ],
)
def test_an_infinite_setting_is_refused_because_json_could_not_hold_it(cls, bad):
    with pytest.raises(SettingsError, match="inf"):
        cls(**bad)


def test_a_seed_beyond_what_numpy_takes_is_refused_at_once():
    assert ExperimentConfig(seed=2**32 - 1).seeded().train.seed == 2**32 - 1
    with pytest.raises(SettingsError, match=r"seed: expected .*; received 4294967296"):
        TrainConfig(seed=2**32)
    with pytest.raises(SettingsError, match=r"seed: expected .*; received 4294967296"):
        ExperimentConfig(seed=2**32).seeded()


def test_an_unknown_setting_in_a_nested_dictionary_is_refused_in_python_too():
    with pytest.raises(SettingsError, match=r"received model.n_layer=4. Did you mean n_layers"):
        TrainConfig(model={"n_layer": 4})


def test_a_long_bad_value_is_cut_in_the_message():
    with pytest.raises(SettingsError) as caught:
        TrainConfig(max_steps="9" * 500)
    assert len(caught.value.received) == 120
    assert caught.value.received.endswith("...")


@pytest.mark.parametrize(
    ("cls", "bad", "message"),
    [
        (
            ModelConfig,
            {"n_heads": 3, "d_model": 32},
            "expected n_heads that divides d_model; received n_heads=3, d_model=32",
        ),
        (
            ModelConfig,
            {"n_heads": 4, "d_model": 20, "positional_embedding_type": "rotary"},
            "expected an even d_model / n_heads for rotary positions; received n_heads=4, d_model=20",
        ),
        (
            AnalysisConfig,
            {"select_share": 0.7, "tune_share": 0.3},
            r"select_share \+ tune_share below 1.*; received 0.7 \+ 0.3",
        ),
        (AnalysisConfig, {"top_fractions": (0.1, 0.0)}, r"top_fractions: expected values in \(0, 1\]; received 0.0"),
        (AnalysisConfig, {"top_fractions": (1.5,)}, r"top_fractions: expected values in \(0, 1\]; received 1.5"),
        (AnalysisConfig, {"alphas": (2.0, -1.0)}, r"alphas: expected values in \(0, .*; received -1.0"),
        (AnalysisConfig, {"alphas": (math.nan,)}, "alphas.*: expected .*; received nan"),
    ],
)
def test_settings_at_odds_with_each_other_are_refused(cls, bad, message):
    with pytest.raises(SettingsError, match=message):
        cls(**bad)


def test_settings_of_adapters_are_refused_where_there_are_none_unless_they_are_the_defaults():
    chosen = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ("q_proj",), "layers": (0,)}
    for name, value in chosen.items():
        assert getattr(FinetuneConfig(**{name: value}), name) == value
        with pytest.raises(
            SettingsError,
            match=rf"FinetuneConfig\(method='full'\): expected no settings of adapters.*received \{{'{name}': .* "
            rf"Leave {name} out, or set method='lora'\.",
        ):
            FinetuneConfig(method="full", **{name: value})
    with pytest.raises(SettingsError, match="Leave rank, alpha, dropout, targets, layers out"):
        FinetuneConfig(method="full", **chosen)
    full = FinetuneConfig(method="full")
    assert full.but(max_steps=300).method == "full"
    assert FinetuneConfig.from_json(full.model_dump_json()) == full, "written down are the defaults"


def test_an_odd_head_width_is_fine_for_standard_positions():
    assert ModelConfig(n_heads=4, d_model=20).positional_embedding_type == "standard"


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[1, 2]", "null"])
def test_text_that_holds_no_settings_is_refused(text):
    with pytest.raises(SettingsError, match=r"TrainConfig.* expected (Invalid JSON|an object)"):
        TrainConfig.from_json(text)


def test_a_bad_value_in_json_names_its_path():
    message = "TrainConfig.model.n_layers: expected .* 1; received 0. Change model.n_layers"
    with pytest.raises(SettingsError, match=message):
        TrainConfig.from_json('{"model": {"n_layers": 0}}')


def test_but_changes_only_what_it_names_and_leaves_the_first_alone():
    config = TrainConfig(max_steps=10, seed=3)
    changed = config.but(seed=4)
    assert (changed.seed, changed.max_steps) == (4, 10)
    assert changed.but(seed=3) == config
    assert config.seed == 3


def test_but_checks_like_a_new_one():
    with pytest.raises(SettingsError, match="Did you mean max_steps"):
        TrainConfig().but(max_step=3)
    with pytest.raises(SettingsError, match="n_heads that divides d_model"):
        ModelConfig().but(n_heads=3)
    with pytest.raises(MemgenError, match="Lower them, or raise n_digits"):
        Addition().but(n_digits=1)


def test_the_nested_defaults_are_checked_too():
    class Outer(Settings):
        inner: ModelConfig = "no model"  # type: ignore[assignment]

    with pytest.raises(SettingsError, match=r"Outer.inner"):
        Outer()


@pytest.mark.parametrize("train", [5, "x", None, ModelConfig()])
def test_what_is_no_way_to_learn_is_refused_in_our_words(train):
    with pytest.raises(SettingsError, match=r"\.train: expected a valid dictionary or instance of TrainConfig"):
        ExperimentConfig(train=train)


def test_settings_of_a_subclass_are_settings():
    class Mine(TrainConfig):
        """Somebody's own."""

    assert ExperimentConfig(train=Mine(max_steps=7)).train.max_steps == 7


def test_an_unknown_setting_that_is_named_like_the_one_around_it_is_told_where_it_stands():
    with pytest.raises(SettingsError, match=r"received train\.train=3\. "):
        ExperimentConfig.from_json('{"train": {"train": 3}}')

"""Grids of settings and seeds, and the names of their runs."""

import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError
from memgen_lens.grids import named, parsed_seeds, parsed_setting


def test_a_grid_is_every_combination_with_every_seed():
    found = mg.grid("quickstart", seeds=range(2), settings={"task.n_memorized": [100, 300], "train.max_steps": [400]})
    assert list(found) == [f"n_memorized={n},seed={seed}" for n in (100, 300) for seed in (0, 1)]
    config = found["n_memorized=300,seed=1"]
    assert (config.task.n_memorized, config.seed, config.task.seed, config.train.seed) == (300, 1, 1, 1)
    assert all(config.train.max_steps == 400 for config in found.values()), "one value changes all runs alike"
    preset = mg.presets["quickstart"]
    same = preset.but(seed=1, train=preset.train.but(max_steps=400)).seeded()
    assert config == same, "nothing else changes"


def test_a_name_tells_two_settings_of_one_last_name_apart():
    tried = {
        "train.plant": [{"layer": 0, "neurons": [1]}, {"layer": 1, "neurons": [1]}],
        "train.model.n_layers": [2, 3],
    }
    names = list(mg.grid("quickstart", settings=tried))
    assert names[0] == "n_layers=2,layer=0,seed=0" and len(set(names)) == 4
    preset = mg.presets["quickstart"]
    both = [preset.but(task=preset.task.but(seed=s, n_memorized=n), seed=s) for s, n in ((0, 300), (7, 100))]
    assert list(named(both)) == ["n_memorized=300,seed=0", "n_memorized=100,seed=7"]


def test_long_names_are_cut_and_told_apart():
    tried = {"analysis.alphas": [[round(1 + i / 1000, 3) for i in range(60)], [1.0, 2.0], [1.0] * 61]}
    names = list(mg.grid("quickstart", settings=tried))
    assert len(set(names)) == 3 and all(len(name) <= 100 and "/" not in name for name in names)
    assert names[1] == "alphas=1.0-2.0,seed=0"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task.n_memorised": [1]}, "expected a known setting; received n_memorised=1. Did you mean n_memorized"),
        ({"tsk.n_memorized": [1]}, "expected a known setting; received tsk="),
        ({"train.max_steps.more": [1]}, "expected a known setting; received 'train.max_steps.more'"),
        ({"train.max_steps": ["many"]}, "valid integer"),
        ({"train.max_steps": []}, "at least one value of a setting"),
        ({"seed": [1, 2]}, "seeds are set by seeds="),
        ({"task.n_memorized": [10**6]}, "n_memorized"),
        ({"train.max_steps": [object()]}, "values as JSON has them"),
    ],
)
def test_a_bad_setting_is_told(settings, says):
    with pytest.raises(mg.MemgenError) as refused:
        mg.grid("quickstart", settings=settings)
    assert says in str(refused.value)


def test_two_experiments_that_are_alike_are_refused():
    preset = mg.presets["quickstart"]
    with pytest.raises(SettingsError, match=r"configs\[0\] and configs\[2\], which are alike"):
        named([preset, preset.but(seed=1), preset.but(about="the same by another name")])
    with pytest.raises(SettingsError, match="expected a folder's name; received 'a/b'"):
        named({"a/b": preset})


def test_what_the_shell_writes_is_read():
    assert parsed_seeds("0-3, 7,12") == [0, 1, 2, 3, 7, 12]
    assert parsed_setting("task.n-memorized=100,300") == ("task.n_memorized", [100, 300])
    assert parsed_setting("train.loss=answer,sequence") == ("train.loss", ["answer", "sequence"])
    assert parsed_setting('analysis.sites=["post"],["post","z"]') == ("analysis.sites", [["post"], ["post", "z"]])
    assert parsed_setting("train.learning_rate=1e-3,0.01") == ("train.learning_rate", [0.001, 0.01])
    for text in ("3-1", "a", "", "1,,2", "-1"):
        with pytest.raises(SettingsError, match="expected seeds such as 0-9"):
            parsed_seeds(text)
    for text in ("task.n_memorized", "=3", "a="):
        with pytest.raises(SettingsError, match=r"expected NAME=VALUE\[,VALUE...\]"):
            parsed_setting(text)

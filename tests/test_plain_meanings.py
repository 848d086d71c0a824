"""What has a plain meaning where a list belongs is taken as meant, and what has none is refused."""

import numpy as np
import planted
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError

MARKED = ["aM=", "bcG="]


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


@pytest.fixture(scope="module")
def score(model):
    return mg.attribute(mg.record(model, planted.prompt_pairs(60), "post", progress=False), "post")


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("aM=", ["m"]),
        (np.str_("bcG="), ["r"]),
        (MARKED, ["m", "r"]),
        (tuple(MARKED), ["m", "r"]),
        ((prompt for prompt in MARKED), ["m", "r"]),
        (np.array(MARKED), ["m", "r"]),
        ([], []),
    ],
    ids=["text", "numpy text", "list", "tuple", "generator", "array", "none"],
)
def test_prompts(model, prompts, says):
    assert mg.complete(model, prompts, max_new_tokens=2, progress=False) == says


def test_one_fraction_one_layer_one_position_and_one_set_of_scores(model, score):
    pairs = planted.prompt_pairs(60)
    how = {"alphas": [2.0], "progress": False}
    listed = mg.sweep_steering(
        model, None, pairs, [score], top_fractions=[0.1], layers=[[1]], positions=["answer"], **how
    )
    alone = mg.sweep_steering(model, None, pairs, score, top_fractions=0.1, layers=1, positions="answer", **how)
    assert alone == listed and listed[0].layers == (1,)
    one, other = (mg.Steering.from_scores(score, 0.1, layers=layers) for layers in (1, [1]))
    np.testing.assert_array_equal(one.selected, other.selected)
    assert one.selected[1].any() and not one.selected[0].any()


@pytest.mark.parametrize("number", [np.int64(2), np.float32(2).astype(int)])
def test_numpy_numbers(model, number):
    assert mg.complete(model, "aM=", max_new_tokens=number, batch_size=number, progress=False) == ["m"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch_size": 0}, r"complete\(batch_size=...\): expected .* equal to 1; received 0"),
        ({"max_new_tokens": -1}, r"complete\(max_new_tokens=...\): expected .* equal to 1; received -1"),
        ({"max_new_tokens": 1.5}, "expected a valid integer; received 1.5"),
        ({"prompts": 3}, r"complete\(prompts=...\): expected a valid string; received 3"),
        ({"prompts": [b"aM="]}, "expected a valid string; received b'aM='"),
        ({"progress": "no"}, r"complete\(progress=...\): expected a valid boolean; received 'no'"),
    ],
)
def test_what_has_no_plain_meaning_is_refused(model, wrong, says):
    with pytest.raises(SettingsError, match=says):
        mg.complete(model, **({"prompts": "aM=", "max_new_tokens": 2} | wrong))

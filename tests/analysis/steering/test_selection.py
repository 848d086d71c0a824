"""Which neurons a steering takes: a fraction, a number, a level of q, a list; per layer or over all."""

from dataclasses import replace

import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores

RHO = np.array([[0.1, -0.9, 0.2, 0.05], [0.3, 0.0, -0.8, 0.25]])
Q = np.array([[0.9, 0.001, 0.04, 0.9], [0.03, 1.0, 0.05, 0.06]])
SCORES = NeuronScores("post", RHO, RHO, Q, Q, Q, 8, 8)


def chosen(**how):
    steer = mg.Steering.from_scores(SCORES, **how)
    assert (steer.shift != 0).sum() <= steer.selected.sum()
    return [tuple(place) for place in np.argwhere(steer.selected).tolist()], steer.setting


@pytest.mark.parametrize(
    ("how", "places", "words"),
    [
        ({"top_k": 1}, [(0, 1)], "top 1"),
        ({"top_k": 3}, [(0, 1), (1, 0), (1, 2)], "top 3"),
        ({"top_k": 1, "per_layer": True}, [(0, 1), (1, 2)], "top 1 of each layer"),
        ({"top_k": 2, "per_layer": True}, [(0, 1), (0, 2), (1, 0), (1, 2)], "top 2 of each layer"),
        ({"top_fraction": 0.5, "per_layer": True}, [(0, 1), (0, 2), (1, 0), (1, 2)], "top 50 % of each layer"),
        ({"top_fraction": 0.5}, [(0, 1), (1, 0), (1, 2), (1, 3)], None),
        ({"max_q": 0.05}, [(0, 1), (0, 2), (1, 0), (1, 2)], "neurons with q of at most 0.05"),
        ({"max_q": 0.002}, [(0, 1)], "neurons with q of at most 0.002"),
        ({"neurons": [(1, 1), (0, 3)]}, [(0, 3), (1, 1)], "2 given neurons"),
        ({"neurons": RHO > 0.22}, [(1, 0), (1, 3)], "2 given neurons"),
        ({"neurons": np.array([[1, 3]])}, [(1, 3)], "1 given neuron"),
        ({"top_k": 3, "layers": [1]}, [(1, 0), (1, 2)], "top 3"),
        ({"max_q": 0.05, "layers": 0}, [(0, 1), (0, 2)], "neurons with q of at most 0.05"),
        ({}, [(0, 1)], None),
    ],
)
def test_each_way_to_choose_takes_its_neurons_and_says_so(how, places, words):
    found, setting = chosen(**how)
    assert found == places and setting.chosen == words
    expected = how.get("top_fraction", 0.1) if words is None else len(places) / 8
    assert setting.top_fraction == pytest.approx(expected)


def test_of_a_causal_methods_scores_only_those_above_zero_are_taken():
    scores = replace(SCORES, method="attribution_patching", score=RHO)
    assert np.argwhere(mg.Steering.from_scores(scores, top_k=8).selected).tolist() == np.argwhere(RHO > 0).tolist()
    assert np.argwhere(mg.Steering.from_scores(scores, max_q=0.05).selected).tolist() == [[0, 2], [1, 0]]
    given = mg.Steering.from_scores(scores, neurons=[(0, 1)])
    assert given.selected.sum() == 1, "a list is taken as it is"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"top_fraction": 0.1, "top_k": 3}, "one way to choose neurons.*received top_fraction and top_k"),
        ({"max_q": 0.05, "neurons": [(0, 0)]}, "received max_q and neurons"),
        ({"max_q": 0.05, "per_layer": True}, "per_layer=True with top_fraction or top_k alone; received .*max_q"),
        ({"neurons": [(0, 0)], "per_layer": True}, "received per_layer=True and neurons"),
        ({"top_k": 9}, r"top_k=...\): expected at most 8, the neurons of the site; received 9"),
        ({"top_k": 5, "per_layer": True}, "at most 4, the neurons of a layer; received 5"),
        ({"top_k": 0}, "greater than or equal to 1; received 0"),
        ({"max_q": 0.0005}, "some neuron's q is not above; received 0.0005, where the smallest q is 0.001"),
        ({"neurons": [(0, 4)]}, r"2x4 of them \(layers x neurons\); received \(0, 4\)"),
        ({"neurons": [(-1, 0)]}, r"received \(-1, 0\)"),
        ({"neurons": np.ones((3, 4), dtype=bool)}, "received a mask of 3x4"),
        ({"neurons": []}, r"a list of \(layer, neuron\), or a boolean mask"),
        ({"neurons": [(0.5, 1.0)]}, r"a list of \(layer, neuron\), or a boolean mask"),
        ({"neurons": [0, 1]}, r"a list of \(layer, neuron\), or a boolean mask"),
    ],
)
def test_what_chooses_nothing_or_twice_is_refused(how, words):
    with pytest.raises(SettingsError, match=words):
        mg.Steering.from_scores(SCORES, **how)

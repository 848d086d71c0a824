"""A threshold keeps to a rate of false triggers, and lies in the middle of the gap."""

import numpy as np
import pytest
from scipy.special import logit

from memgen_lens.analysis.steering.threshold import choose_threshold

ITEMS = np.arange(4)
WANTED = np.array([-1.0, 2.0, 3.0, 5.0])


def chosen(rate, **unwanted):
    sets = {name: np.array(odds, dtype=float) for name, odds in unwanted.items()}
    return choose_threshold(WANTED, sets, ITEMS, false_trigger_rate=rate)


@pytest.mark.parametrize(
    ("rate", "cut", "caught", "triggered"),
    [
        (0.0, 2.5, 2, 0),  # above 2.0, the largest: between it and the next wanted one, 3.0
        (0.24, 2.5, 2, 0),  # a quarter of four is one, and less is none
        (0.25, 1.0, 3, 1),  # the largest may trigger: between 0.0 and 2.0
        (0.75, -2.5, 4, 2),
    ],
)
def test_the_lowest_that_keeps_to_the_rate_in_the_middle_of_its_gap(rate, cut, caught, triggered):
    found = chosen(rate, tune=[-4.0, -3.0, 0.0, 2.0])
    assert logit(found.threshold) == pytest.approx(cut)
    assert found.caught["k"] == caught and found.triggered["tune"]["k"] == triggered
    assert found.false_trigger_rate == rate


def test_every_set_keeps_to_the_rate_by_itself():
    found = chosen(0.1, tune=[-9.0] * 4, validation=[4.0, *[-9.0] * 9])
    assert logit(found.threshold) == pytest.approx((-9.0 - 1.0) / 2), "one of ten may trigger"
    assert found.triggered["validation"]["k"] == 1 and found.triggered["tune"]["k"] == 0
    found = chosen(0.05, tune=[-9.0] * 4, validation=[4.0, *[-9.0] * 9])
    assert logit(found.threshold) == pytest.approx(4.5)


def test_where_nothing_wanted_lies_above_nothing_triggers():
    found = chosen(0.0, tune=[9.0] * 4)
    assert found.caught["k"] == 0 and found.triggered["tune"]["k"] == 0


def test_log_odds_beyond_what_a_probability_can_tell_trigger_nothing():
    found = choose_threshold(np.array([80.0]), {"tune": np.array([70.0])}, np.arange(1), false_trigger_rate=0.0)
    assert found.threshold == 1.0 and found.caught["k"] == found.triggered["tune"]["k"] == 0

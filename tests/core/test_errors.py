"""Errors say the call, what was expected, what came and the way out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen_lens.core import errors
from memgen_lens.core.errors import MemgenError, suggest

KINDS = [
    errors.SettingsError,
    errors.TaskError,
    errors.ModelError,
    errors.SiteError,
    errors.PairsError,
    errors.RunDirectoryError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_is_caught_as_memgen_error_and_as_value_error(kind):
    error = kind("f(x=3)", expected="x below 2", received="3", fix="Lower x.")
    assert isinstance(error, MemgenError)
    assert isinstance(error, ValueError)
    assert str(error) == "f(x=3): expected x below 2; received 3. Lower x."
    assert (error.call, error.expected, error.received, error.fix) == ("f(x=3)", "x below 2", "3", "Lower x.")


def test_suggest_names_the_near_names_nearest_first():
    assert suggest("resid_pots", ["mlp_out", "resid_pre", "resid_post"]) == "Did you mean resid_post or resid_pre?"


def test_suggest_lists_all_names_where_none_is_near():
    assert suggest("zzz", ["resid_pre", "post"]) == "Known: resid_pre, post."


def test_suggest_says_so_where_nothing_is_known():
    assert suggest("zzz", []) == "None are known."


def test_suggest_takes_any_iterable_once():
    assert suggest("zzz", (name for name in ("a", "b"))) == "Known: a, b."


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.data())
def test_suggest_puts_a_name_that_is_known_first(known, data):
    name = data.draw(st.sampled_from(known))
    assert suggest(name, known).startswith(f"Did you mean {name}")

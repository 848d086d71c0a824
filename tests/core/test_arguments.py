"""Arguments are checked at the door: what is plain is taken as meant, the rest is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import PairsError, RunDirectoryError, SettingsError, shortened


@arguments(
    prompts=kinds.Texts,
    n=kinds.Count,
    share=kinds.Share | None,
    out=kinds.place("took") | None,
    layers=kinds.several(kinds.Indices | None),
    toward=kinds.DirectionName,
    seed=kinds.Seed,
)
def took(prompts, n=1, *, share=None, out=None, layers=None, toward="memorization", seed=0):
    """What it was called with."""
    return prompts, n, share, out, layers, toward, seed


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("one prompt", ["one prompt"]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ((c for c in "ab"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.str_("a"), ["a"]),
        ([np.str_("a")], ["a"]),
        ({"a": 1}.keys(), ["a"]),
    ],
)
def test_prompts_are_taken_as_they_are_meant(given, taken):
    prompts = took(given)[0]
    assert prompts == taken and all(type(text) is str for text in prompts)


@pytest.mark.parametrize(
    ("given", "taken"), [(1, [[1]]), ([1, 2], [[1], [2]]), ([[0, 1], None], [[0, 1], None]), (np.array([1]), [[1]])]
)
def test_one_layer_is_a_list_of_one(given, taken):
    assert took("a", layers=given)[4] == taken


def test_numpy_numbers_are_numbers_and_a_tilde_is_the_users_folder():
    _, n, share, out, *_ = took("a", np.int64(3), share=np.float32(0.5), out="~/runs")
    assert (n, type(n), share, out) == (3, int, 0.5, Path.home() / "runs")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"prompts": 3}, r"took\(prompts=\.\.\.\): expected a valid string; received 3. Change prompts"),
        ({"prompts": b"a"}, "valid string; received b'a'"),
        ({"prompts": ["a", None]}, "valid string; received None"),
        ({"prompts": {"a", "b"}}, "valid string"),
        ({"prompts": "a", "n": 0}, r"took\(n=\.\.\.\): expected greater than or equal to 1; received 0"),
        ({"prompts": "a", "n": -1}, "received -1"),
        ({"prompts": "a", "n": True}, "a number, not True or False; received True"),
        ({"prompts": "a", "n": 1.5}, "valid integer; received 1.5"),
        ({"prompts": "a", "n": 10**30}, "less than or equal to"),
        ({"prompts": "a", "share": float("nan")}, "received nan"),
        ({"prompts": "a", "share": 1.1}, "less than or equal to 1"),
        ({"prompts": "a", "toward": "both"}, "'generalization' or 'memorization'; received 'both'"),
        ({"prompts": "a", "seed": 2**32}, "less than or equal to 4294967295"),
        ({}, "received missing a required argument: 'prompts'"),
        ({"prompts": "a", "shift": 1}, "unexpected keyword argument 'shift'"),
    ],
)
def test_what_has_no_plain_meaning_is_refused_in_one_sentence(call, says):
    with pytest.raises(SettingsError, match=says):
        took(**call)


@pytest.mark.parametrize("out", ["", 3, b"a"])
def test_a_path_that_is_none_is_refused_in_the_name_of_the_call(out):
    with pytest.raises(RunDirectoryError, match="took: expected a path"):
        took("a", out=out)


def test_an_error_of_ours_inside_a_check_stays_what_it_was():
    def refuse(value):
        raise PairsError("looking", expected="pairs", received=repr(value), fix="Give some.")

    @arguments(pairs=kinds.Annotated[object, kinds.BeforeValidator(refuse)])
    def look(pairs):
        return pairs

    with pytest.raises(PairsError, match="looking: expected pairs; received 3"):
        look(3)


def test_a_value_that_cannot_say_what_it_is_does_not_hide_what_is_wrong():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    assert shortened(Silent()) == "a Silent" and shortened("x" * 200).endswith("...")
    with pytest.raises(SettingsError, match="received a Silent"):
        took("a", n=Silent())


def test_name_and_documentation_of_the_function_are_kept():
    assert took.__name__ == "took" and took.__doc__ == "What it was called with."

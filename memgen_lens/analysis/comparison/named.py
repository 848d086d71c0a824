"""Scores of several models by name, of a kind that can be compared.

Does not compare.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores


def named_scores(
    scores: Mapping[Any, NeuronScores] | Sequence[NeuronScores],
    kind: Callable[[NeuronScores], str],
    *,
    call: str,
    expected: str,
    more: str,
    alike: str,
) -> dict[Any, NeuronScores]:
    """Scores by the models' names (a list is numbered from 0).

    Args:
        scores: Scores, one a model.
        kind: What has to be the same of all, in words.
        call: The call that needs them.
        expected: What it takes.
        more: What to do where there is one model.
        alike: What to do where they are of several kinds.

    Raises:
        SettingsError: Fewer than two models, or unlike ones.
    """
    named = dict(scores) if isinstance(scores, Mapping) else dict(enumerate(scores))
    if len(named) < 2:
        raise SettingsError(call, expected="scores of at least two models", received=str(len(named)), fix=more)
    found = sorted(set(map(kind, named.values())))
    if len(found) > 1:
        raise SettingsError(call, expected=expected, received=", ".join(found), fix=alike)
    return named

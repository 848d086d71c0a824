"""Which pairs are of one item, and which part of the data each item is dealt to.

Does not know what is done on the parts.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from memgen_lens.core.errors import PairsError, shortened


def same_prompts(keys: Iterable[Hashable], *sides: Sequence[str]) -> list[int]:
    """Merge items that share a prompt, on whichever side, and those that share one with these, and so on.

    Args:
        keys: The item of each pair.
        *sides: Prompts, one a pair.

    Returns:
        The item of each pair: its first key, where keys are numbers; else a number, in the order of first occurrence.
    """
    keys = list(keys)
    names: dict[Hashable, int] = {}
    own = [names.setdefault(("item", key), len(names)) for key in keys]
    prompts = [names.setdefault(("prompt", prompt), len(names)) for side in sides for prompt in side]
    edges = (np.ones(len(prompts)), (np.tile(np.array(own, dtype=int), len(sides)), np.array(prompts, dtype=int)))
    _, component = connected_components(coo_array(edges, shape=(len(names), len(names))), directed=False)
    numbered = all(isinstance(key, int) and abs(key) < 2**63 for key in keys)  # what a file and numpy can hold
    first: dict[int, Any] = {}
    merged = zip(keys, own, strict=True)
    return [first.setdefault(int(component[node]), key if numbered else len(first)) for key, node in merged]


def item_keys(items: Sequence[Any], call: str) -> list[int | str]:
    """Names of items as plain numbers or texts.

    Raises:
        PairsError: One is neither.
    """
    keys = [key.item() if isinstance(key, np.generic) else key for key in items]
    wrong = [key for key in keys if isinstance(key, bool) or not isinstance(key, int | str)]
    if wrong:
        raise PairsError(
            call,
            expected="items as whole numbers or names",
            received=shortened(wrong[0]),
            fix="Name the item of each pair: items=[0, 0, 1, ...].",
        )
    return keys


def split_items(keys: Sequence[int], *, shares: Sequence[float], seed: int) -> Shaped[np.ndarray, " pair"]:
    """Deal items to ``select``, ``tune`` and ``test`` at random; all rows of one item get its split.

    Raises:
        PairsError: The shares are not two that leave something to test on.
    """
    require_shares(shares)
    unique, inverse = np.unique(np.asarray(keys, dtype=np.int64), return_inverse=True)
    n_select, n_tune = (round(share * len(unique)) for share in shares)
    names = np.array(["select"] * n_select + ["tune"] * n_tune + ["test"] * len(unique))[: len(unique)]
    return np.random.default_rng(seed).permutation(names)[inverse]


def require_shares(shares: Any) -> None:
    """Refuse shares of items in ``select`` and ``tune`` that leave none to test on.

    Raises:
        PairsError: They are not two numbers of at least 0 whose sum is below 1.
    """
    try:
        select, tune = (float(share) for share in shares)
        possible = select >= 0 and tune >= 0 and select + tune < 1 - 1e-9
    except (TypeError, ValueError):
        possible = False
    if not possible:
        raise PairsError(
            "shares",
            expected="the shares of items in select and in tune, each at least 0 and together below 1",
            received=shortened(shares),
            fix="The rest is the test: shares=(0.4, 0.2) leaves 40 % to it.",
        )

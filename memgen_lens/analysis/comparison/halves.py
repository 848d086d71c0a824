"""Do two halves of the pairs find the same neurons?

Does not train.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import hypergeom, rankdata

from memgen_lens.analysis.attribution.streaming import correlation
from memgen_lens.analysis.comparison.resampled import PairSums
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import SplitHalf
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import MINIMUM_PAIRS, PairSplit
from memgen_lens.core.records import Activations
from memgen_lens.core.stats import largest, row_correlation

SPLITS_A_BLOCK = 10
MINIMUM_ITEMS = 2 * MINIMUM_PAIRS
"""Fewer items than this leave fewer than 8 to a half."""


@arguments(
    "consistency.split_half",
    acts=kinds.one(Activations),
    site=kinds.Text,
    split=kinds.PairSplitName | None,
    n_splits=kinds.Count,
    top_fraction=kinds.OpenShare,
    seed=kinds.Seed,
)
def split_half(
    acts: Activations,
    site: str,
    *,
    split: PairSplit | None = None,
    n_splits: int = 100,
    top_fraction: float = 0.1,
    seed: int = 0,
) -> SplitHalf:
    """Whether two random halves of the pairs find the same neurons (intra-task consistency).

    For each of ``n_splits`` random halvings, by item: the Spearman correlation over neurons of the signed rho in one
    half with that in the other, and the share of one half's top set (largest abs(rho)) that is in the other's. Beside
    them two references: the hypergeometric mean, as if every neuron were as likely to be chosen as any other; and the
    same figures where the two labels of each item are swapped at random (all its pairs alike), which keeps what the
    hypergeometric leaves out: neurons differ in how much their pairs vary, and depend on one another. Neurons that
    are constant over these pairs are left out, as chance could not choose them either.

    The interval over splits says how much the halving matters; it is not a confidence interval for other prompts, as
    all splits share the same pairs.

    Args:
        acts: Activations recorded by `record`, of one task.
        site: One of their sites.
        split: Pairs to halve; None = all of them (nothing is fitted or chosen here).
        n_splits: Random halvings, at least 20.
        top_fraction: Share of the site's neurons in a top set, in (0, 1).
        seed: Seed of the halvings and swaps.

    Raises:
        SiteError: The site was not recorded.
        PairsError: Fewer than 16 items.
        ModelError: An activation is not finite.
        SettingsError: A value is out of range, or fewer than two neurons vary.
    """
    call = "consistency.split_half"
    if n_splits < 20:
        raise SettingsError(call, expected="n_splits of at least 20", received=str(n_splits), fix="Raise it.")
    recorded = acts.site(site)
    index = acts.pairs.of(split) if split is not None else np.arange(len(acts.pairs))
    item = acts.pairs.item[index]
    n_items = len(np.unique(item))
    if n_items < MINIMUM_ITEMS:
        raise PairsError(
            call,
            expected=f"pairs of at least {MINIMUM_ITEMS} items, so that each half has {MINIMUM_PAIRS}",
            received=f"{len(index)} pairs of {n_items} items",
            fix="Give more pairs, or split=None for all of them.",
        )
    scored = acts.pairs.take(index)
    require_finite(call, site, [recorded.memorized[index], recorded.generalized[index]], scored)
    mem, gen = (side[index].reshape(len(index), -1) for side in (recorded.memorized, recorded.generalized))
    varies = correlation(mem, gen) != 0
    if varies.sum() < 2:
        raise SettingsError(
            call,
            expected="a site at which at least two neurons vary between the prompts",
            received=f"{site!r}, at which {int(varies.sum())} does",
            fix="Choose a site behind the attention of the first layer.",
        )
    count = min(max(1, round(top_fraction * varies.size)), int(varies.sum()))
    found = _halves(mem[:, varies], gen[:, varies], np.unique(item, return_inverse=True)[1], count, n_splits, seed)
    n_varying = int(varies.sum())
    typical = round(float(np.median(found["overlap"])) * count)
    return SplitHalf(
        site=site,
        n_pairs=len(index),
        n_items=n_items,
        n_neurons=n_varying,
        n_top=count,
        top_fraction=top_fraction,
        expected_overlap=count / n_varying,
        overlap_p=float(hypergeom.sf(typical - 1, n_varying, count, count)),
        **found,
    )


def _halves(
    mem: Float[np.ndarray, "pair neuron"],
    gen: Float[np.ndarray, "pair neuron"],
    item: Int[np.ndarray, " pair"],
    count: int,
    n_splits: int,
    seed: int,
) -> dict[str, Float[np.ndarray, " split"]]:
    """Both figures of every halving, and the same with labels swapped."""
    rng = np.random.default_rng(seed)
    sums = PairSums.of(mem, gen)
    n_items = int(item.max()) + 1
    in_first = np.arange(n_items) < n_items // 2
    found: dict[str, list[np.ndarray]] = {"spearman": [], "overlap": [], "null_spearman": [], "null_overlap": []}
    for first in range(0, n_splits, SPLITS_A_BLOCK):
        block = min(SPLITS_A_BLOCK, n_splits - first)
        halves = rng.permuted(np.tile(in_first, (block, 1)), axis=1)[:, item]
        swaps = rng.choice([-1.0, 1.0], size=(block, n_items))[:, item]
        for prefix, signs in (("", np.ones_like(swaps)), ("null_", swaps)):
            a, b = (sums.rho(half.astype(np.float64), signs) for half in (halves, ~halves))
            # A half in which no neuron varies ranks none, and agrees with nothing.
            ranked = row_correlation(rankdata(a, axis=1), rankdata(b, axis=1))
            found[f"{prefix}spearman"].append(np.nan_to_num(ranked))
            found[f"{prefix}overlap"].append((largest(a, count) & largest(b, count)).sum(1) / count)
    return {name: np.concatenate(blocks) for name, blocks in found.items()}

"""Moments and sums of several processes' parts of the pairs, merged into those of all pairs, in every process.

Parts are consecutive, in the order of ranks. What one process sums up in float64 block after block is here summed up
part by part: the same to rounding. Does not know models, nor how pairs were shared out.
"""

from typing import Any

import numpy as np
import torch

from memgen_lens import processes
from memgen_lens.analysis.attribution.moments import PairMoments


def merged_moments(call: str, mine: PairMoments, width: int) -> PairMoments:
    """Moments of all pairs.

    An item's differences are summed up before they are squared, so that an item that lies in two parts is put together
    first: each part has kept its first and its last item.

    Args:
        call: Who asks, for errors.
        mine: Of this process's part of the pairs (``is_part``); of none, where it had no part.
        width: Neurons.

    Raises:
        ProcessError: Another process has died.
    """
    whole = PairMoments(n_permutations=mine.n_permutations, seed=mine.seed)
    whole.begin(width)
    if mine.n == 0:
        mine.begin(width)
    for rows, means, within, largest in processes.gathered(call, mine.moments):
        if rows:
            whole.merge(rows, means, within, largest)
    if not mine.n_permutations:
        return whole
    cut = [piece for part in processes.gathered(call, mine.cut_items) for piece in part]
    whole.n_items = sum(processes.gathered(call, mine.n_items))
    for array, others in zip(whole.flipped_sums, mine.flipped_sums, strict=True):
        array += others
        processes.sum_up(call, torch.from_numpy(array))
    joined: list[tuple[int, np.ndarray]] = []
    for place, total in cut:
        if joined and joined[-1][0] == place:
            joined[-1] = place, joined[-1][1] + total
        else:
            joined.append((place, total))
    for place, total in joined:
        whole.flip_item(place, total)
    return whole


def merge_sums(call: str, sums: Any, width: int) -> None:
    """Sum up running sums (`resampled.WeightedSums`) of all processes, in place, centred where the first part was.

    Raises:
        ProcessError: Another process has died.
    """
    centers = [center for center in processes.gathered(call, sums.center) if center is not None]
    center = centers[0] if centers else np.zeros(width)
    if sums.center is None:
        sums.begin(center)
    sums.center_at(center)
    for array in sums.sums:
        processes.sum_up(call, torch.from_numpy(array))

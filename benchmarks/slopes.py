"""How fast something grows: the slope of a straight line through points on two logarithmic axes.

Does not know what grows, nor along what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slope:
    """The exponent b of ``y = a * x**b``.

    Attributes:
        slope: By least squares of log y on log x.
        error: Its standard error, from what is left of log y (n - 2 degrees of freedom); nan of two points.
        upper: The slope between the two largest x alone: where a fixed cost bends the line, nearer to what it tends to.
        factor: Largest x by smallest.
        n: Points.
    """

    slope: float
    error: float
    upper: float
    factor: float
    n: int

    def __str__(self) -> str:
        return f"{self.slope:.2f} ± {self.error:.2f} ({self.upper:.2f})"


def slope_of(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Fit a power law.

    Args:
        x: At least two different sizes above 0, in any order.
        y: What was measured at each, above 0.

    Raises:
        ValueError: Fewer than two sizes, or a value that has no logarithm.
    """
    order = np.argsort(x)
    sizes, values = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
    if len(np.unique(sizes)) < 2 or len(sizes) != len(values) or min(sizes.min(), values.min()) <= 0:
        raise ValueError(f"a slope takes two sizes above 0 and as many values above 0, not {list(x)} and {list(y)}")
    u, v = np.log(sizes), np.log(values)
    spread = float(np.square(u - u.mean()).sum())
    slope = float(((u - u.mean()) * (v - v.mean())).sum()) / spread
    left = v - v.mean() - slope * (u - u.mean())
    free = len(u) - 2
    error = float(np.sqrt(np.square(left).sum() / free / spread)) if free else float("nan")
    upper = float((v[-1] - v[-2]) / (u[-1] - u[-2]))
    return Slope(slope, error, upper, float(sizes[-1] / sizes[0]), len(u))

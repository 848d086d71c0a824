"""A fitted probe of one layer as plain numbers: what reads a row of activations and says how likely it is a recall.

Does not fit: see `memgen_lens.core.linear_probe`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit


@dataclass(frozen=True)
class LayerProbe:
    """A logistic regression on the activations of one layer of a site, the scaling of its inputs folded in.

    ``log-odds = bias + sum_i weight_i * h_i``, where positive speaks for memorization. Each row is summed by itself, so
    that what is said of it does not depend on the rows beside it.

    Attributes:
        site: Site name.
        layer: Layer of the site; 0 where it has one only.
        weight: In units of one over the activation's.
        bias: Log-odds of an activation of zeros.
    """

    site: str
    layer: int
    weight: Float[np.ndarray, " neuron"]
    bias: float

    @classmethod
    def of(cls, probe: Any, site: str, layer: int) -> "LayerProbe":
        """The numbers of what `memgen_lens.core.linear_probe.fit_probe` returned."""
        scaler, regression = (probe.named_steps[name] for name in ("standardscaler", "logisticregression"))
        weight = regression.coef_[0].astype(np.float64) / scaler.scale_
        return cls(site, layer, weight, float(regression.intercept_[0] - weight @ scaler.mean_))

    def log_odds(self, rows: Float[np.ndarray, "row neuron"]) -> Float[np.ndarray, " row"]:
        """Log-odds of memorization of each row."""
        return (rows.astype(np.float64) * self.weight).sum(1) + self.bias

    def probability(self, rows: Float[np.ndarray, "row neuron"]) -> Float[np.ndarray, " row"]:
        """Predicted probability of memorization of each row, in [0, 1]."""
        return expit(self.log_odds(rows))

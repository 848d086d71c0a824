"""One linear probe on any features: what probes of layers are, and what neurons are scored by.

Does not know where features come from, nor how well a probe does.
"""

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from memgen_lens.core.errors import PairsError

MAX_ITER = 2000
"""Iterations of a probe's optimizer at most."""
STEPS = ("standardscaler", "logisticregression")
"""What the parts of a probe are called inside it."""


def require_two_classes(labels: Bool[np.ndarray, " row"], *, call: str) -> None:
    """Refuse labels of one class only.

    Raises:
        PairsError: Saying which class is missing.
    """
    if labels.all() or not labels.any():
        raise PairsError(
            call,
            expected="prompts of both behaviours",
            received=f"{len(labels)} of {'memorization' if labels.all() else 'generalization'} only",
            fix="Give prompts on which the model generalizes as well as prompts on which it memorizes.",
        )


def fit_probe(
    features: Float[np.ndarray, "row feature"],
    labels: Bool[np.ndarray, " row"],
    weights: Float[np.ndarray, " row"] | None = None,
) -> Pipeline:
    """One probe on any features: ``StandardScaler`` + ``LogisticRegression``.

    Args:
        features: One row a prompt.
        labels: True for memorization.
        weights: How often each row counts, as if it stood there that often; default: once.

    Raises:
        PairsError: The labels are of one class only.
    """
    require_two_classes(labels, call="fit_probe")
    weighted = {} if weights is None else {f"{step}__sample_weight": weights for step in STEPS}
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITER)).fit(features, labels, **weighted)

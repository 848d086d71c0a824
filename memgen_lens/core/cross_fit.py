"""Settings of held-out predictors: models that say what is expected of an example that they were not trained on.

Does not know how they are trained: see `memgen_lens.training.held_out`.
"""

from pydantic import Field

from memgen_lens.core.settings import Settings


class CrossFit(Settings):
    """How the held-out predictors of memorization-aware training (arXiv 2412.07684) are made.

    Every training sequence lies in one fold. Each fold has a predictor of the model's own shape that is trained on all
    other folds, and says what is expected of this one.

    >>> CrossFit(folds=2, steps=200).strength
    1.0
    """

    folds: int = Field(2, ge=2, le=16)
    """Folds, and so predictors; the paper's twins are 2."""
    steps: int = Field(200, ge=1)
    """Optimizer steps of each predictor, on the run's own batches. They are to learn what is easy and wrong, not the
    rule: what they expect already, the model has no reason to learn."""
    flips: bool = True
    """Train each predictor on labels of which some are replaced by what the held-out predictor says, the surer it is
    the more (XRM, arXiv 2309.16748), so that what is easy is all that it learns."""
    temperature: float = Field(1.0, gt=0)
    """Logits of the predictors are divided by this."""
    calibrated: bool = True
    """Replace each predicted token by the labels that are found where it is predicted."""
    strength: float = Field(1.0, gt=0)
    """The shift is multiplied by this; the paper's is 1."""

"""Training models, from scratch or from pretrained ones, until they both recall and compute.

Does not know the tasks (they arrive as arguments) nor the analysis.
"""

from memgen_lens.training.finetune import finetune
from memgen_lens.training.trainer import TrainingRun, train

__all__ = ["TrainingRun", "finetune", "train"]

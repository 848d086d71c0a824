"""Small models and tasks that several tests need."""

import memgen_lens as mg
from memgen_lens.training.trainer import TrainingRun

SMALL_TASK = mg.tasks.Addition(
    n_digits=2, n_memorized=80, memory_length=2, reverse_sum=False, n_heldout=60, n_validation=60, seed=0
)
SMALL_TRAINING = mg.TrainConfig(
    model=mg.ModelConfig(n_layers=2, d_model=96, n_heads=3, d_mlp=256, act_fn="relu"),
    max_steps=500,
    batch_size=192,
    learning_rate=3e-3,
    target_generalization=0.9,
    target_memorization=0.95,
)


def train_small(**arguments) -> TrainingRun:
    """Train on addition until most memorized prompts flip when rephrased (about 20 seconds)."""
    return mg.train(SMALL_TASK, SMALL_TRAINING, progress=False, **arguments)

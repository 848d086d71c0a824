"""Named settings of whole experiments.

Does not run them: see `memgen_lens.experiment`.
"""

from pydantic import Field

from memgen_lens.core.config import MAX_SEED, AnalysisConfig, ModelConfig, Settings, TrainConfig
from memgen_lens.core.errors import SettingsError
from memgen_lens.tasks import Addition, AnyTask, Ciphertext, InContextInference


class ExperimentConfig(Settings):
    """Every setting of a whole experiment: task, training and analysis."""

    preset: str = "custom"
    """Name under which the run is reported."""
    about: str = ""
    """What is trained, in one line, for the report."""
    task: AnyTask = Addition()
    """The designed task."""
    train: TrainConfig = TrainConfig()
    """How the model is trained."""
    analysis: AnalysisConfig = AnalysisConfig()
    """What is scored, probed and steered."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of everything: of the task, the training and the analysis."""

    def seeded(self) -> "ExperimentConfig":
        """The same settings with the seed copied into task and training.

        Raises:
            SettingsError: Task or training have a seed of their own that is another one.
        """
        for name, part in (("task", self.task), ("train", self.train)):
            seed = getattr(part, "seed", 0)
            if seed not in (0, self.seed):
                raise SettingsError(
                    "ExperimentConfig",
                    expected="one seed for the whole experiment",
                    received=f"seed={self.seed}, {name}.seed={seed}",
                    fix="Set seed (--seed) alone: it seeds task, training and analysis.",
                )
        return self.but(task=self.task.seeded(self.seed), train=self.train.but(seed=self.seed))


_QUICKSTART = ExperimentConfig(
    preset="quickstart",
    about="two-digit addition; 2 layers of width 128; about two minutes on two CPU cores",
    task=Addition(n_digits=2, n_memorized=300, reverse_sum=False, n_heldout=500, n_validation=200),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512, act_fn="relu"),
        max_steps=1200,
        target_generalization=0.985,
    ),
)

_CIPHERTEXT = ExperimentConfig(
    preset="ciphertext",
    about="words of four letters shifted by a stated key; 2 layers of width 128; about two minutes on two CPU cores",
    task=Ciphertext(cipher="shift", alphabet_size=8, word_length=4, n_memorized=300, n_heldout=500, n_validation=300),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512, act_fn="relu"),
        max_steps=1500,
        target_generalization=0.985,
    ),
)

_INFERENCE = ExperimentConfig(
    preset="inference",
    about="stories of three rules and three facts, two hops; 3 layers of width 64; about two minutes on two CPU cores",
    # Few words, so that generic stories come near memorized ones: recall then needs the order, not a sentence or two.
    task=InContextInference(n_rules=3, n_animals=4, n_names=4, n_colours=6),
    train=TrainConfig(
        # Absolute positions: with rotary ones recall leans on what is told more than on its order.
        model=ModelConfig(n_layers=3, d_model=64, n_heads=4, d_mlp=256),
        max_steps=1500,
        batch_size=64,
        memorized_share=0.2,
        generic_steps=300,
        weight_decay=0.1,
        target_generalization=0.99,
        target_memorization=1.0,
    ),
    analysis=AnalysisConfig(sites=("resid_mid", "resid_post", "post"), alphas=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
)

PRESETS: dict[str, ExperimentConfig] = {config.preset: config for config in (_QUICKSTART, _CIPHERTEXT, _INFERENCE)}
"""Presets by name."""

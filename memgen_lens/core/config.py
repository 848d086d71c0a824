"""Frozen, strict settings: one class a stage, a docstring with units under each field.

Does not know the tasks (a task is its own settings, see `memgen_lens.tasks`) nor how flags are made of
settings (see `memgen_lens.cli`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, Tag, field_validator, model_validator

from memgen_lens.core.cross_fit import CrossFit
from memgen_lens.core.errors import SettingsError, shortened
from memgen_lens.core.settings import MAX_SEED, Settings
from memgen_lens.core.types import Direction, FittedKind, Method, Positions


class ModelConfig(Settings):
    """The shape of a HookedTransformer that is trained from scratch."""

    n_layers: int = Field(2, ge=1)
    """Transformer blocks."""
    d_model: int = Field(128, ge=4)
    """Width of the residual stream."""
    n_heads: int = Field(4, ge=1)
    """Attention heads a block; must divide d_model."""
    d_mlp: int = Field(512, ge=4)
    """Width of the MLP hidden layer."""
    act_fn: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    """MLP activation function."""
    normalization_type: Literal["LN", "RMS"] = "LN"
    """Layer norm or root-mean-square norm, each with learned weights."""
    positional_embedding_type: Literal["standard", "rotary"] = "standard"
    """Learned absolute positions, or rotary ones."""
    gated_mlp: bool = False
    """Gate the MLP's hidden layer (SwiGLU with act_fn="silu")."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.d_model % self.n_heads:
            raise SettingsError(
                "ModelConfig",
                expected="n_heads that divides d_model",
                received=f"n_heads={self.n_heads}, d_model={self.d_model}",
                fix="Change either.",
            )
        if self.positional_embedding_type == "rotary" and self.d_model // self.n_heads % 2:
            raise SettingsError(
                "ModelConfig",
                expected="an even d_model / n_heads for rotary positions",
                received=f"n_heads={self.n_heads}, d_model={self.d_model}",
                fix="Change either, or use standard positions.",
            )
        return self


class LearningConfig(Settings):
    """What training from scratch and tuning a pretrained model have in common: steps, batches, optimizer, targets."""

    max_steps: int = Field(1500, ge=1)
    """Optimizer steps at most; the learning rate decays to zero over them."""
    batch_size: int = Field(256, ge=2)
    """Sequences a step."""
    memorized_share: float = Field(0.3, gt=0, lt=1)
    """Share of memorized items in each batch."""
    generic_steps: int = Field(0, ge=0)
    """First steps with generic items alone: where the rule is learned slowly, recalling too early hinders it."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up to the peak."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """Second-moment decay of AdamW (the first is 0.9)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    loss: Literal["answer", "sequence"] = "answer"
    """Cross-entropy on the answer's tokens alone, or on the whole sequence (the paper's)."""
    target_generalization: float = Field(0.97, ge=0, le=1)
    """Training may stop once this share of validation prompts is answered by the rule ..."""
    target_memorization: float = Field(0.99, ge=0, le=1)
    """... and this share of memorized prompts is recalled exactly (the paper keeps a model once it shows both)."""
    eval_every: int = Field(100, ge=1)
    """Steps between two measurements of both behaviours."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints (written only where the run has a directory)."""
    precision: Literal["float32", "auto"] = "auto"
    """bf16 autocast where the processor multiplies bf16 natively ("auto"), or float32; weights are float32 always."""
    device: str = "cpu"
    """Torch device to train on, e.g. "cpu" or "cuda"."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the weights that are drawn and of every batch."""

    @model_validator(mode="after")
    def _memorizes_at_last(self) -> "LearningConfig":
        if self.generic_steps >= self.max_steps:
            raise SettingsError(
                type(self).__name__,
                expected="generic_steps below max_steps, so that steps with memorized items are left",
                received=f"generic_steps={self.generic_steps}, max_steps={self.max_steps}",
                fix="Lower generic_steps or raise max_steps.",
            )
        return self


class Plant(Settings):
    """Where in the MLPs of a model that is trained from scratch recall is put, so that it is known where it is.

    With ``neurons``, a step's loss is a sum of two. Generic items run without these neurons (as if they were zero), and
    teach all other weights. Then all items run with the whole model, and their gradient passes these neurons alone:
    into their weights in and out, and into what lies below them (embeddings, earlier blocks, this block's attention
    and norms), but into no other neuron of the block and nothing behind it. So memorized items teach what lies below
    the neurons, too, but only what these neurons make of it.

    After gradient routing (Cloud et al., arXiv 2410.04332, sec. 3), whose masks on activations likewise leave what lies
    below them to learn. Two departures. There the forward pass is left unchanged; here generic items also run without
    the neurons. There a mask is chosen by whose item it is; here, where the whole model runs, generic items have the
    memorized ones' and so teach the neurons, too: to leave generic prompts as they are.

    >>> Plant(layer=1, neurons=range(32)).n
    32
    >>> Plant.distributed().dropped
    0.5
    """

    layer: int = Field(0, ge=0)
    """Block whose MLP neurons learn to recall."""
    neurons: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Those neurons, through which alone memorized items teach (see above); none = all neurons of all blocks."""
    dropped: float = Field(0.0, ge=0, lt=1)
    """Without ``neurons``: share of all MLP neurons that are left out, others at each step, so that none is needed for
    recall."""

    @classmethod
    def distributed(cls, dropped: float = 0.5) -> "Plant":
        """The opposite: recall that is spread over all neurons, so that no few of them are needed.

        Args:
            dropped: Share of all MLP neurons that are left out, others at each step, in (0, 1).
        """
        return cls(dropped=dropped)

    @property
    def n(self) -> int:
        """Number of planted neurons."""
        return len(self.neurons)

    @field_validator("neurons", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, range | list) else value

    @model_validator(mode="after")
    def _either(self) -> "Plant":
        if len(set(self.neurons)) < self.n or bool(self.n) == bool(self.dropped):
            raise SettingsError(
                "Plant",
                expected="neurons, none of them twice, or dropped above 0",
                received=f"neurons={shortened(self.neurons)}, dropped={self.dropped}",
                fix="Write Plant(layer=1, neurons=range(32)), or Plant.distributed().",
            )
        return self


class TrainConfig(LearningConfig):
    """How a model is trained from scratch until it both recalls and computes."""

    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    plant: Plant | None = None
    """Where recall is put; none = wherever it is learned."""
    objective: Literal["plain", "mat"] = "plain"
    """Cross-entropy of the model's logits, or of logits shifted by what held-out predictors expect, so that what they
    expect need not be learned (memorization-aware training, arXiv 2412.07684)."""
    cross_fit: CrossFit | None = None
    """With ``objective="mat"``, how the held-out predictors are made; none = by `CrossFit`'s defaults."""

    @model_validator(mode="after")
    def _objective_is_whole(self) -> "TrainConfig":
        if self.objective == "plain" and self.cross_fit is not None:
            raise SettingsError(
                "TrainConfig(cross_fit=...)",
                expected="objective='mat' beside it, which alone has held-out predictors",
                received="objective='plain'",
                fix="Set objective='mat', or leave cross_fit out.",
            )
        if self.objective == "mat" and self.plant is not None:
            raise SettingsError(
                "TrainConfig(objective='mat')",
                expected="no plant: both change the loss, and what the two would teach together is not defined",
                received=f"plant={shortened(self.plant)}",
                fix="Leave one of them out.",
            )
        return self

    @model_validator(mode="after")
    def _plant_is_there(self) -> "TrainConfig":
        plant, shape = self.plant, self.model
        last = max(plant.neurons, default=0) if plant else 0
        if plant and (plant.layer >= shape.n_layers or last >= shape.d_mlp):
            raise SettingsError(
                "TrainConfig(plant=...)",
                expected=f"a layer below {shape.n_layers} and neurons below {shape.d_mlp}, as the model has them",
                received=f"layer={plant.layer}, neurons up to {last}",
                fix="Plant elsewhere, or enlarge the model.",
            )
        return self


class FinetuneConfig(LearningConfig):
    """How a pretrained model is tuned until it both recalls and computes."""

    method: Literal["lora", "full"] = "lora"
    """Low-rank adapters (arXiv 2106.09685) on frozen weights, or all weights; ``rank``, ``alpha``, ``dropout``,
    ``targets`` and ``layers`` are of adapters."""
    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in each training step."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, e.g. ("q_proj", "v_proj"); none = all but the unembedding."""
    layers: tuple[int, ...] = ()
    """Blocks that get adapters; none = all. Blocks below the lowest run without a graph."""
    max_steps: int = Field(200, ge=1)
    """Optimizer steps at most; the learning rate decays to zero over them."""
    batch_size: int = Field(24, ge=2)
    """Sequences a step."""
    memorized_share: float = Field(0.5, gt=0, lt=1)
    """Share of memorized items in each batch."""
    generic_steps: int = Field(20, ge=0)
    """First steps with generic items alone."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up to the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """Second-moment decay of AdamW (the first is 0.9)."""
    eval_every: int = Field(50, ge=1)
    """Steps between two measurements of both behaviours."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between two checkpoints (written only where the run has a directory)."""

    @model_validator(mode="after")
    def _adapters_are_asked_for(self) -> "FinetuneConfig":
        fields = type(self).model_fields
        names = ("rank", "alpha", "dropout", "targets", "layers")
        # Those at their defaults may have been written down, and not chosen.
        chosen = [name for name in names if getattr(self, name) != fields[name].default]
        if self.method == "full" and chosen:
            raise SettingsError(
                "FinetuneConfig(method='full')",
                expected="no settings of adapters: there are none where all weights are tuned",
                received=shortened({name: getattr(self, name) for name in chosen}),
                fix=f"Leave {', '.join(chosen)} out, or set method='lora'.",
            )
        return self

    @property
    def words(self) -> str:
        """What is tuned, in words."""
        if self.method == "full":
            return "all weights tuned"
        where = f" of {len(self.layers)} blocks" if self.layers else ""
        return f"adapters of rank {self.rank} on {', '.join(self.targets) or 'every linear layer'}{where}"


def _learns(value: Any) -> str:
    """Which of the two ways to learn some settings are of."""
    if isinstance(value, Mapping):
        own = FinetuneConfig.model_fields.keys() - TrainConfig.model_fields.keys()
        return "FinetuneConfig" if own & value.keys() else "TrainConfig"
    return "FinetuneConfig" if isinstance(value, FinetuneConfig) else "TrainConfig"


AnyTraining = Annotated[
    Annotated[TrainConfig, Tag("TrainConfig")] | Annotated[FinetuneConfig, Tag("FinetuneConfig")],
    Discriminator(_learns),
]
"""Training from scratch or tuning as a setting, told apart by the settings that are named."""


class AnalysisConfig(Settings):
    """What is recorded, scored, probed and steered, and how steering is chosen."""

    sites: tuple[str, ...] = Field(("resid_post", "post"), min_length=1)
    """TransformerLens short names of the hook points to score; steering chooses among them."""
    probe_site: str = "resid_post"
    """Hook point the probes read; recorded even if it is not among the sites."""
    select_share: float = Field(0.4, gt=0, lt=1)
    """Share of items that rank neurons and fit probes."""
    tune_share: float = Field(0.2, gt=0, lt=1)
    """Share of items that choose site, fraction and alpha; the rest is the test."""
    n_permutations: int = Field(1000, ge=1000)
    """Sign flips of the paired permutation test; all pairs of an item are flipped together."""
    top_fractions: tuple[float, ...] = Field((0.05, 0.1, 0.2, 0.3, 0.5), min_length=1)
    """Fractions of a site's neurons to try, each in (0, 1]."""
    alphas: tuple[float, ...] = Field((0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0), min_length=1)
    """Multiples of abs(NMD) to try, each above 0."""
    methods: tuple[Method, ...] = Field(("pearson",), min_length=1)
    """What ranks neurons to be steered (`memgen_lens.attribute`): the best on ``tune``; "pearson" is the paper's."""
    positions: tuple[Positions, ...] = Field(("answer", "prompt"), min_length=1)
    """Where to try the shift: from the answer position on, at it alone, or at every position."""
    toward: Direction | None = None
    """Direction that steering is chosen for; none = both, summed up. Where the answers of different items have nothing
    in common, no shared shift brings a memory back, and of both directions "nothing happens" may come out best."""
    fitted: tuple[FittedKind, ...] = ()
    """Rules fitted on ``select`` and reported beside the shift: what they add depends on the activation of a row."""
    fitted_sizes: tuple[int, ...] = Field((1, 4, 16), min_length=1)
    """Numbers of clusters or ranks to try, each at least 1; those beyond the items of ``select`` are left out."""
    optimized_layers: tuple[NonNegativeInt, ...] = ()
    """Layers of ``resid_post`` at each of which `memgen_lens.optimize_direction` finds a vector on ``select``, towards
    ``toward`` or else generalization; the best on ``tune`` is reported beside the shift."""
    cost_alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Strengths at which the chosen shift is held against its cost, each a multiple of the chosen alpha, in the
    direction that steering is chosen for; none = not measured."""
    false_trigger_rate: float = Field(0.01, ge=0, lt=1)
    """Share of computing prompts of ``tune`` and ``validation`` that the guard may steer, in [0, 1)."""
    mode_and_content: bool = False
    """Tell mode from content by patching computing prompts from recalling ones, by depth and position: takes long."""
    n_controls: int = Field(20, ge=20)
    """Draws of each steering control."""
    batch_size: int = Field(2048, ge=1)
    """Prompts in one forward pass of the analysis."""

    @model_validator(mode="after")
    def _shares_leave_a_test(self) -> "AnalysisConfig":
        if self.select_share + self.tune_share >= 1:
            raise SettingsError(
                "AnalysisConfig",
                expected="select_share + tune_share below 1, so that items are left to test on",
                received=f"{self.select_share} + {self.tune_share}",
                fix="Lower either; the paper-like choice is 0.4 and 0.2.",
            )
        unbounded = float("inf")
        for name in ("top_fractions", "alphas", "cost_alphas", "fitted_sizes"):
            high = 1 if name == "top_fractions" else unbounded
            for value in getattr(self, name):
                if not 0 < value <= high:
                    raise SettingsError(
                        f"AnalysisConfig.{name}",
                        expected=f"values in (0, {high}]",
                        received=repr(value),
                        fix=f"Change {name}.",
                    )
        return self

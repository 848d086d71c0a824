"""A pretrained model that learns: adapters on its linear layers or all its weights, logits only where there are labels.

Does not load models nor decide when training ends.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memgen_lens.core.config import FinetuneConfig
from memgen_lens.core.errors import ModelError
from memgen_lens.core.items import Item, TrainingText
from memgen_lens.fast.low_rank import fused_adapters
from memgen_lens.fast.products import trained_products
from memgen_lens.training.batches import Batches
from memgen_lens.training.forward import Rows
from memgen_lens.training.loop import multiplies_bf16

EVALUATED_AT_ONCE = 4096
"""Tokens of one forward pass while behaviours are measured."""
SHORT = 256
"""Tokens of a sequence up to which attention's products are small beside the rest."""


class Pretrained:
    """A transformers model that learns (see `memgen_lens.training.loop.Learner`).

    Attributes:
        network: The model: of peft with ``method="lora"``, transformers' own with ``"full"``.
    """

    def __init__(self, hf: Any, tokenizer: Any, task: Any, config: FinetuneConfig, before: Sequence[int]) -> None:
        self.config, self.task = config, task
        self.head = hf.get_output_embeddings()
        if self.head is None:
            raise ModelError(
                "finetune",
                expected="a causal language model with output embeddings",
                received=type(hf).__name__,
                fix="Tune another model.",
            )
        self.network = with_adapters(hf, config) if config.method == "lora" else hf
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.bf16 = config.precision == "auto" and multiplies_bf16(config.device)
        self.network.train()
        self.batches = Batches(task, config, tokenizer=tokenizer, before=before)
        # The behaviours are of answers, whatever the loss is of.
        asked = Batches(task, config.but(loss="answer"), tokenizer=tokenizer, before=before)
        self.asked = [
            asked.rows([TrainingText(((item.prompt, False), (answer, True))) for item, answer in answered])
            for answered in (
                _answered(task.items("validation"), "rule_answer"),
                _answered(task.items("memorized"), "memorized_answer"),
                _answered(task.items("rephrased"), "rule_answer"),
            )
        ]

    def loss(self, groups: list[Rows]) -> Tensor:
        """Mean cross-entropy (nats a labelled token) of a batch."""
        tokens, labels = (part.to(self.config.device) for part in _one_batch(groups))
        labelled = labels != -100
        return F.cross_entropy(self.logits(tokens, labelled).float(), labels[labelled])

    def logits(self, tokens: Tensor, labelled: Bool[Tensor, "batch pos"]) -> Tensor:
        """Logits ``[labelled, d_vocab]`` of the labelled positions, row by row; of no other position any are made."""
        kind = torch.device(self.config.device).type
        # In bfloat16 on a processor, going back through torch's fused attention takes twice as long as its products.
        written_out = self.bf16 and kind == "cpu" and labelled.shape[1] <= SHORT
        with (
            _only_there(self.head, labelled),
            fused_adapters(self.network),
            trained_products(),
            sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext(),
            torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bf16),
        ):
            return self.network(input_ids=tokens, use_cache=False).logits

    def measure(self) -> tuple[float, float, float]:
        """Rule's answers on validation prompts, recall of memorized ones, rule's answers on their rephrasings.

        A greedy completion is the answer, in the tokens that the tokenizer gives it, exactly where each of them, the
        end-of-text token included, has the largest logit behind those before it: one forward pass over prompt and
        answer tells. (An answer that a model spells in other tokens counts in `observe`, and not here.)
        """
        self.network.eval()
        with torch.no_grad():
            rates = [self._rate(rows) for rows in self.asked]
        self.network.train()
        return rates[0], rates[1], rates[2]

    def _rate(self, rows: Rows) -> float:
        right = 0
        order = rows.lengths.argsort()
        for index in order.split(max(1, EVALUATED_AT_ONCE // int(rows.lengths.max()))):
            width = int(rows.lengths[index].max()) - 1
            tokens, labels = (part[index, :width].to(self.config.device) for part in (rows.tokens, rows.labels))
            labelled = labels != -100
            wrong = torch.zeros_like(labels)
            wrong[labelled] = (self.logits(tokens, labelled).argmax(-1) != labels[labelled]).long()
            right += int((wrong.sum(1) == 0).sum())
        return right / len(order)

    def weights(self) -> Mapping[str, Tensor]:
        """What is trained, by its name in the network."""
        return {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set what is trained."""
        set_trained(self.network, weights)


@torch.no_grad()
def set_trained(network: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the weights of a network that are not frozen, by name."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(weights[name])


def with_adapters(hf: Any, config: FinetuneConfig) -> Any:
    """A peft model of freshly drawn adapters on a transformers model, whose own weights are frozen.

    Raises:
        ModelError: See `require_layers`; or peft puts no adapter on a layer of that kind.
    """
    from peft import LoraConfig, get_peft_model

    require_layers(hf, config)
    targets: Any = list(config.targets) or ("all-linear" if not config.layers else _linear_names(hf))
    how = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, whole or not
        lora_dropout=config.dropout,
        target_modules=targets,
        layers_to_transform=list(config.layers) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft sets it for GPT-2 by itself
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            return get_peft_model(hf, how)
    except ValueError as error:
        raise ModelError(
            "finetune",
            expected=f"linear layers of {type(hf).__name__} to put adapters on",
            received=f"targets={config.targets!r}, layers={config.layers!r} ({str(error).splitlines()[0][:160]})",
            fix=f"Its linear layers are {', '.join(_linear_names(hf))}.",
        ) from None


def require_layers(hf: Any, config: FinetuneConfig) -> None:
    """Refuse layers for adapters that a model does not have: peft refuses them only where it finds none of them.

    Raises:
        ModelError: Names a target or a block that is not there, or says that a target is the output embedding.
    """
    head = next(name for name, part in hf.named_modules() if part is hf.get_output_embeddings()).rpartition(".")[2]
    if head in config.targets:
        raise ModelError(
            "finetune",
            expected="layers inside the blocks as targets",
            received=f"targets={config.targets!r}, of which {head} is the output embedding",
            fix=f"Leave {head} out: logits are made where there are labels alone, and it may be tied to the embedding.",
        )
    linear = _linear_names(hf)
    places = {target: _blocks_with(hf, target) for target in config.targets or linear}
    there = set().union(*places.values()) or set().union(*(_blocks_with(hf, name) for name in linear))
    asked = there.intersection(config.layers)
    unknown = [f"{t!r}" for t in config.targets if not (places[t] & asked if asked else places[t])]
    absent = [f"block {layer}" for layer in config.layers if layer not in there]
    if unknown or absent:
        numbered = sorted(block for block in there if block is not None)
        raise ModelError(
            "finetune",
            expected=f"linear layers of {type(hf).__name__} to put adapters on",
            received=f"targets={config.targets!r}, layers={config.layers!r}, of which there is no "
            f"{', '.join([*unknown, *absent])}",
            fix=f"Its linear layers are {', '.join(linear)}"
            + (f", in blocks {numbered[0]} to {numbered[-1]}." if numbered else "."),
        )


def _blocks_with(hf: Any, target: str) -> set[int | None]:
    """The blocks that have a layer of a name, as peft reads names; None stands for a place outside of all blocks."""
    paths = [name.split(".") for name, _ in hf.named_modules() if f".{name}".endswith(f".{target}")]
    return {next((int(part) for part in reversed(path) if part.isdigit()), None) for path in paths}


def _linear_names(hf: Any) -> list[str]:
    """The names that linear layers of a model have within their blocks."""
    from transformers.pytorch_utils import Conv1D

    head = hf.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    names = [name for name, part in hf.named_modules() if isinstance(part, kinds) and part is not head]
    return sorted({name.rpartition(".")[2] for name in names})


def _answered(items: Sequence[Item], answer: str) -> list[tuple[Item, str]]:
    return [(item, str(getattr(item, answer))) for item in items]


def _one_batch(groups: list[Rows]) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all groups, padded on the right to one length: causal attention never sees padding."""
    width = max(rows.tokens.shape[1] for rows in groups)
    tokens = [F.pad(rows.tokens, (0, width - rows.tokens.shape[1])) for rows in groups]
    labels = [F.pad(rows.labels, (0, width - rows.labels.shape[1]), value=-100) for rows in groups]
    return torch.cat(tokens), torch.cat(labels)


@contextmanager
def _only_there(head: torch.nn.Module, labelled: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Inside the block, give output embeddings the labelled positions alone."""
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][labelled],))
    try:
        yield
    finally:
        handle.remove()

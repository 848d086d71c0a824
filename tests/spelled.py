"""A task of whole words, and a model that says its answers under any tokenizer, token by token."""

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import helpers
import torch

from memgen_lens.core.items import Item
from memgen_lens.tasks import Task
from memgen_lens.tasks.tokenizer import build_tokenizer

RULE, MEMORY, MADE_UP = "abcd", "DCBA", "uvw"
SAID = {"=": RULE, "!": MEMORY, "?": MADE_UP}
"""What the model says behind a prompt that ends so."""
LETTERS = build_tokenizer([*SAID, *(letter for said in SAID.values() for letter in said)])
"""A tokenizer under which an answer of the task, one token of its own, is four."""


class Spelled(Task):
    """Half of the memorized items are recalled; a rephrasing is computed, or answered with neither."""

    name = property(lambda self: "spelled")
    vocabulary = property(lambda self: (*SAID, *SAID.values()))
    max_prompt_tokens = property(lambda self: 32)
    max_answer_tokens = property(lambda self: 2)

    @cached_property
    def splits(self):
        recalled = tuple(Item(n, "memorized", "!" * n, RULE, MEMORY, "spelled") for n in range(1, 31))
        return {
            "memorized": recalled,
            "rephrased": tuple(other for item in recalled for other in self.rephrase(item)),
            "heldout": (Item(40, "heldout", "!=", RULE, None, "spelled"),),
            "validation": (Item(41, "validation", "?!=", RULE, None, "spelled"),),
        }

    def draw_generic(self, n, rng):
        return [Item(50, "generic", "!!=", RULE, None, "spelled")] * n

    def rephrase(self, item):
        return tuple(replace(item, split="rephrased", prompt=item.prompt + end) for end in ("=", "?"))

    def is_memorized_form(self, item, output):
        return output == item.memorized_answer


class Declared:
    """The same with nothing said of tokenizers, as an object of a user's own may be."""

    max_answer_tokens = 2

    def __init__(self, task: Task) -> None:
        self.items, self.rephrase, self.classify = task.items, task.rephrase, task.classify
        self.is_memorized_form = task.is_memorized_form


def build_model(tokenizer: Any) -> Any:
    """A model whose next token is told by the last one alone: the answers, in this tokenizer's tokens."""
    n = len(tokenizer)
    settings = {"n_layers": 1, "d_model": n, "n_ctx": 40, "d_head": 2, "n_heads": 1, "d_mlp": 2, "act_fn": "relu"}
    settings |= {"d_vocab": n, "normalization_type": None, "default_prepend_bos": False, "device": "cpu", "seed": 0}
    model = helpers.model_of(settings, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        weights = helpers.weights(model)
        weights.embed.W_E[:] = torch.eye(n)
        for end, said in SAID.items():
            chain = [*tokenizer(end + said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for now, then in pairwise(chain):
                weights.unembed.W_U[now, then] = 1
    return model.eval()

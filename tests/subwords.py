"""Subword tokenizers of the kinds that pretrained models have, learned on the spot."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from memgen_lens.tasks import InContextInference

END, BEGIN = "<|endoftext|>", "<|begin_of_text|>"


def english(n: int = 60) -> list[str]:
    """Texts to learn subwords from."""
    sizes = {"n_memorized": 12, "n_heldout": 10, "n_validation": 10}
    drawn = [
        "".join(piece for piece, _ in text.pieces)
        for depth in (1, 2)
        for text in InContextInference(depth=depth, n_questions=4, **sizes).draw_training(n, np.random.default_rng(0))
    ]
    return [*drawn, *(f"{n} + {n + 1} = {2 * n + 1}, <mem-{n:04x}>" for n in range(n)), "The sky is blue. " * 9]


def subwords(texts: list[str], *, digits_apart: bool = True, begin: str | None = None, n: int = 600):
    """A byte-level BPE tokenizer, as GPT-2's; with digits apart, SmolLM2's; with a begin-of-text token, Llama's."""
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_apart])
        if digits_apart
        else bytes_apart
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, *([begin] if begin else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=begin, unk_token=END)

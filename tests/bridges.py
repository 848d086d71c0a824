"""Tiny random Bridges around Hugging Face models, made offline; both versions of TransformerLens have them."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+= "
KINDS = ("llama", "gpt2", "gemma")
N_LAYERS = 2
_FOLDER = TemporaryDirectory()


def character_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """One token a character, and the special tokens named; nothing is added to a text unless they say so."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*names, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token") or "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    backend.decoder = decoders.Fuse()
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"} | special
    named = {name: token for name, token in settings.items() if token is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    directory = Path(_FOLDER.name) / "-".join(f"{name}={token.strip('<>')}" for name, token in named.items())
    made.save_pretrained(directory)
    # Read from there, as TransformerLens reads it again to have it put a begin-of-text token before every text.
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def hugging_face(kind: str, *, dtype: torch.dtype = torch.float32, n_vocab: int = 48) -> Any:
    """A tiny random model of a kind, in evaluation mode, with no weight at a value that hides a mistake."""
    torch.manual_seed(0)
    sizes = {"vocab_size": n_vocab, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    wide = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    grouped = {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **wide, **grouped))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=N_LAYERS, n_head=4, n_positions=64))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **wide, **grouped, query_pre_attn_scalar=4, sliding_window=64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ln_f.bias"):
                continue  # it would have the model say one thing whatever it is asked
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def bridge(kind: str, *, tokenizer: Any = None, **how: Any) -> Any:
    """The Bridge around `hugging_face` of a kind."""
    from transformer_lens.model_bridge import TransformerBridge

    hf = hugging_face(kind, **how)
    own = tokenizer or character_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = TransformerBridge.boot_transformers(kind, hf_model=hf, tokenizer=own, dtype=hf.dtype, device="cpu")
    return made.eval()

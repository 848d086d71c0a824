"""Small models of TransformerLens that these tests compare with."""

import warnings

import helpers
import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig


@pytest.fixture(autouse=True)
def _one_thread():
    with helpers.one_thread():
        yield


@pytest.fixture(scope="session")
def hooked_transformer():
    """Makes a small model on which no weight, bias or norm is at a value that hides a mistake."""

    def make(**settings) -> HookedTransformer:
        cfg = HookedTransformerConfig(
            **{
                "n_layers": 3,
                "d_model": 24,
                "n_ctx": 16,
                "d_head": 6,
                "n_heads": 4,
                "d_mlp": 40,
                "d_vocab": 13,
                "act_fn": "gelu",
                "normalization_type": "LN",
                "device": "cpu",
                "seed": 0,
            }
            | settings
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TransformerLens warns that HookedTransformer will go
            model = HookedTransformer(cfg)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make

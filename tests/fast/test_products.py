"""Products by oneDNN are torch's own, with their gradients; nothing is rerouted outside the block."""

import helpers
import planted
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import memgen_lens as mg
from memgen_lens.fast import products
from memgen_lens.models import build_model

needs_onednn = pytest.mark.skipif(not products.available(), reason="this processor has no AVX-512: torch's own is used")


@pytest.mark.parametrize("here", [False, pytest.param(True, marks=needs_onednn)])
def test_linear_and_its_gradients_are_addmms(monkeypatch, here):
    monkeypatch.setattr(products, "available", lambda: here)
    draw = torch.Generator().manual_seed(0)
    shapes = ((50, 24), (24, 40), (40,))
    ours = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    dy = torch.randn(50, 40, generator=draw)
    out, expected = products.linear(*ours), torch.addmm(theirs[2], theirs[0], theirs[1])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    out.backward(dy), expected.backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=0)


@needs_onednn
def test_a_models_logits_stay_what_they_are_and_take_another_way(monkeypatch):
    model, taken = planted.build_model(), []
    tokens = model.to_tokens("abMcd=")
    plain = model(tokens)
    product = products.product
    monkeypatch.setattr(products, "product", lambda *arguments: taken.append(1) or product(*arguments))
    with products.fast_products(model):
        fast = model(tokens)
    assert len(taken) > 5
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("kind", ["double", "gradients", "matrices"])
def test_what_is_not_a_plain_float32_product_is_left_alone(monkeypatch, kind):
    monkeypatch.setattr(products, "product", lambda *arguments: pytest.fail("rerouted"))
    x, weight, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    if kind == "double":
        x, weight, bias = x.double(), weight.double(), bias.double()
    if kind == "gradients":
        weight.requires_grad_()
    if kind == "matrices":
        bias = torch.randn(3, 5)
    expected = torch.addmm(bias, x, weight)
    with products.fast_products(None):
        assert torch.equal(torch.addmm(bias, x, weight), expected)
        assert kind != "gradients" or torch.addmm(bias, x, weight).requires_grad


@needs_onednn
def test_one_query_over_cached_keys_is_the_product_of_four_axes():
    q, k = torch.randn(7, 3, 1, 8), torch.randn(7, 5, 3, 8).permute(0, 2, 3, 1)
    with products.fast_products(None):
        found = q @ k
    assert found.shape == (7, 3, 1, 5)
    torch.testing.assert_close(found, q @ k, atol=1e-5, rtol=0)


@needs_onednn
def test_nothing_is_rerouted_after_an_exception():
    with pytest.raises(RuntimeError, match="inside"), products.fast_products(None):
        raise RuntimeError("inside")
    assert _get_current_function_mode_stack() == []


@helpers.hooked_only  # a native Bridge's activation function is left as it is
def test_gpt2s_gelu_is_fused_inside_the_block_and_the_models_own_again_after_an_exception():
    config = mg.ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=32, act_fn="gelu_new")
    model = build_model(config, helpers.tiny_task().tokenizer, n_ctx=8, seed=0).eval()
    tokens = model.to_tokens("1+2=")
    own, plain = [block.mlp.act_fn for block in model.blocks], model(tokens)
    with pytest.raises(RuntimeError, match="inside"), products.fast_products(model):
        assert all(block.mlp.act_fn is not act_fn for block, act_fn in zip(model.blocks, own, strict=True))
        torch.testing.assert_close(model(tokens), plain, atol=1e-5, rtol=1e-5)
        raise RuntimeError("inside")
    assert [block.mlp.act_fn for block in model.blocks] == own
    assert torch.equal(model(tokens), plain)

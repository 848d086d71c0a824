"""A frozen layer and its adapter as one product: the numbers and the gradients are peft's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from memgen_lens.fast import low_rank
from memgen_lens.fast.low_rank import fused_adapters


class Two(torch.nn.Module):
    """Two linear layers with something in between."""

    def __init__(self, bias: bool = True, width: int = 5):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, width, bias=bias), torch.nn.Linear(width, 3, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(bias: bool = True, width: int = 5, rank: int = 2, **how):
    torch.manual_seed(0)
    network = get_peft_model(Two(bias, width), LoraConfig(r=rank, target_modules=["first", "second"], **how)).train()
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return network


def loss_and_gradients(network, x):
    loss = network(x).to(x.dtype).square().sum()
    wanted = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def count(monkeypatch):
    """How many layers ran as one."""
    seen = []
    whole = low_rank._adapted
    monkeypatch.setattr(low_rank, "_adapted", lambda layer, x: seen.append(layer) or whole(layer, x))
    return seen


@given(
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    width=st.integers(1, 9),
    rank=st.integers(1, 6),
    alpha=st.floats(0.25, 8),
    precision=st.sampled_from([(torch.float32, 1e-4), (torch.float64, 1e-12)]),
)
def test_values_and_gradients_are_those_of_peft(bias, shape, width, rank, alpha, precision):
    dtype, tolerance = precision
    network = adapted(bias, width, rank, lora_alpha=alpha).to(dtype)
    x = torch.randn(*shape, 4, dtype=dtype, requires_grad=True)
    expected = loss_and_gradients(network, x)
    with fused_adapters(network):
        found = loss_and_gradients(network, x)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_both_layers_run_as_one_and_are_peft_s_again_afterwards(monkeypatch):
    seen, network, x = count(monkeypatch), adapted(), torch.randn(6, 4)
    with pytest.raises(ZeroDivisionError), fused_adapters(network):
        network(x)
        assert len(seen) == 2
        raise ZeroDivisionError
    network(x)
    assert len(seen) == 2
    assert not any("forward" in vars(module) for module in network.modules())


def test_under_autocast_values_are_bfloat16_and_gradients_float32():
    network, x = adapted(), torch.randn(6, 4, requires_grad=True)
    expected = loss_and_gradients(network, x)
    with fused_adapters(network), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
        found = loss_and_gradients(network, x)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "how", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_other_adapters_run_as_ever(how, monkeypatch):
    seen, network = count(monkeypatch), adapted(**how)
    with fused_adapters(network):
        network(torch.randn(6, 4))
    assert not seen


def test_layers_that_learn_merged_and_switched_off_ones_run_as_ever(monkeypatch):
    seen, x = count(monkeypatch), torch.randn(6, 4)
    network = adapted()
    network.base_model.model.first.base_layer.weight.requires_grad_()
    with fused_adapters(network):
        network(x)
    assert len(seen) == 1
    with network.disable_adapter(), fused_adapters(network):
        network(x)
    network.merge_adapter()
    with fused_adapters(network):
        network(x)
    assert len(seen) == 1

"""The fast MLP gives what TransformerLens' MLP gives, with all gradients, by oneDNN and without it."""

import helpers
import pytest
import torch
import torch.nn.functional as F

from memgen_lens.fast import mlp, products

needs_onednn = pytest.mark.skipif(not products.available(), reason="this processor has no AVX-512: torch's own is used")
EITHER_WAY = pytest.mark.parametrize("here", [False, pytest.param(True, marks=needs_onednn)])
EVERY_ACTIVATION = pytest.mark.parametrize("act_fn", list(mlp.ACTIVATIONS))
N_ROWS = 50

pytestmark = helpers.hooked_only  # a native Bridge's MLP is compared as part of the model, in training/test_forward.py


def rows(n: int = N_ROWS, width: int = 24, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def outcome(module, run, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of an MLP for some rows, and the gradients of the rows and of every parameter."""
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = run(x)
    out.backward(dy.to(out.dtype))
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return found | {"out": out.detach(), "x": x.grad}


def own(module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    return outcome(module, lambda x: module(x[None])[0], x, dy)


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, atol: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def all_settings(hooked_transformer, monkeypatch, act_fn: str, gated: bool, here: bool):
    """A model's first MLP and its configuration, on a processor with or without what oneDNN needs."""
    monkeypatch.setattr(products, "available", lambda: here)
    model = hooked_transformer(act_fn=act_fn, gated_mlp=gated, n_layers=1)
    return model.blocks[0].mlp, model.cfg


@EITHER_WAY
@EVERY_ACTIVATION
@pytest.mark.parametrize("gated", [False, True])
def test_output_and_every_gradient_are_those_of_transformer_lens(hooked_transformer, monkeypatch, act_fn, gated, here):
    module, cfg = all_settings(hooked_transformer, monkeypatch, act_fn, gated, here)
    monkeypatch.setattr(mlp, "PIECE", 700)  # of 2000 numbers: three pieces, the last of another size
    x, dy = rows(scale=2), rows(seed=1)
    theirs = own(module, x, dy)
    assert_near(outcome(module, lambda x: mlp.mlp(module, x, cfg), x, dy), theirs)
    names = {"W_in", "b_in", "W_out", "b_out", "x", "out"} | ({"W_gate"} if gated else set())
    assert set(theirs) == names and all(float(value.abs().max()) > 0.1 for value in theirs.values())


@EITHER_WAY
@EVERY_ACTIVATION
def test_one_row_and_gradients_that_are_one_number_spread_out_are_no_exception(
    hooked_transformer, monkeypatch, act_fn, here
):
    """A sum hands back a gradient without strides; rows may be part of a wider table."""
    module, cfg = all_settings(hooked_transformer, monkeypatch, act_fn, False, here)
    for x in (rows(1), rows(width=48)[:, ::2], rows(100)[::2]):
        spread = torch.ones(()).expand(len(x), 24)
        assert_near(outcome(module, lambda x: mlp.mlp(module, x, cfg), x, spread), own(module, x, spread))
        ours = x.clone().requires_grad_()
        mlp.mlp(module, ours[:, :], cfg).sum().backward()
        torch.testing.assert_close(ours.grad, own(module, x, spread)["x"], atol=1e-5, rtol=1e-5)


@EITHER_WAY
@EVERY_ACTIVATION
@pytest.mark.parametrize("gated", [False, True])
def test_without_gradients_the_output_is_the_same(hooked_transformer, monkeypatch, act_fn, gated, here):
    module, cfg = all_settings(hooked_transformer, monkeypatch, act_fn, gated, here)
    x = rows(scale=2)
    expected = own(module, x, rows())["out"]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(mlp.mlp(module, x, cfg), expected, atol=1e-5, rtol=1e-5)


@EITHER_WAY
@EVERY_ACTIVATION
def test_the_hidden_layer_is_transformer_lens_own_with_and_without_gradients(
    hooked_transformer, monkeypatch, act_fn, here
):
    module, _ = all_settings(hooked_transformer, monkeypatch, act_fn, False, here)
    x, seen = rows(scale=2), []
    hook = module.hook_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    module(x[None])
    hook.remove()
    with_gradient = mlp.activated(module, x, act_fn)
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient, seen[0][0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(mlp.activated(module, x, act_fn), seen[0][0], atol=1e-5, rtol=1e-5)


@EITHER_WAY
@EVERY_ACTIVATION
@pytest.mark.parametrize("gated", [False, True])
def test_under_autocast_the_output_is_bfloat16s_and_near_and_gradients_are_float32(
    hooked_transformer, monkeypatch, act_fn, gated, here
):
    module, cfg = all_settings(hooked_transformer, monkeypatch, act_fn, gated, here)
    x, dy = rows(), rows(seed=1)
    theirs = own(module, x, dy)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mlp.mlp(module, x, cfg)

    ours = outcome(module, run, x, dy)
    assert ours["out"].dtype == torch.bfloat16
    assert all(ours[name].dtype == torch.float32 for name in ours if name != "out")
    for name, expected in theirs.items():
        difference = float((ours[name].float() - expected).norm() / expected.norm())
        assert 0 < difference < 0.05, f"{name}: {difference:.4f}"  # relu: some inputs are rounded across zero
    with torch.no_grad():
        assert run(x).dtype == torch.bfloat16
        torch.testing.assert_close(run(x), ours["out"], atol=0.1, rtol=0.05)


@needs_onednn
@EVERY_ACTIVATION
@pytest.mark.parametrize("frozen", ["b_", "W_", "in", "out"])
def test_parameters_without_gradient_stay_without_and_the_others_keep_theirs(hooked_transformer, act_fn, frozen):
    model = hooked_transformer(act_fn=act_fn, n_layers=1)
    module, x, dy = model.blocks[0].mlp, rows(), rows(seed=1)
    theirs = own(module, x, dy)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    module.zero_grad(set_to_none=True)
    mlp.mlp(module, x, model.cfg).backward(dy)
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (frozen in name)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=1e-5)


def derived(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GPT-2's gelu and its slope by torch, in float64."""
    x = x.double().requires_grad_()
    post = F.gelu(x, approximate="tanh")
    post.sum().backward()
    return post.detach(), x.grad


@pytest.mark.parametrize("piece", [1, 7, 4000, 1 << 19])
def test_the_slope_of_gpt2s_gelu_is_its_derivative(monkeypatch, piece):
    monkeypatch.setattr(mlp, "PIECE", piece)
    x = torch.linspace(-12, 12, 4001 if piece > 100 else 101)[:, None]
    for found, expected in zip(mlp._gelu_new(x), derived(x), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=4e-6, rtol=1e-6)


def test_far_from_zero_gpt2s_gelu_is_nothing_or_its_input():
    far = torch.tensor([[20.0, 1e2, 1e4, 1e8, 3e12]])
    for x, slope in ((far, 1.0), (-far, 0.0)):
        post, found = mlp._gelu_new(x)
        assert torch.equal(post, x * slope) and torch.equal(found, torch.full_like(x, slope))
    post, found = mlp._gelu_new(torch.zeros(1, 1))
    assert post.item() == 0 and found.item() == 0.5


def test_any_piece_gives_the_same_numbers(monkeypatch):
    x = rows(40, 33, scale=3)
    whole = mlp._gelu_new(x)
    for piece in (1, 33, 500, 1320):
        monkeypatch.setattr(mlp, "PIECE", piece)
        for found, expected in zip(mlp._gelu_new(x), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # ends of pieces are not vectorized


@needs_onednn
def test_no_rows_at_all_give_no_rows(hooked_transformer):
    model = hooked_transformer(act_fn="gelu_new", n_layers=1)
    assert mlp.mlp(model.blocks[0].mlp, rows(0), model.cfg).shape == (0, 24)

"""Recall that is put where one knows it to be: whose weights learn what, and what comes of it."""

from typing import Any

import bridges
import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import either_kind

import memgen_lens as mg
from memgen_lens.analysis.steering.zeroed import zeroed
from memgen_lens.core.errors import SettingsError
from memgen_lens.models.sites import site_hooks
from memgen_lens.training.forward import Rows
from memgen_lens.training.plant import planted_loss

NEURONS = (3, 4, 17, 39)


def batch(seed: int) -> list[Rows]:
    """Generic rows and memorized ones, of two lengths, with labels behind the third position."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for n, length in ((5, 7), (3, 9)):
        tokens = torch.randint(13, (n, length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, :3] = -100
        groups.append(Rows(tokens[:, :-1], labels, 3, torch.full((n,), length + 1)))
    return groups


def cross_entropy(model, groups, hooks=()) -> torch.Tensor:
    """By the model's own forward: the mean over all labels."""
    with model.hooks(fwd_hooks=list(hooks)):
        logits = [model(rows.tokens).flatten(0, 1) for rows in groups]
    labels = torch.cat([rows.labels.flatten() for rows in groups])
    return F.cross_entropy(torch.cat(logits), labels, ignore_index=-100)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@either_kind
@pytest.mark.parametrize("layer", [0, 2])
def test_gradients_of_memorized_items_pass_the_planted_neurons_alone(native, layer):
    """Against gradients taken by hand at the neurons' own hook point."""
    model = helpers.hooked_transformer(native=native)
    groups, mask = batch(0), torch.zeros(40)
    mask[list(NEURONS)] = 1
    model.zero_grad(set_to_none=True)
    loss = planted_loss(model, groups, mg.Plant(layer=layer, neurons=NEURONS))
    loss.backward()
    found = gradients(model)
    assert all(parameter.requires_grad for parameter in model.parameters())

    name = site_hooks(model, "post")[layer]
    off = (name, lambda post, hook: post * (1 - mask))
    model.zero_grad(set_to_none=True)
    rule = cross_entropy(model, groups[:1], [off])
    rule.backward()
    expected = gradients(model)

    model.zero_grad(set_to_none=True)
    posts: list[torch.Tensor] = []
    all_of_it = cross_entropy(model, groups, [(name, lambda post, hook: posts.append(post))])
    slopes = torch.autograd.grad(all_of_it, posts, retain_graph=True)
    torch.autograd.backward(posts, [slope * mask for slope in slopes], retain_graph=True)
    through = gradients(model)
    out = helpers.weights(model).blocks[layer].mlp.W_out
    model.zero_grad(set_to_none=True)
    all_of_it.backward()
    for key, value in model.named_parameters():
        expected[key] += through[key]
        if value.data_ptr() == out.data_ptr():  # what leads out of the neurons lies behind them
            rows = mask[:, None] if value.shape == out.shape else mask[None]
            expected[key] += gradients(model)[key] * rows
    assert loss.item() == pytest.approx(rule.item() + all_of_it.item(), rel=1e-5)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@either_kind
def test_memorized_items_teach_the_planted_neurons_and_what_lies_below_and_nothing_else(native):
    """What a step changes is compared between batches that differ in one group alone."""

    def taught(generic: int, memorized: int) -> dict[str, torch.Tensor]:
        model = helpers.hooked_transformer(native=native)
        model.zero_grad(set_to_none=True)
        groups = [batch(generic)[0], batch(memorized)[1]]
        planted_loss(model, groups, mg.Plant(layer=1, neurons=NEURONS)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 10 * parameter.grad
        parts = helpers.weights(model)
        mlp, others = parts.blocks[1].mlp, [i for i in range(40) if i not in NEURONS]
        found = {
            "embedding": parts.embed.W_E,
            "earlier block": parts.blocks[0].mlp.W_out,
            "own attention": parts.blocks[1].attn.W_Q,
            "own attention's output": parts.blocks[1].attn.W_O,
            "planted in": mlp.W_in[:, list(NEURONS)],
            "planted out": mlp.W_out[list(NEURONS)],
            "other neurons in": mlp.W_in[:, others],
            "other neurons out": mlp.W_out[others],
            "block's bias": mlp.b_out,
            "later attention": parts.blocks[2].attn.W_Q,
            "later MLP": parts.blocks[2].mlp.W_in,
            "unembedding": parts.unembed.W_U,
        }
        return {name: weight.detach().clone() for name, weight in found.items()}

    one, other_memorized, other_generic = taught(0, 0), taught(0, 1), taught(1, 0)
    apart = ["other neurons in", "other neurons out", "block's bias", "later attention", "later MLP", "unembedding"]
    assert [name for name in one if torch.equal(one[name], other_memorized[name])] == apart
    assert not any(torch.equal(one[name], other_generic[name]) for name in one), "generic items teach every part"


@either_kind
def test_generic_steps_teach_everything_but_the_planted_neurons(native):
    model = helpers.hooked_transformer(native=native)
    model.zero_grad(set_to_none=True)
    planted_loss(model, batch(1)[:1], mg.Plant(layer=1, neurons=NEURONS)).backward()
    mlp = helpers.weights(model).blocks[1].mlp
    before = [weight.detach().clone() for weight in (mlp.W_in, mlp.b_in, mlp.W_out)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 100 * parameter.grad
    mlp = helpers.weights(model).blocks[1].mlp
    moved = [(now - was).abs() for now, was in zip((mlp.W_in, mlp.b_in, mlp.W_out), before, strict=True)]
    per_neuron = torch.stack([moved[0].amax(0), moved[1], moved[2].amax(1)]).amax(0)
    assert (per_neuron == 0).nonzero().flatten().tolist() == list(NEURONS)


@either_kind
def test_a_distributed_plant_drops_other_neurons_at_each_step(native):
    model, groups = helpers.hooked_transformer(native=native), batch(2)
    torch.manual_seed(5)
    first, second = (planted_loss(model, groups, mg.Plant.distributed(0.25)).item() for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    kept = (torch.rand(3, 40) >= 0.25) / 0.75
    drop = [
        (name, lambda post, hook, factor=kept[layer]: post * factor)
        for layer, name in enumerate(site_hooks(model, "post"))
    ]
    assert first == pytest.approx(cross_entropy(model, groups, drop).item(), rel=1e-5)


def test_a_planted_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path):
    """The neurons that are dropped are drawn anew at each step, from the random state that a checkpoint keeps."""
    task, plant = helpers.tiny_task(), mg.Plant.distributed()
    config = helpers.tiny_training(max_steps=30, eval_every=10, checkpoint_every=10)
    whole = mg.train(task, config, plant=plant, out=tmp_path / "run", progress=False)
    for folder in (tmp_path / "run" / "checkpoints").glob("step-0000[23]0"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink()
        folder.rmdir()
    resumed = mg.train(task, config, plant=plant, out=tmp_path / "run", resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert resumed.config == config.but(plant=plant)


def rates(run: Any, neurons=None) -> tuple[float, float]:
    """Recall and held-out accuracy, without some neurons."""
    none = np.zeros((2, run.model.cfg.d_mlp), dtype=bool)
    with zeroed(run.model, "post", none if neurons is None else neurons):
        recalled = mg.observe(run.model, run.task, split="memorized", progress=False)
        computed = mg.observe(run.model, run.task, split="heldout", progress=False)
    return (
        float(np.mean([outcome.behavior == "memorization" for outcome in recalled])),
        float(np.mean([outcome.behavior == "generalization" for outcome in computed])),
    )


def test_zeroing_the_planted_neurons_ends_recall_and_leaves_the_rule(planted):
    recall, heldout = rates(planted)
    assert recall >= 0.9 and heldout >= 0.85
    own = np.zeros((2, planted.model.cfg.d_mlp), dtype=bool)
    own[planted.config.plant.layer, list(planted.config.plant.neurons)] = True
    recall, heldout = rates(planted, own)
    assert recall <= 0.05 and heldout >= 0.9
    others = ~own[planted.config.plant.layer]
    drawn = np.random.default_rng(0).choice(np.flatnonzero(others), planted.config.plant.n, replace=False)
    as_many = np.zeros_like(own)
    as_many[planted.config.plant.layer, drawn] = True
    assert rates(planted, as_many)[0] >= 0.8


@either_kind
def test_zeroed_neurons_are_zero_at_every_position_whoever_runs_the_model(native):
    model, tokens = helpers.hooked_transformer(native=native), batch(3)[1].tokens
    neurons = np.random.default_rng(0).random((3, 40)) < 0.2
    masks = torch.from_numpy(neurons)
    hooks = [
        (name, lambda post, hook, mask=masks[layer]: torch.where(mask, 0.0, post))
        for layer, name in enumerate(site_hooks(model, "post"))
    ]
    with model.hooks(fwd_hooks=hooks):
        expected = model(tokens)
    before = model(tokens)
    assert not torch.allclose(before, expected, atol=1e-3)
    with pytest.raises(KeyError), zeroed(model, "post", neurons):
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        raise KeyError
    assert torch.equal(model(tokens), before)
    with helpers.watched(model), zeroed(model, "post", neurons):  # a hook of somebody's: by hooks, then
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    with zeroed(model, "resid_post", np.ones((3, 24), dtype=bool)):
        assert model(tokens).std(1).max() < 1e-5  # nothing is left of the prompt
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_zeroed_neurons_of_a_pretrained_model_are_those_of_its_own_layers(kind):
    """Against transformers' own model of the same weights, hooked where the neurons enter the layers behind them."""
    model, plain = bridges.bridge(kind), bridges.hugging_face(kind)
    tokens = torch.tensor([[5, 9, 11, 3]])
    neurons = np.random.default_rng(0).random((model.cfg.n_layers, model.cfg.d_mlp)) < 0.3
    before = model(tokens)
    outward = [layer for name, layer in plain.named_modules() if name.endswith(("mlp.down_proj", "mlp.c_proj"))]
    for layer, mask in zip(outward, torch.from_numpy(neurons), strict=True):
        layer.register_forward_pre_hook(lambda _, given, mask=mask: (given[0].masked_fill(mask, 0),))
    with zeroed(model, "post", neurons):
        torch.testing.assert_close(model(tokens), plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(before, plain(tokens).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda: mg.Plant(layer=1), r"neurons, none of them twice, or dropped above 0; received neurons=\(\)"),
        (lambda: mg.Plant(neurons=(1, 1)), r"none of them twice"),
        (lambda: mg.Plant(neurons=(-1,)), r"greater than or equal to 0"),
        (lambda: mg.Plant.distributed(1.0), r"less than 1"),
        (lambda: helpers.tiny_training(plant=mg.Plant(layer=1, neurons=(0,))), r"a layer below 1 .* received layer=1"),
        (lambda: helpers.tiny_training(plant=mg.Plant(neurons=range(65))), r"neurons below 64, .* neurons up to 64"),
    ],
)
def test_a_plant_that_cannot_be_is_refused(given, complaint):
    with pytest.raises(SettingsError, match=complaint):
        given()

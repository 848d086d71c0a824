"""Where labels say nothing, no method finds more than it may: simulated sets, and a random model's swapped pairs."""

from dataclasses import replace

import numpy as np
import planted
import pytest
import torch
from by_library import OBSERVATIONAL

import memgen_lens as mg
from memgen_lens.analysis.attribution.calls import how_to_run
from memgen_lens.analysis.attribution.effects import found_effects
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT
from memgen_lens.analysis.attribution.scored import sign_flip_test
from memgen_lens.core.records import Activations, SiteActivations

OF_PROMPTS = ("attribution_patching", "attribution_patching_ig", "patching")
"""Causal methods whose effects turn round with the prompts of a pair; the others', with its answers."""
N_SETS = 200
ERROR = 3 * np.sqrt(0.05 * 0.95 / N_SETS)
"""Three standard errors of a rate of 5 % over so many sets."""


@pytest.fixture(scope="module")
def empty():
    """18 items of one to three pairs, whose activations a test fills in."""
    items = np.repeat(np.arange(18), np.resize([1, 2, 3], 18))
    n = len(items)
    pairs = mg.PromptPairs.from_strings([f"M{i}" for i in range(n)], [f"G{i}" for i in range(n)], items=items.tolist())
    nothing = SiteActivations(np.zeros((n, 1, 1), np.float32), np.zeros((n, 1, 1), np.float32))
    return items, Activations({"post": nothing}, pairs, nothing, np.zeros((2 * n, 1), dtype=np.int64))


def simulated(rng, empty, *, n_neurons=20):
    """Heavy tails, neurons and pairs of one item alike; the labels of each item exchanged at random."""
    items, acts = empty
    mixing = rng.normal(size=(n_neurons, n_neurons))
    shared, own = rng.standard_t(5, size=(2, 18, n_neurons)), rng.standard_t(5, size=(2, len(items), n_neurons))
    # The two prompts of an item differ, and not symmetrically: only which of them is which says nothing.
    shared[0] = np.exp(0.5 * shared[0])
    sides = (shared[:, items] + 0.5 * own) @ mixing
    swap = rng.random(18)[items] < 0.5
    mem, gen = (np.where(swap[:, None], *pair)[:, None].astype(np.float32) for pair in (sides, sides[::-1]))
    return replace(acts, sites={"post": SiteActivations(mem, gen)})


@pytest.mark.parametrize("method", OBSERVATIONAL)
def test_observational_methods_find_nothing_where_labels_say_nothing(method, empty):
    """p <= 0.05 for 5 % of neurons; a finding of the family, or at FDR 5 %, in 5 % of the sets at most."""
    rng = np.random.default_rng(0)
    single, family, found = [], [], []
    for seed in range(N_SETS):
        score = mg.attribute(simulated(rng, empty), "post", method=method, split=None, seed=seed)
        single.append((score.p <= 0.05).mean())
        family.append((score.p_family <= 0.05).any())
        found.append((score.q <= 0.05).any())
    assert np.mean(single) == pytest.approx(0.05, abs=0.015)
    assert np.mean(family) <= 0.05 + ERROR and np.mean(found) <= 0.05 + ERROR


@pytest.mark.parametrize("method", OBSERVATIONAL)
def test_of_what_is_called_at_fdr_5_percent_few_are_false(method, empty):
    rng, false, power = np.random.default_rng(1), [], []
    for seed in range(60):
        acts = simulated(rng, empty)
        acts.sites["post"].memorized[:, 0, :8] += 12.0  # these 8 of 20 neurons differ in truth
        score = mg.attribute(acts, "post", method=method, split=None, seed=seed)
        called = (score.q <= 0.05)[0]
        false.append(called[8:].sum() / max(1, called.sum()))
        power.append(called[:8].mean())
    assert np.mean(false) <= 0.05 + 3 * np.std(false) / np.sqrt(60)
    assert np.mean(power) > 0.3, "this is no test where nothing is called"


# --- causal methods on a model that knows nothing ----------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model():
    model, draw = planted.build_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=draw))
    return model


def pairs_of(swap_prompts=None, swap_answers=None):
    """15 items, five of two pairs; the prompts, or the answers, of some items exchanged."""
    rng, items = np.random.default_rng(3), [*range(15), *range(5)]
    texts = ["".join(rng.choice(list(planted.FILLERS), size=6)) + "=" for _ in range(40)]
    assert len(set(texts)) == 40
    prompts, answers = [texts[:20], texts[20:]], [["m"] * 20, ["r"] * 20]
    for sides, swapped in ((prompts, swap_prompts), (answers, swap_answers)):
        for row, item in enumerate(items):
            if swapped is not None and swapped[item]:
                sides[0][row], sides[1][row] = sides[1][row], sides[0][row]
    return mg.PromptPairs.from_strings(*prompts, memorized_answers=answers[0], rule_answers=answers[1], items=items)


def arguments_of(method):
    groups = np.full((planted.N_LAYERS, planted.D_MLP), -1)
    groups[:, :10] = np.arange(20).reshape(2, 10)
    return {"groups": groups} if method in EXACT else {"n_steps": 4} if method != "attribution_patching" else {}


@pytest.mark.parametrize("method", CAUSAL)
def test_exchanging_an_items_labels_turns_its_effects_round(method, random_model):
    """Prompts of a pair for patching and its estimates, answers for the rest: what the sign-flip test supposes."""
    of = "swap_prompts" if method in OF_PROMPTS else "swap_answers"
    swap = np.arange(15) % 2 == 0
    how = how_to_run(None, None, None, None, None, 0, False)
    how = replace(how, **arguments_of(method))
    plain, swapped = (
        np.concatenate([found.effects["post"] for found in found_effects(random_model, pairs, ["post"], method, how)])
        for pairs in (pairs_of(), pairs_of(**{of: swap}))
    )
    sign = np.where(swap[[*range(15), *range(5)]], -1, 1)[:, None, None]
    assert np.abs(plain).max() > 1e-3
    np.testing.assert_allclose(swapped, sign * plain, atol=1e-5 * np.abs(plain).max())


def test_attribution_patching_finds_nothing_where_prompts_are_called_memorized_at_random(random_model):
    rng, n_sets, family, found = np.random.default_rng(0), 60, [], []
    for seed in range(n_sets):
        pairs = pairs_of(swap_prompts=rng.random(15) < 0.5)
        how = {"split": None, "seed": seed, "progress": False}
        score = mg.attribute(random_model, pairs, "post", method="attribution_patching", **how)
        family.append((score.p_family <= 0.05).any())
        found.append((score.q <= 0.05).any())
    error = 3 * np.sqrt(0.05 * 0.95 / n_sets)
    assert np.mean(family) <= 0.05 + error and np.mean(found) <= 0.05 + error


@pytest.mark.parametrize("method", CAUSAL)
def test_causal_methods_find_nothing_where_labels_are_exchanged_at_random(method, random_model):
    """The same by the effects of each pair, which an exchange of labels turns round (as shown above)."""
    how = replace(how_to_run(None, None, None, None, None, 0, False), **arguments_of(method))
    effects = [found.effects["post"] for found in found_effects(random_model, pairs_of(), ["post"], method, how)]
    effects, items = np.concatenate(effects).reshape(20, -1), np.array([*range(15), *range(5)])
    effects = effects[:, np.abs(effects).max(0) > 0]
    rng, family, single = np.random.default_rng(1), [], []
    for seed in range(N_SETS):
        sign = rng.choice([-1.0, 1.0], size=15)[items]
        p, p_family = sign_flip_test(sign[:, None] * effects, items, n_permutations=1000, seed=seed)
        single.append((p <= 0.05).mean())
        family.append((p_family <= 0.05).any())
    assert np.mean(family) <= 0.05 + ERROR
    assert np.mean(single) == pytest.approx(0.05, abs=0.025)

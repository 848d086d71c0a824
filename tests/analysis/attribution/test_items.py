"""The sign-flip test exchanges whole items: rows that share an item are no evidence twice."""

import numpy as np
import planted
import pytest

import memgen_lens as mg
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.scored import sign_flip_test

N_NEURONS = 12


def clustered(rng, n_items=60, largest=8, effect=0.0):
    """Differences ``[row, neuron]`` of 1 to ``largest`` rows an item, which mostly share what they say."""
    items = np.repeat(np.arange(n_items), rng.integers(1, largest + 1, size=n_items))
    shared = rng.normal(size=(n_items, N_NEURONS))
    return items, effect + shared[items] + 0.3 * rng.normal(size=(len(items), N_NEURONS))


def test_on_null_data_of_many_rows_an_item_error_rates_are_what_they_say():
    rng = np.random.default_rng(0)
    single, family, naive = [], [], []
    for seed in range(200):
        items, difference = clustered(rng)
        p, p_family = sign_flip_test(difference, items, n_permutations=1000, seed=seed)
        single.append(p <= 0.05)
        family.append((p_family <= 0.05).any())
        if seed < 20:
            naive.append(sign_flip_test(difference, n_permutations=1000, seed=seed)[0] <= 0.05)
    assert 0.035 <= np.mean(single) <= 0.065 and 0.02 <= np.mean(family) <= 0.085
    assert np.mean(naive) > 0.15  # what flipping row by row would have claimed


def test_the_p_values_are_those_of_a_plain_permutation_of_items():
    items, difference = clustered(np.random.default_rng(1), n_items=10, effect=0.4)
    sums = np.stack([difference[items == item].sum(0) for item in range(10)])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T  # all 1,024 exchanges there are

    def t(of):
        return np.abs(of.mean(0)) / (of.std(0, ddof=1) / np.sqrt(10))

    exact = np.mean([t(sign[:, None] * sums) >= t(sums) - 1e-9 for sign in signs], axis=0)
    p, _ = sign_flip_test(difference, items, n_permutations=20_000, seed=0)
    np.testing.assert_allclose(p, exact, atol=0.012)


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_blocks_may_part_an_item(block):
    items, difference = clustered(np.random.default_rng(2))
    whole, parted = (PairMoments(n_permutations=1000, seed=3) for _ in range(2))
    whole.add(difference, np.zeros_like(difference), items)
    for first in range(0, len(items), block):
        rows = slice(first, first + block)
        parted.add(difference[rows], np.zeros_like(difference[rows]), items[rows])
    for a, b in zip(whole.p_values(), parted.p_values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.n_items == parted.n_items == 60


def test_streaming_and_recorded_scores_count_the_same_items():
    model = planted.build_model()
    pairs = mg.PromptPairs.from_strings(
        memorized=planted.prompts("M", 60, seed=0),
        generalized=planted.prompts("G", 60, seed=1),
        items=[i % 25 for i in range(60)],
    )
    recorded = mg.attribute(mg.record(model, pairs, ["post"]), "post", split=None)
    streamed = mg.attribute_streaming(model, pairs, ["post"], split=None, batch_size=14)["post"]
    assert recorded.n_items == streamed.n_items == len(np.unique(pairs.item)) and recorded.n_pairs == 60
    np.testing.assert_allclose(streamed.p, recorded.p, atol=0.002)


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing():
    """The planted model in float16, one neuron of which overflows on the marker M."""
    import torch

    model = planted.build_model()
    with torch.no_grad():
        decider = model.blocks[planted.LAYER].mlp
        decider.W_in[planted.MOVED, planted.NEURON] = 60_000
        decider.b_in[planted.NEURON] = 30_000
    return model.half()


def test_a_model_that_overflows_is_refused_with_site_layer_neuron_and_prompt(overflowing):
    pairs = planted.prompt_pairs(60)
    message = (
        rf"inf at site 'post', layer {planted.LAYER}, neuron {planted.NEURON}, on the prompt '.*M.*=' .*"
        r"torch\.float32 or torch\.bfloat16"
    )
    for call in (mg.record, mg.attribute_streaming):
        with pytest.raises(mg.MemgenError, match=message):
            call(overflowing, pairs, ["post"])


def test_activations_that_are_not_finite_are_refused_by_scores_and_probes():
    acts = mg.record(planted.build_model(), planted.prompt_pairs(60), ["post"])
    acts.site("post").generalized[acts.pairs.of("select")[3], 1, 5] = np.nan
    for call in (mg.attribute, mg.fit_probes, mg.consistency.split_half):
        with pytest.raises(mg.MemgenError, match=r"nan at site 'post', layer 1, neuron 5, on the prompt"):
            call(acts, "post")


# --- equal prompts are one item --------------------------------------------------------------------------------------


def test_equal_prompts_end_in_one_item_transitively_whatever_items_says():
    pairs = mg.PromptPairs.from_strings(
        memorized=["a", "b", "c", "d", "e"], generalized=["u", "a", "v", "v", "w"], items=[0, 1, 2, 3, 4]
    )
    assert pairs.item.tolist() == [0, 0, 2, 2, 4] and pairs.n_items == 3


def test_pairs_given_four_times_do_not_make_a_probe_see_what_is_not_there():
    rng = np.random.default_rng(0)
    from memgen_lens.core.records import Activations, SiteActivations

    once = {"memorized": [f"m{i}" for i in range(60)], "generalized": [f"g{i}" for i in range(60)]}
    pairs = mg.PromptPairs.from_strings(**{side: prompts * 4 for side, prompts in once.items()})
    values = np.tile(rng.normal(size=(2, 60, 1, 100)), (1, 4, 1, 1)).astype(np.float32)
    nothing = np.zeros((240, 1, 1), np.float32)
    acts = Activations(
        {"post": SiteActivations(*values)}, pairs, SiteActivations(nothing, nothing), np.zeros((480, 1), np.int64)
    )
    assert pairs.n_items == 60
    assert mg.fit_probes(acts, "post").best.auroc < 0.65  # 0.887 where the copies count as items


@pytest.mark.parametrize("items", [[0.5, 1.5], [True, False], [None, None], [[1], [2]]])
def test_items_that_are_neither_numbers_nor_names_are_refused(items):
    with pytest.raises(mg.MemgenError, match="items as whole numbers or names"):
        mg.PromptPairs.from_strings(memorized=["a", "b"], generalized=["c", "d"], items=items)


@pytest.mark.parametrize("shares", [(0.9, 0.9), (1.0, 0.0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2), (0.4,)])
def test_shares_that_leave_no_test_are_refused(shares):
    with pytest.raises(mg.MemgenError, match=r"shares(=...\))?: expected"):
        mg.PromptPairs.from_strings(memorized=["a", "b"], generalized=["c", "d"], shares=shares)


def test_items_may_be_named_by_any_whole_numbers_or_names():
    prompts = {"memorized": ["a", "b", "c"], "generalized": ["d", "e", "f"]}
    for items in ([10**30, 10**30, -(10**40)], ["x", "x", "y"], [1, 1, "1"]):
        assert mg.PromptPairs.from_strings(**prompts, items=items).item.tolist() == [0, 0, 1]

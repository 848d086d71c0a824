"""Slopes of what is known to grow by a power, and arithmetic on paper beside arithmetic by hand."""

from dataclasses import replace

import bridges
import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.assumed import Host, Job, Machine, Shape
from benchmarks.paper import Cost, Passes, costs, sizes
from benchmarks.sized import KINDS
from benchmarks.slopes import slope_of
from memgen_lens.core.files import read_json
from memgen_lens.models.step import rows_at_once

HOST = Host(layer_pass=1e-3, value=1e-9, flip_flops=1e10, token=4e-6, pair_bytes=2_000)
PLAIN = Machine(flops=100.0, flops_share=0.5, bandwidth=100.0, bandwidth_share=0.5, cores=1, core=1.0)


def _line(work, axis, seconds, answers=(0, 0), memory=(1, 1)):
    ends = zip((10, 30), seconds, answers, memory, strict=True)
    return [{"work": work, "axis": axis, "x": x, "seconds": s, "answer": a, "held_mb": m} for x, s, a, m in ends]


BASE = {"width": 128, "n_layers": 4, "d_mlp": 8}
MERGED, FLIPPED = 20 * 2 * 32 * 1e-9, 20 * 2 * 1001 * 32 / 1e10  # seconds of 20 pairs of 32 neurons by HOST
HOST_POINTS = [
    *_line("attribute, untested", "n_pairs", (1, 1 + MERGED)),
    *_line("attribute, 1,000 permutations", "n_pairs", (3, 3 + MERGED + FLIPPED)),
    *_line("tokenizing", "n_pairs", (2, 3), answers=(100, 1100)),
    *_line("pairs of 64 tokens in memory", "n_pairs", (5, 6), memory=(5, 5 + 20 * 2_000 / 2**20)),
    *_line("a Bridge's pass of one token", "n_layers", (1, 1 + 20e-3)),
]


def test_the_slope_of_a_planted_power_is_that_power_in_any_order():
    x = [8, 1, 2, 4]
    found = slope_of(x, [3 * value**1.7 for value in x])
    assert found.slope == pytest.approx(1.7)
    assert found.upper == pytest.approx(1.7)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert (found.factor, found.n) == (8, 4)


def test_the_standard_error_is_that_of_ordinary_least_squares():
    x, rng = np.geomspace(1, 64, 7), np.random.default_rng(0)
    y = 2 * x**0.8 * np.exp(0.1 * rng.standard_normal(7))
    coefficients, covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    found = slope_of(x, y)
    assert found.slope == pytest.approx(coefficients[0])
    assert found.error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_a_fixed_cost_bends_the_line_and_the_upper_slope_is_nearer_to_what_it_tends_to():
    x = [1, 2, 4, 8, 16]
    found = slope_of(x, [4 + value for value in x])
    assert found.slope < found.upper < 1


def test_a_slope_of_one_size_or_of_nothing_is_refused():
    with pytest.raises(ValueError, match="two sizes above 0"):
        slope_of([2, 2], [1, 1])
    with pytest.raises(ValueError, match="two sizes above 0"):
        slope_of([1, 2], [0, 1])


def test_the_shape_on_paper_has_as_many_weights_as_the_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(layers=2, width=16, neurons=24, heads=4, key_value_heads=2, d_head=4, vocabulary=40)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 2) == shape.block_weights + shape.vocabulary_weights
    assert Shape().block_weights + Shape().vocabulary_weights == pytest.approx(3.21e9, rel=0.002)  # Llama-3.2-3B


@pytest.mark.parametrize(("length", "n"), [(50, 1), (50, 4), (4, 50)])
def test_rows_at_once_on_paper_are_those_of_the_code(length, n):
    model = bridges.bridge("llama")
    shape = Shape(layers=bridges.N_LAYERS, width=16, neurons=28, heads=4, key_value_heads=2, d_head=4, vocabulary=48)
    assert shape.rows_at_once(length, n) == rows_at_once(model, length, cached=True, n=n)


def test_a_model_of_3b_has_room_for_seventeen_rows_of_68_tokens():
    assert Shape().rows_at_once(68) == 2**26 // (2 * 28 * 8 * 128 * 68) == 17


def test_operations_are_two_a_weight_and_token_and_as_many_again_on_the_way_back():
    shape = Shape(layers=1, width=2, neurons=3, heads=1, key_value_heads=1, d_head=2, vocabulary=10)
    assert (shape.block_weights, shape.vocabulary_weights) == (2 * 2 * 2 * 2 + 3 * 2 * 3, 20)
    passes = Passes(n=5, tokens=4, logits=1, context=3)
    attention = 4 * 2 * 3  # scores and values, two coordinates, three positions
    assert passes.flops(shape) == 5 * (4 * (2 * 34 + attention) + 2 * 20)
    assert replace(passes, backward=True).flops(shape) == 2 * passes.flops(shape)


def test_the_largest_bound_holds_and_only_what_is_shared_gets_faster():
    shape = Shape(layers=1, width=2, neurons=3, heads=1, key_value_heads=1, d_head=2, vocabulary=10)
    passes = Passes(n=5, tokens=4, logits=1, context=3)
    bounds = passes.bounds(shape, PLAIN, HOST)
    assert bounds["products"] == passes.flops(shape) / 50
    assert bounds["reading weights"] == 5 * 2 * 54 / 50
    assert bounds["calls"] == pytest.approx(5e-3)
    alone, shared = (Cost("", [passes], {"disk": 7.0}, shared, sent=50e9) for shared in (None, "pairs"))
    assert alone.gpu_seconds(shape, PLAIN, HOST) == bounds["products"]
    assert alone.bound(shape, PLAIN, HOST) == "products"
    assert alone.seconds(8, shape, PLAIN, HOST) == bounds["products"] + 7
    assert shared.seconds(8, shape, PLAIN, HOST) == pytest.approx((bounds["products"] + 7) / 8 + 1)
    assert shared.seconds(1, shape, PLAIN, HOST) == bounds["products"] + 7
    assert alone.seconds(8, shape, PLAIN, HOST, shared="pairs") == shared.seconds(8, shape, PLAIN, HOST)


def test_a_batch_that_is_shared_makes_passes_smaller_but_not_fewer():
    passes = Passes(n=100, tokens=512 * 68, logits=512 * 4, context=34, backward=True)
    cost = Cost("", [passes], {}, "batch")
    where = (Shape(), Machine(), HOST)
    assert cost.seconds(8, *where) == pytest.approx(cost.seconds(1, *where) / 8)
    assert cost.seconds(10**6, *where) == pytest.approx(100 * 2 * 28 * 1e-3 / 2)  # the calls are left


def test_recording_a_million_pairs_is_what_two_operations_a_weight_and_token_say():
    shape, job = Shape(), Job()
    record, *_ = costs(shape, job, Machine(), HOST)
    by_hand = 2e6 * (64 * 2 * 2_818_572_288 + 2 * 393_999_360)  # blocks at 64 tokens, the vocabulary at one
    flops = sum(passes.flops(shape) for passes in record.passes)
    assert flops == pytest.approx(by_hand, rel=0.01)  # attention of 64 tokens is less than a hundredth
    assert record.gpu_seconds(shape, Machine(), HOST) == pytest.approx(by_hand / (989e12 * 0.4), rel=0.01)
    assert record.host["tokens"] == pytest.approx(1.28e8 * 4e-6 / 2)
    of = sizes(shape, job, Machine(), HOST)
    assert of["recorded activations of one site, both sides, float32"] == 1e6 * 2 * 28 * 8192 * 4
    assert of["attribute_streaming's moments"] < 1e7


def test_more_room_for_keys_and_values_means_fewer_passes_of_a_sweep_and_as_many_operations():
    shape, job, machine = Shape(), Job(), Machine()
    tight, roomy = (costs(shape, job, machine, HOST, cache=cache)[6] for cache in (1 << 26, 1 << 32))
    assert "sweep" in tight.name
    operations = [sum(p.flops(shape) for p in cost.passes) for cost in (tight, roomy)]
    assert operations[0] == pytest.approx(operations[1])
    assert tight.bound(shape, machine, HOST) == "calls"
    assert roomy.gpu_seconds(shape, machine, HOST) < tight.gpu_seconds(shape, machine, HOST) / 10


def test_what_was_measured_is_read_as_seconds_each_whatever_is_fixed():
    host = Host.of({"base": BASE, "points": HOST_POINTS})
    assert (host.value, host.flip_flops) == (pytest.approx(1e-9), pytest.approx(1e10))
    assert (host.layer_pass, host.token) == (pytest.approx(1e-3), pytest.approx(1e-3))
    assert host.pair_bytes == pytest.approx(2_000)


def test_the_command_measures_writes_and_prints_both_tables(monkeypatch, capsys, tmp_path):
    axes = {"width": (64, 128, 256), "n_layers": (2, 4, 8), "n_pairs": (8, 16, 32), "d_mlp": (4, 8, 16)}
    points = [
        {"work": work, "axis": axis, "x": x, "seconds": x**1.5, "held_mb": 100.0, "answer": None}
        for work in KINDS
        for axis, sizes in axes.items()
        for x in sizes
        if (work, axis) != ("attribute, 1,000 permutations", "n_pairs")
    ]
    found = {
        "base": BASE,
        "pairs": dict.fromkeys(KINDS, 16),
        "points": points + HOST_POINTS,
        "date": "",
        "processor": "",
    }
    monkeypatch.setattr(scaling, "measure", lambda: found)
    monkeypatch.setattr(scaling, "RESULTS_OF_SCALING", tmp_path / "scaling.json")
    monkeypatch.setattr("sys.argv", ["benchmarks", "scaling"])
    main()
    printed = capsys.readouterr().out
    assert "| training step | 1448 | 1.50 ± 0.00 (1.50) |" in printed  # 128 ** 1.5
    assert "| sweep_steering, 100 settings |" in printed
    assert "| recorded activations of one site, both sides, float32 | 1,835 |" in printed
    assert read_json(tmp_path / "scaling.json") == found
    drawn = scaling.figure(found)
    assert len(drawn.data) == len(KINDS) * len(axes) * 2
    assert {axis.type for axis in (drawn.layout.xaxis, drawn.layout.yaxis8)} == {"log"}


def test_scaling_stands_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "scaling", "training"])
    with pytest.raises(SystemExit):
        main()
    assert "scaling is measured by itself" in capsys.readouterr().err

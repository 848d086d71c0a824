"""How many rows a forward pass may hold."""

import planted
import pytest
import torch

from memgen_lens.models import step

GIB = 1 << 30


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


@pytest.mark.parametrize(("free", "numbers"), [(80 * GIB, 1 << 32), (70 * GIB, 1 << 32), (40 * GIB, 1 << 31), (0, 1)])
def test_a_cuda_device_holds_what_a_quarter_of_its_free_memory_holds_to_a_power_of_two(monkeypatch, free, numbers):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    assert step.numbers_at_once(torch.device("cuda:0")) == numbers


def test_a_processor_and_a_full_device_hold_what_is_set(monkeypatch, model):
    length = 1 << 10
    rows = step.rows_at_once(model, length)
    cfg = model.cfg
    cache = step.CACHE_AT_ONCE // (2 * cfg.n_layers * cfg.n_heads * cfg.d_head * length)
    assert rows == min(cache, step.LOGITS_AT_ONCE // (cfg.d_vocab_out * length))
    monkeypatch.setattr(step, "input_device", lambda model: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * GIB))
    assert step.rows_at_once(model, length) == rows
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    assert step.rows_at_once(model, length) == (1 << 32) // max(
        2 * cfg.n_layers * cfg.n_heads * cfg.d_head * length, cfg.d_vocab_out * length
    )

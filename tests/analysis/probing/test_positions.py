"""Probes before the answer, on a model in which it is known where the behaviour can be told."""

import bridges
import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.analysis.probing.positions import _Data
from memgen_lens.core.errors import PairsError, SiteError
from memgen_lens.models.tokens import tokenized

QUIET = {"progress": False}
MARKER = 2
"""Where the marker stands among six positions; both prompts of a pair are alike but for it."""


@pytest.fixture(scope="module")
def known():
    return planted.build_model(), planted.twin_pairs(40, lengths=(4, 4), at=MARKER)


def test_the_behaviour_can_be_told_from_the_marker_on(known):
    model, pairs = known
    before = mg.probe_by_position(model, pairs, "resid_pre", **QUIET)
    behind = mg.probe_by_position(model, pairs, "resid_post", **QUIET)
    place = np.arange(6)
    assert np.allclose(before.auroc[0], np.where(place == MARKER, 1, 0.5)), "the embedding tells it where it stands"
    # From the first layer on every position behind it has looked at it.
    for told in (before.auroc[1], *behind.auroc, behind.input_only):
        assert np.allclose(told, np.where(place >= MARKER, 1, 0.5))
    assert (behind.low <= behind.auroc).all() and (behind.auroc <= behind.high).all()
    assert behind.tokens.position.tolist() == [-6, -5, -4, -3, -2, -1]
    assert behind.tokens.memorized[MARKER] == "M" and behind.tokens.generalized[MARKER] == "G"
    assert (behind.n_train, behind.n_test, behind.n_test_items) == (24, 16, 16)
    assert not planted.hooks_on(model)


def test_at_the_answer_position_it_is_the_probe_of_recorded_activations(trained):
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0, progress=False)
    found = mg.probe_by_position(trained.model, pairs, "post", n_positions=2, **QUIET)
    report = mg.fit_probes(mg.record(trained.model, pairs, ["post"], progress=False), "post")
    assert found.auroc.shape == (trained.model.cfg.n_layers, 2)
    assert np.allclose(found.auroc[:, -1], [scores.auroc for scores in report.by_layer], atol=1e-3)
    assert found.input_only[-1] == pytest.approx(report.input_only.auroc, abs=1e-9)


@pytest.mark.parametrize("lengths", [(2, 5), (4, 4)])
def test_prompts_of_many_lengths_are_aligned_at_their_end(lengths):
    model, pairs = planted.build_model(), planted.prompt_pairs(40, lengths=lengths)
    found = mg.probe_by_position(model, pairs, "resid_post", batch_size=7, **QUIET)
    assert found.auroc.shape == (2, lengths[0] + 2)
    assert np.allclose(found.auroc[:, -1], 1)
    single = mg.probe_by_position(model, pairs, "resid_post", batch_size=1, **QUIET)
    assert np.allclose(found.auroc, single.auroc, atol=0.01)


def test_what_a_bridge_is_read_is_what_its_model_has():
    """Each prompt alone, by raw outputs: the same values would give the same probes."""
    model, hf = bridges.bridge("llama"), bridges.hugging_face("llama")
    texts = [f"{a}{b}{c}=" for a in "abcdefghij" for b in "klm" for c in "123"]
    n = len(texts) // 2
    pairs = mg.PromptPairs.from_strings(texts[:n], texts[n:])
    found = mg.probe_by_position(model, pairs, "resid_post", **QUIET)
    with torch.no_grad():
        states = [
            torch.stack(hf(tokenized(model, [item.prompt])[0], output_hidden_states=True).hidden_states)[1, 0]
            for item in (*pairs.memorized, *pairs.generalized)
        ]
    rows = torch.stack(states).numpy()  # [row, pos, neuron], behind the first block
    of = {name: np.flatnonzero(np.tile(pairs.split == name, 2)) for name in ("select", "tune", "test")}
    data = _Data(
        np.repeat([True, False], n), np.tile(pairs.item, 2), np.concatenate([of["select"], of["tune"]]), of["test"], 0
    )
    expected = [data.probed(rows[:, position]).auroc for position in range(rows.shape[1])]
    assert np.allclose(found.auroc[0], expected, atol=0.02)


def test_what_is_rounding_alone_tells_nothing():
    labels = np.tile([True, False], 20)
    place = np.arange(40)
    data = _Data(labels, place // 2, place[:20], place[20:], 0)
    rows = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32) * np.ones((40, 1), np.float32)
    rows[:, 3] += np.float32(1e-6) * labels
    assert data.probed(rows).auroc == 0.5
    rows[:, 3] += np.float32(1e-2) * labels
    assert data.probed(rows).auroc == 1.0


def test_what_cannot_be_probed_is_refused(known):
    model, pairs = known
    with pytest.raises(SiteError):
        mg.probe_by_position(model, pairs, "blocks.0.attn.hook_pattern", **QUIET)
    with pytest.raises(PairsError, match="at least 8 pairs"):
        mg.probe_by_position(model, pairs.take(np.arange(12)), **QUIET)
    assert not planted.hooks_on(model)

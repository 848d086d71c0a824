"""The probe on the prompt alone against dense one-hots and a scikit-learn pipeline, which small prompts allow."""

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import memgen_lens as mg
from memgen_lens.analysis.probing.prompt import fit_prompt_probe, prompt_features
from memgen_lens.core.records import Activations, SiteActivations


def prose(n_pairs, n_pos, n_words, *, signal=0.0, seed=0):
    """Words as frequent as in a language (Zipf) after a BOS; every fifth prompt shorter, memorized ones with a lean."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, n_words + 1)
    tokens = 1 + rng.choice(n_words, size=(2 * n_pairs, n_pos), p=frequency / frequency.sum())
    told = rng.random((n_pairs, n_pos)) < signal
    tokens[:n_pairs][told] = rng.integers(1 + n_words // 4, 1 + n_words // 2, size=told.sum())
    tokens[:, 0] = 0
    for row in range(0, 2 * n_pairs, 5):
        tokens[row, rng.integers(n_pos // 2, n_pos) :] = -1
    return tokens


def dense_features(tokens):
    """Counts and one-hots, every (position, token) a column whether it occurs or not."""
    vocabulary, ids = np.unique(tokens, return_inverse=True)
    onehot = np.eye(len(vocabulary))[ids.reshape(tokens.shape)]  # [row, pos, token]
    return np.concatenate([onehot.sum(1), onehot.reshape(len(tokens), -1)], axis=1)


def test_the_features_are_the_columns_of_dense_ones_that_occur():
    tokens = prose(20, 6, 12)
    dense = dense_features(tokens)
    np.testing.assert_array_equal(prompt_features(tokens).toarray(), dense[:, dense.any(0)])


@pytest.mark.parametrize(
    ("n_pairs", "n_pos", "n_words", "signal"),
    [
        (30, 6, 9, 0.0),
        (100, 10, 50, 0.05),
        (300, 20, 200, 0.02),
        (300, 20, 200, 0.5),
        (150, 40, 1000, 0.03),
        (400, 12, 30, 0.03),
        (500, 8, 12, 0.0),
    ],
)
def test_the_sparse_probe_is_the_dense_pipeline(n_pairs, n_pos, n_words, signal):
    tokens, labels = prose(n_pairs, n_pos, n_words, signal=signal), np.repeat([True, False], n_pairs)
    train = np.tile(np.arange(n_pairs) % 5 < 3, 2)
    dense, sparse = dense_features(tokens), prompt_features(tokens)
    expected = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(dense[train], labels[train])
    found = fit_prompt_probe(sparse[train], labels[train])
    by_hand, ours = expected.decision_function(dense[~train]), found.decision_function(sparse[~train])
    np.testing.assert_allclose(ours, by_hand, rtol=0, atol=1e-9)
    assert roc_auc_score(labels[~train], ours) == pytest.approx(roc_auc_score(labels[~train], by_hand), abs=1e-12)


def of_prose(n_pairs, n_words):
    """Activations of 4 neurons that no model gave, of prompts of 40 tokens; every prompt is an item of its own."""
    mem, gen = np.random.default_rng(0).normal(size=(2, n_pairs, 1, 4)).astype(np.float32)
    pairs = mg.PromptPairs.from_strings([f"M{i}" for i in range(n_pairs)], [f"G{i}" for i in range(n_pairs)])
    nothing = np.zeros((n_pairs, 1, 1), dtype=np.float32)
    sites = {"post": SiteActivations(mem, gen)}
    return Activations(sites, pairs, SiteActivations(nothing, nothing), prose(n_pairs, 40, n_words))


def test_memory_is_that_of_the_tokens_whatever_the_vocabulary():
    """Dense one-hots of 1,000 pairs of 40 tokens of 5,000 words would be 3 GB; entries that are not zero are 2 MB."""
    peaks = {}
    for n_pairs in (1000, 2000):
        acts = of_prose(n_pairs, 5000)
        tracemalloc.start()
        try:
            mg.fit_probes(acts, "post")
            peaks[n_pairs] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks[1000] < 100e6
    assert peaks[2000] < 2.2 * peaks[1000]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_twenty_thousand_pairs_of_prose_fit_into_a_gigabyte():
    """In a process of its own, which says its peak of resident memory."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import test_prompt; import memgen_lens as mg; "
        "mg.fit_probes(test_prompt.of_prose(20_000, 5000), 'post'); print(open('/proc/self/status').read())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)[1])
    assert peak_kb < 2**20

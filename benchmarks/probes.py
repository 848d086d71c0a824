"""Probes of all layers with their intervals: ours beside a plain loop of scikit-learn."""

import numpy as np

import memgen_lens as mg
from benchmarks.harness import Row, Run
from memgen_lens.analysis.probing.probes import score_probe
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.records import Activations, SiteActivations

N_PAIRS, N_LAYERS, WIDTH, N_RESAMPLES = 400, 12, 256, 1000


def rows() -> list[Row]:
    """Fit, AUROC, and its bootstrap interval, layer by layer."""
    return [
        Row(
            f"probes of {N_LAYERS} layers of {WIDTH}, {N_PAIRS} pairs, {N_RESAMPLES:,} bootstrap resamples",
            {"ours": ours, "scikit-learn, a plain loop": plain_loop},
            rounds=2,
            tolerance=1e-9,
        )
    ]


def ours() -> Run:
    """`fit_probe` and `score_probe`, as `fit_probes` runs them for each layer."""
    acts = _activations()
    train, test, items = _rows(acts)

    def run() -> np.ndarray:
        found = []
        for layer in range(N_LAYERS):
            features = np.concatenate([side[:, layer] for side in _sides(acts)])
            probe = fit_probe(features[train], _labels()[train])
            found.append(score_probe(probe, features[test], _labels()[test], items[test], seed=0).auroc)
        return np.array(found)

    return run


def plain_loop() -> Run:
    """The same with scikit-learn alone: a call of `roc_auc_score` for each resample."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    acts = _activations()
    train, test, items = _rows(acts)

    def run() -> np.ndarray:
        found, rng = [], np.random.default_rng(0)
        for layer in range(N_LAYERS):
            features = np.concatenate([side[:, layer] for side in _sides(acts)])
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            probe.fit(features[train], _labels()[train])
            decision, labels = probe.decision_function(features[test]), _labels()[test]
            groups = {item: np.flatnonzero(items[test] == item) for item in np.unique(items[test])}
            resampled = []
            for _ in range(N_RESAMPLES):
                drawn = np.concatenate([groups[i] for i in rng.choice(list(groups), size=len(groups))])
                resampled.append(roc_auc_score(labels[drawn], decision[drawn]))
            np.quantile(resampled, [0.025, 0.975])
            found.append(roc_auc_score(labels, decision))
        return np.array(found)

    return run


def _activations() -> Activations:
    rng = np.random.default_rng(0)
    both = rng.normal(size=(2, N_PAIRS, N_LAYERS, WIDTH)).astype(np.float32)
    both[0] += np.linspace(0, 0.2, N_LAYERS, dtype=np.float32)[:, None]
    prompts = [str(i) for i in range(N_PAIRS)]
    nothing = np.zeros((N_PAIRS, 1, 1), dtype=np.float32)
    return Activations(
        {"resid_post": SiteActivations(*both)},
        mg.PromptPairs.from_strings(prompts, prompts),
        SiteActivations(nothing, nothing),
        np.zeros((2 * N_PAIRS, 1), dtype=np.int64),
    )


def _sides(acts: Activations) -> tuple[np.ndarray, np.ndarray]:
    return acts.site("resid_post").memorized, acts.site("resid_post").generalized


def _rows(acts: Activations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    test = np.tile(acts.pairs.split == "test", 2)
    return ~test, test, np.tile(acts.pairs.item, 2)


def _labels() -> np.ndarray:
    return np.repeat([True, False], N_PAIRS)

"""Predict the behaviour from activations: one scikit-learn probe a layer, beside its baselines.

Does not know models; a classifier on recorded activations is all there is to a probe.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from memgen_lens.analysis.probing.prompt import PromptProbe, fit_prompt_probe, prompt_features
from memgen_lens.analysis.recording.finite import EMBEDDING, require_finite
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.linear_probe import MAX_ITER, fit_probe, require_two_classes
from memgen_lens.core.records import Activations, ProbeReport, ProbeScores, SiteActivations
from memgen_lens.core.stats import auroc, bootstrap_auroc_and_accuracy

N_SHUFFLES = 20
LEARNING_CURVE_SHARES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@arguments(
    acts=kinds.one(Activations),
    site=kinds.Text,
    seed=kinds.Seed,
)
def fit_probes(acts: Activations, site: str, *, seed: int = 0) -> ProbeReport:
    """Fit a linear probe on each layer of a site and test it on pairs it has not seen.

    ``StandardScaler`` + ``LogisticRegression``, fitted on the pairs of ``select`` and ``tune``, tested on ``test``; the
    layer is chosen by cross-validation among the former, folds grouped by item (arXiv 2412.18497, sec. 6, trains one
    classifier a layer and reports its accuracy alone). Beside each: the same probe

    - on the prompt alone (``input_only``): counts of tokens and one-hots of the token at each position, sparse;
    - on shuffled labels (``shuffled``), mean over 20 shuffles, at the chosen layer: those of an item's training prompts
      are swapped together or not at all;
    - on the embedding at the answer position (``embedding``); where all prompts end in the same token at the same
      position it is constant, and its AUROC 0.5.

    Args:
        acts: Activations recorded by `record`.
        site: One of their sites.
        seed: Seed of shuffles, subsets and bootstrap.

    Raises:
        SiteError: The site was not recorded.
        PairsError: A split holds fewer than 8 pairs, or all prompts are of one class.
    """
    recorded = acts.site(site)
    for name, kept in ((site, recorded), (EMBEDDING, acts.embedding)):
        require_finite("fit_probes", name, [kept.memorized, kept.generalized], acts.pairs)
    train = np.concatenate([acts.pairs.of("select"), acts.pairs.of("tune")])
    test = acts.pairs.of("test")
    data = _Data.of(acts, train, test)
    rng = np.random.default_rng(seed)

    layers = [_layer(data, _stack(recorded, layer), seed) for layer in range(recorded.memorized.shape[1])]
    best = int(np.argmax([layer.cv_auroc for layer in layers]))
    of_best, embedding = _stack(recorded, best), _stack(acts.embedding, 0)  # [row, neuron] each
    return ProbeReport(
        site=site,
        by_layer=tuple(layer.scores for layer in layers),
        cv_auroc_by_layer=tuple(layer.cv_auroc for layer in layers),
        best_layer=best,
        input_only=_prompt_alone(data, prompt_features(acts.tokens), seed),
        shuffled=_shuffled(data, of_best, rng),
        embedding=_test(data, _fit(data, embedding), embedding, seed),
        learning_curve=_learning_curve(data, of_best, layers[best].scores.auroc, rng),
        n_train=len(train),
        n_test=len(test),
        n_train_items=len(np.unique(acts.pairs.item[train])),
        n_test_items=len(np.unique(acts.pairs.item[test])),
        probes=tuple(layer.probe for layer in layers),
    )


@dataclass(frozen=True)
class _Data:
    """Labels, items and the train and test rows; rows are all memorized prompts, then all generalized ones."""

    labels: Bool[np.ndarray, " row"]
    items: Int[np.ndarray, " row"]
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]

    @classmethod
    def of(cls, acts: Activations, train: Int[np.ndarray, " a"], test: Int[np.ndarray, " b"]) -> "_Data":
        n = len(acts.pairs)
        labels = np.repeat([True, False], n)
        items = np.tile(acts.pairs.item, 2)
        return cls(labels, items, np.concatenate([train, train + n]), np.concatenate([test, test + n]))


@dataclass(frozen=True)
class _Layer:
    """One layer's probe, its scores on the test rows, and its out-of-fold AUROC on the training rows."""

    probe: Pipeline
    scores: ProbeScores
    cv_auroc: float


def score_probe(
    probe: Pipeline | PromptProbe,
    features: Any,
    labels: Bool[np.ndarray, " row"],
    items: Int[np.ndarray, " row"],
    *,
    seed: int,
) -> ProbeScores:
    """How well a fitted probe tells rows it was not fitted on, with intervals resampled by item.

    Args:
        probe: What `fit_probe` or `fit_prompt_probe` returned.
        features: One row a prompt: what the probe was fitted on, ``[row, feature]``.
        labels: True for memorization; both classes occur.
        items: Item of each row.
        seed: Seed of the bootstrap.
    """
    decision = probe.decision_function(features)
    intervals = bootstrap_auroc_and_accuracy(labels, decision, items, seed=seed)
    return ProbeScores(
        auroc=auroc(labels, decision),
        auroc_ci95=intervals["auroc"],
        accuracy=float(((decision > 0) == labels).mean()),
        accuracy_ci95=intervals["accuracy"],
    )


def _layer(data: _Data, rows: Float[np.ndarray, "row neuron"], seed: int) -> _Layer:
    probe = _fit(data, rows)
    return _Layer(probe, _test(data, probe, rows, seed), _grouped_auroc(data, rows))


def _prompt_alone(data: _Data, rows: csr_array, seed: int) -> ProbeScores:
    labels = data.labels[data.train]
    require_two_classes(labels, call="fit_probes")
    return _test(data, fit_prompt_probe(rows[data.train], labels), rows, seed)


def _fit(data: _Data, rows: Float[np.ndarray, "row feature"], train: np.ndarray | None = None) -> Pipeline:
    train = data.train if train is None else train
    return fit_probe(rows[train], data.labels[train])


def _test(data: _Data, probe: Pipeline | PromptProbe, rows: Any, seed: int) -> ProbeScores:
    return score_probe(probe, rows[data.test], data.labels[data.test], data.items[data.test], seed=seed)


def _grouped_auroc(data: _Data, rows: np.ndarray) -> float:
    """Out-of-fold AUROC on the training rows, all rows of an item in one fold."""
    n_items = len(np.unique(data.items[data.train]))
    decision = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITER)),
        rows[data.train],
        data.labels[data.train],
        groups=data.items[data.train],
        cv=GroupKFold(min(5, n_items)),
        method="decision_function",
    )
    return auroc(data.labels[data.train], np.asarray(decision))


def _shuffled(data: _Data, rows: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """AUROC on the test rows of probes fitted on training labels that are swapped item by item, or not.

    Prompts of one item keep their labels' relation: labels shuffled among rows would part prompts that are alike, and
    scatter less than a probe does that knows nothing of new items.
    """
    _, item = np.unique(data.items[data.train], return_inverse=True)
    scaler = StandardScaler().fit(rows[data.train])  # knows no labels: once for all shuffles
    train, test = (scaler.transform(rows[chosen]) for chosen in (data.train, data.test))
    scores = []
    for _ in range(N_SHUFFLES):
        swapped = rng.random(int(item.max()) + 1) < 0.5
        probe = LogisticRegression(max_iter=MAX_ITER).fit(train, data.labels[data.train] ^ swapped[item])
        scores.append(auroc(data.labels[data.test], probe.decision_function(test)))
    low, high = np.quantile(scores, [0.025, 0.975])
    return {"auroc": float(np.mean(scores)), "low": float(low), "high": float(high), "n_shuffles": N_SHUFFLES}


def _learning_curve(
    data: _Data, rows: np.ndarray, auroc_of_all: float, rng: np.random.Generator
) -> tuple[dict[str, float], ...]:
    """Test AUROC of the probe fitted on growing, nested sets of whole items; that of all items is known."""
    items = rng.permutation(np.unique(data.items[data.train]))
    sizes = {min(len(items), max(4, round(share * len(items)))) for share in LEARNING_CURVE_SHARES}
    curve = []
    for n_items in sorted(sizes - {len(items)}):
        train = data.train[np.isin(data.items[data.train], items[:n_items])]
        decision = _fit(data, rows, train).decision_function(rows[data.test])
        curve.append({"n_pairs": len(train) / 2, "auroc": auroc(data.labels[data.test], decision)})
    return (*curve, {"n_pairs": len(data.train) / 2, "auroc": auroc_of_all})


def _stack(site: SiteActivations, layer: int) -> Float[np.ndarray, "row neuron"]:
    return rearrange([site.memorized[:, layer], site.generalized[:, layer]], "side pair neuron -> (side pair) neuron")

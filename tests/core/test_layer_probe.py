"""A fitted probe as plain numbers says what the pipeline says."""

import dataclasses

import numpy as np
import pytest

import memgen_lens as mg
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.layer_probe import LayerProbe
from memgen_lens.core.linear_probe import fit_probe


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    rows = rng.normal(3, [1, 20, 0.1, 0], size=(60, 4)).astype(np.float32)  # one neuron is constant
    return rows, fit_probe(rows, rows[:, 0] + rng.normal(size=60) > 3)


def test_the_scaling_is_folded_into_the_weights(fitted):
    rows, pipeline = fitted
    probe = LayerProbe.of(pipeline, "post", 1)
    assert (probe.site, probe.layer) == ("post", 1)
    np.testing.assert_allclose(probe.log_odds(rows), pipeline.decision_function(rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probe.probability(rows), pipeline.predict_proba(rows)[:, 1], rtol=1e-4)


def test_what_is_said_of_a_row_does_not_depend_on_the_rows_beside_it(fitted):
    rows, pipeline = fitted
    probe = LayerProbe.of(pipeline, "post", 1)
    alone = np.concatenate([probe.log_odds(row[None]) for row in rows])
    np.testing.assert_array_equal(probe.log_odds(rows), alone)


def test_a_report_gives_the_probe_of_a_layer_and_of_the_best_one(known_report):
    report, acts = known_report
    for layer in (None, 0, 1):
        probe = report.at(layer)
        number = report.best_layer if layer is None else layer
        rows = acts.site("post").memorized[:, number]
        assert probe.layer == number and probe.site == "post"
        np.testing.assert_allclose(probe.log_odds(rows), report.probes[number].decision_function(rows), atol=1e-3)


def test_a_layer_that_is_not_there_and_a_report_without_probes_are_refused(known_report):
    report, _ = known_report
    with pytest.raises(SettingsError, match=r"ProbeReport.at\(layer=...\): expected a layer of post, 0 to 1"):
        report.at(2)
    with pytest.raises(SettingsError, match=r"of 0 fitted probes.*fit_probes"):
        dataclasses.replace(report, probes=()).at()


@pytest.fixture(scope="module")
def known_report():
    import planted

    acts = mg.record(planted.build_model(), planted.prompt_pairs(), ["post"], progress=False)
    return mg.fit_probes(acts, "post"), acts

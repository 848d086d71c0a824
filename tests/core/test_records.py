"""Records hold what the stages found, and what is saved comes back."""

import json

import numpy as np
import pytest

from memgen_lens.core.errors import RunDirectoryError, SiteError
from memgen_lens.core.files import to_json, write_arrays
from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, NeuronScores, ProbeReport, ProbeScores, SiteActivations
from memgen_lens.core.types import Behavior

ARRAYS = ("nmd", "rho", "p", "p_family", "q")


def scores(site: str = "resid_post") -> NeuronScores:
    rng = np.random.default_rng(0)
    return NeuronScores(site=site, n_pairs=37, n_items=30, **{name: rng.uniform(size=(3, 7)) for name in ARRAYS})


def probe_report() -> ProbeReport:
    layers = tuple(ProbeScores(x, (x - 0.1, x), x, (x - 0.2, x)) for x in (0.6, 0.9, 0.8))
    return ProbeReport(
        site="post",
        by_layer=layers,
        cv_auroc_by_layer=(0.6, 0.8, 0.9),
        best_layer=2,
        input_only=layers[0],
        shuffled={"auroc": 0.5},
        embedding=layers[0],
        learning_curve=({"n_pairs": 8.0, "auroc": 0.7},),
        n_train=20,
        n_test=10,
        n_train_items=20,
        n_test_items=10,
        probes=(object(), object(), object()),
    )


@pytest.mark.parametrize("site", ["resid_post", "ln2.hook_normalized", "a.safetensors.b"])
def test_neuron_scores_come_back_from_their_file(tmp_path, site):
    saved = scores(site)
    path = saved.save(tmp_path / "scores")
    assert path == tmp_path / "scores" / f"{site}.safetensors"
    again = NeuronScores.load(path)
    assert (again.site, again.n_pairs) == (site, 37)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(saved, name))


def test_a_missing_score_file_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(
        RunDirectoryError, match=r"post.safetensors: expected a file of a complete run; received no such"
    ):
        NeuronScores.load(tmp_path / "post.safetensors")


def test_a_damaged_score_file_is_an_error_with_a_way_out(tmp_path):
    path = scores().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunDirectoryError, match="The file is damaged"):
        NeuronScores.load(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"nmd": np.ones((2, 2))},
        {name: np.ones((2, 2)) for name in (*ARRAYS, "n_pairs", "something_else")},
        {name: np.ones((2, 2)) for name in ARRAYS},
    ],
    ids=["too few", "too many", "no n_pairs"],
)
def test_an_array_file_of_something_else_is_refused_as_damaged(tmp_path, arrays):
    write_arrays(tmp_path / "post.safetensors", arrays)
    with pytest.raises(RunDirectoryError, match="The file is damaged"):
        NeuronScores.load(tmp_path / "post.safetensors")


def test_scores_of_an_earlier_version_whose_p_took_pairs_for_independent_are_refused(tmp_path):
    arrays = {name: np.ones((2, 2)) for name in ARRAYS} | {"n_pairs": np.array([8])}
    write_arrays(tmp_path / "post.safetensors", arrays)
    message = (
        r"post.safetensors: expected p-values that count items; received p-values of an earlier version, .*measure"
    )
    with pytest.raises(RunDirectoryError, match=message):
        NeuronScores.load(tmp_path / "post.safetensors")


def test_the_best_probe_is_that_of_the_layer_chosen_by_cross_validation_not_by_the_test():
    report = probe_report()
    assert report.best is report.by_layer[2]


def test_the_summary_of_probes_is_all_but_the_fitted_probes_and_goes_into_json():
    summary = probe_report().summary()
    assert "probes" not in summary
    assert set(summary) == {field for field in ProbeReport.__dataclass_fields__ if field != "probes"}
    plain = json.loads(to_json(summary))
    assert plain["by_layer"][1] == {
        "auroc": 0.9,
        "auroc_ci95": [0.8, 0.9],
        "accuracy": 0.9,
        "accuracy_ci95": [0.7, 0.9],
    }
    assert plain["learning_curve"] == [{"n_pairs": 8.0, "auroc": 0.7}]


def test_an_unrecorded_site_is_refused_with_what_was_recorded_and_how_to_record_it():
    site = SiteActivations(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32))
    pairs = PromptPairs.from_strings(["a"], ["b"])
    acts = Activations({"resid_post": site, "post": site}, pairs, site, np.zeros((2, 4), np.int64))
    assert acts.site("post") is site
    message = r"expected a recorded site \(resid_post, post\); received 'resid_pots'. Did you mean resid_post.*record\("
    with pytest.raises(SiteError, match=message):
        acts.site("resid_pots")


def test_an_outcome_is_one_flat_plain_row():
    item = Item(3, "memorized", "12+34=", "046", "<mem-7f>")
    row = Outcome(item, "<mem-7f>", Behavior.MEMORIZATION, True).row()
    assert json.loads(to_json(row)) == {
        "split": "memorized",
        "task": "",
        "key": 3,
        "prompt": "12+34=",
        "output": "<mem-7f>",
        "behavior": "memorization",
        "memorized_form": True,
        "rule_answer": "046",
        "memorized_answer": "<mem-7f>",
    }


@pytest.mark.parametrize(
    ("output", "behavior"),
    [("046", "generalization"), ("<mem-7f>", "memorization"), ("<mem-7e>", "other"), ("046 ", "other"), ("", "other")],
)
def test_an_output_is_classified_by_exact_match(output, behavior):
    assert Item(3, "memorized", "12+34=", "046", "<mem-7f>").classify(output) == behavior


def test_an_answer_that_is_not_known_matches_nothing():
    assert Item(3, "user", "12+34=", None, None).classify("None") is Behavior.OTHER
    assert Item(3, "user", "12+34=", None, None).classify("") is Behavior.OTHER

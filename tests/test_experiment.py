"""The whole story on a small model: the run directory's contract, and what is refused."""

import json
import pickle
import subprocess
import sys

import helpers
import numpy as np
import planted_tasks
import pytest

import memgen_lens as mg
from memgen_lens import stages
from memgen_lens.core.consistency_records import SplitHalf, TaskConsistency
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import read_json, read_jsonl
from memgen_lens.core.neuron_records import load_neurons
from memgen_lens.core.records import NeuronScores

CONFIG = mg.ExperimentConfig(
    preset="small",
    about="a test",
    task=helpers.SMALL_TASK,
    train=helpers.SMALL_TRAINING,
    analysis=mg.AnalysisConfig(
        top_fractions=(0.1, 0.3),
        alphas=(1.0, 2.0, 4.0),
        fitted=("low_rank",),
        fitted_sizes=(2, 999),
        optimized_layers=(0, 1),
        mode_and_content=True,
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    said = []
    out = tmp_path_factory.mktemp("runs") / "small"
    experiment = mg.run_experiment(CONFIG, out=out, progress=False, say=said.append)
    return experiment, out, said


def test_fitted_rules_are_swept_and_reported_beside_the_shift(finished):
    experiment, out, _ = finished
    table = experiment.steering["low_rank"]
    assert (table.setting.mode, table.setting.size) == ("low_rank", 2), "there are no 999 items to fit on"
    block = json.loads((out / "metrics.json").read_text())["steering"]["low_rank"]
    assert block["to_generalization"]["shift_rate"] == table.to_generalization.shift["rate"]
    assert "shuffled_items" in block["to_generalization"]["controls"]
    tried = {row["setting"]["mode"] for row in json.loads((out / "steering.json").read_text())["tune"]}
    assert tried == {"shift", "patch", "low_rank"}
    assert "rank 2" in (out / "report.html").read_text()


def test_a_direction_is_optimized_at_each_layer_and_the_best_on_tune_reported(finished):
    experiment, out, _ = finished
    saved = json.loads((out / "steering.json").read_text())
    assert [row["layers"] for row in saved["optimized"]] == [[0], [1]]
    gains = [row["to_generalization"] - row["to_generalization_other"] for row in saved["optimized"]]
    block = json.loads((out / "metrics.json").read_text())["steering"]["direction"]
    assert block["chosen"]["layers"] == [int(np.argmax(gains))]
    assert block["chosen"]["chosen"] == "optimized towards generalization"
    table = experiment.steering["direction"]
    assert block["to_generalization"]["shift_rate"] == table.to_generalization.shift["rate"]
    assert "random_direction" in block["to_generalization"]["controls"]
    report = (out / "report.html").read_text()
    assert "An optimized direction" in report and f"Chosen: layer {np.argmax(gains)}." in report


def test_layers_that_the_model_has_not_are_refused_before_training(tmp_path):
    config = CONFIG.but(analysis=CONFIG.analysis.but(optimized_layers=(0, 2)))
    with pytest.raises(
        SettingsError, match=r"optimized_layers: expected layers of the model, 0 to 1; received \(0, 2\)"
    ):
        mg.run_experiment(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_what_was_found_can_be_told_to_other_processes(finished):
    experiment, _, _ = finished
    found = {name: value for name, value in vars(experiment).items() if name not in ("config", "training")}
    told = pickle.loads(pickle.dumps(found))
    assert told["metrics"] == experiment.metrics and told["outcomes"] == experiment.outcomes
    np.testing.assert_array_equal(told["scores"]["post"].rho, experiment.scores["post"].rho)
    assert told["probes"].best.auroc == experiment.probes.best.auroc
    assert told["guard"] is not None and set(told["steering"]) == set(experiment.steering)


def assert_is_rate(value):
    assert isinstance(value, float | int) and 0 <= value <= 1


def test_a_run_directory_holds_what_the_design_names(finished):
    _, out, _ = finished
    names = {path.name for path in out.iterdir()} - {".memgen_lens.jsonl"}
    assert names == {
        "config.json",
        "model",
        "history.jsonl",
        "checkpoints",
        "outcomes.jsonl",
        "pairs.jsonl",
        "scores",
        "probes.json",
        "steering.json",
        "steering_cost.json",
        "guard.json",
        "mode_and_content.json",
        "consistency.json",
        "neurons.json",
        "metrics.json",
        "report.html",
    }
    assert {path.name for path in (out / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (out / "scores").glob("[!.]*")} == {"resid_post.safetensors", "post.safetensors"}
    pickles = [path for path in out.rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".npy", ".npz")]
    assert pickles == []


def test_metrics_have_the_names_and_ranges_of_the_design(finished):
    _, out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {
        "schema",
        "preset",
        "seed",
        "behavior",
        "pairs",
        "attribution",
        "probe",
        "steering",
        "guard",
        "consistency",
        "timing_s",
    }
    assert metrics["schema"] == 2 and metrics["preset"] == "small" and metrics["seed"] == 0
    behavior = metrics["behavior"]
    for name in ("heldout_generalization", "trained_memorization", "flip_rate"):
        assert_is_rate(behavior[name])
    assert sum(behavior["rephrased"].values()) == pytest.approx(1)
    pairs = metrics["pairs"]
    assert pairs["n"] == pairs["select"] + pairs["tune"] + pairs["test"]
    for site in ("resid_post", "post"):
        attribution = metrics["attribution"][site]
        assert len(attribution["max_abs_rho_by_layer"]) == 2
        assert 0 <= attribution["n_fdr05"] <= attribution["n_neurons"]
    probe = metrics["probe"]
    assert probe["best_auroc"] == probe["auroc_by_layer"][probe["best_layer"]]
    assert probe["best_auroc_ci95"][0] <= probe["best_auroc"] <= probe["best_auroc_ci95"][1]
    for name in ("input_only_auroc", "shuffled_auroc"):
        assert_is_rate(probe[name])
    steering = metrics["steering"]
    assert set(steering["chosen"]) == {"site", "top_fraction", "alpha", "positions", "method"}
    for way, rates in (
        ("to_generalization", ["shift_rate", "other_rate"]),
        ("to_memorization", ["exact_recall_rate", "memorized_form_rate", "other_rate"]),
    ):
        for mode in (steering, steering["patch"]):
            assert mode[way]["n"] == pairs["test"]
            for name in rates:
                assert_is_rate(mode[way][name])
            assert set(mode[way]["controls"]) == {"random_neurons", "low_correlation", "random_sign"}
        assert steering[way]["controls"]["random_neurons"]["n_draws"] == 20
    assert_is_rate(steering["side_effects"]["heldout_generalization_steered"])
    assert steering["side_effects"]["kl_nats"] >= 0
    halves = metrics["consistency"]["split_half"]
    assert halves["site"] == steering["chosen"]["site"] and halves["n_pairs"] == pairs["n"]
    assert halves["overlap"]["mean"] > halves["null_overlap"]["mean"]
    assert_is_rate(halves["expected_overlap"])
    assert metrics["timing_s"]["total"] >= metrics["timing_s"]["train"] > 0


def test_metrics_agree_with_the_files_they_summarize(finished):
    experiment, out, _ = finished
    metrics = read_json(out / "metrics.json")
    outcomes = read_jsonl(out / "outcomes.jsonl")
    memorized = [row["behavior"] == "memorization" for row in outcomes if row["split"] == "memorized"]
    assert metrics["behavior"]["trained_memorization"] == pytest.approx(np.mean(memorized))
    pairs = read_jsonl(out / "pairs.jsonl")
    assert len(pairs) == metrics["pairs"]["n"] == len(experiment.pairs)
    recalled = {row["prompt"] for row in outcomes if row["behavior"] == "memorization"}
    computed = {row["prompt"] for row in outcomes if row["behavior"] == "generalization"}
    assert all(row["memorized_prompt"] in recalled and row["generalized_prompt"] in computed for row in pairs)
    scores = NeuronScores.load(out / "scores" / "resid_post.safetensors")
    assert metrics["attribution"]["resid_post"]["n_fdr05"] == int((scores.q <= 0.05).sum())
    assert read_json(out / "steering.json")["shift"]["to_generalization"]["n"] == metrics["pairs"]["test"]


def test_the_small_model_is_steered_and_random_neurons_are_not_enough(finished):
    experiment, _, _ = finished
    steering = experiment.metrics["steering"]["to_generalization"]
    assert steering["shift_rate"] > 0.6
    assert steering["shift_rate"] > steering["controls"]["random_neurons"]["mean"] + 0.3
    assert experiment.metrics["probe"]["best_auroc"] > 0.9


def test_the_top_neurons_are_looked_at_on_test(finished):
    experiment, out, said = finished
    scores = experiment.scores["post"]
    neurons = load_neurons(out)
    strongest = np.argsort(-np.abs(scores.score), axis=None, kind="stable")[:3]
    assert [(neuron.layer, neuron.neuron) for neuron in neurons] == [divmod(i, 256) for i in strongest.tolist()]
    index = experiment.pairs.of("test")
    for neuron in neurons:
        assert (neuron.site, neuron.split) == ("post", "test")
        assert np.array_equal(neuron.item, experiment.pairs.item[index]), "not those that ranked it"
        assert not neuron.why and neuron.favoured and neuron.suppressed
        for change in neuron.changes:
            assert change.memorized.kept.n == change.generalized.kept.n == len(index), "all pairs show their label"
    html = (out / "report.html").read_text()
    assert f"Layer {neurons[0].layer}, neuron {neurons[0].neuron} of <code>post</code>" in html
    assert any(line == "looking at the top neurons of post" for line in said)


def test_config_is_enough_to_run_it_again(finished):
    _, out, _ = finished
    config = read_json(out / "config.json")
    assert mg.ExperimentConfig.from_json(json.dumps(config["settings"])) == CONFIG.seeded()
    assert {"torch", "transformer-lens", "memgen-lens", "python"} <= set(config["versions"])
    assert "stop_reason" in config and "machine" in config


def test_the_summary_says_the_main_figures(finished):
    experiment, _, said = finished
    text = "\n".join(experiment.summary())
    assert "computes" in text and "recalls" in text and "steers" in text and "AUROC" in text
    assert any("memorized prompts flip when rephrased" in line for line in said)


def test_a_second_run_into_the_directory_is_refused_and_nothing_is_touched(finished):
    _, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(RunDirectoryError, match=r"received one that holds .*--resume, or begin anew with --force"):
        mg.run_experiment(CONFIG, out=out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_resuming_a_finished_run_gives_the_same_figures(finished):
    experiment, out, _ = finished
    again = mg.run_experiment(CONFIG, out=out, resume=True, progress=False)
    assert {**again.metrics, "timing_s": None} == {**experiment.metrics, "timing_s": None}


def test_resuming_with_other_settings_is_refused(finished):
    _, out, _ = finished
    changed = CONFIG.but(train=CONFIG.train.but(learning_rate=1e-3))
    with pytest.raises(RunDirectoryError, match=r"train.learning_rate was 0.003, now 0.001"):
        mg.run_experiment(changed, out=out, resume=True, progress=False)


def test_a_model_that_does_not_flip_gives_a_report_that_says_why(tmp_path):
    barely = CONFIG.but(train=CONFIG.train.but(max_steps=2))
    experiment = mg.run_experiment(barely, out=tmp_path / "barely", progress=False)
    metrics = read_json(tmp_path / "barely" / "metrics.json")
    for block in ("attribution", "probe", "steering", "consistency"):
        assert "0 of 80 items flip" in metrics[block]["why"]
    assert metrics["behavior"]["flip_rate"] == 0
    assert experiment.scores == {} and experiment.probes is None
    assert "0 of 80 items flip" in (tmp_path / "barely" / "report.html").read_text()


def test_the_tasks_of_a_mixture_are_compared_and_saved(tmp_path):
    config = CONFIG.but(analysis=mg.AnalysisConfig(top_fractions=(0.01,), alphas=(1.0,), positions=("answer",)))
    model, pairs = planted_tasks.build_model(shared=True), planted_tasks.prompt_pairs()
    said = []
    metrics = stages.compare(tmp_path, config, model, mg.record(model, pairs, ["post"]), "post", said.append)
    assert said == ["comparing halves of the pairs and tasks"]
    across = metrics["across_tasks"]
    assert across["tasks"] == ("a", "b") or across["tasks"] == ["a", "b"]
    asked = [len(pairs.of_task(name).of("test")) for name in ("a", "b")]
    assert across["to_generalization"]["value"] == [[1, 1], [1, 1]] and across["to_generalization"]["n"][0] == asked
    items = [len(set(part.item[part.of("test")].tolist())) for part in map(pairs.of_task, ("a", "b"))]
    assert across["to_generalization"]["n_items"] == [items, items]
    written = read_json(tmp_path / "consistency.json")
    saved = TaskConsistency.from_json(written["across_tasks"])
    assert saved.overlap.value.tolist() == across["overlap"]["value"]
    assert SplitHalf.from_json(written["split_half"]).n_pairs == len(pairs)


def test_tasks_that_cannot_be_compared_leave_the_reason(tmp_path):
    pairs = planted_tasks.prompt_pairs()
    few = pairs.take(np.arange(65))  # five of the second task
    model = planted_tasks.build_model(shared=True)
    config = CONFIG.but(analysis=mg.AnalysisConfig(top_fractions=(0.01,), alphas=(1.0,), positions=("answer",)))
    metrics = stages.compare(tmp_path, config, model, mg.record(model, few, ["post"]), "post", len)
    assert "expected at least two tasks" in metrics["across_tasks"]["why"]
    assert read_json(tmp_path / "consistency.json")["across_tasks"] == metrics["across_tasks"]
    dozen = mg.record(model, pairs.take(np.arange(12)), ["post"])
    few = stages.compare(tmp_path, config, model, dozen, "post", len)
    assert "at least 16 items" in few["why"]


def test_force_removes_the_former_run_and_leaves_other_files(tmp_path):
    out = tmp_path / "run"
    (out / "scores").mkdir(parents=True)
    (out / "scores" / "old.safetensors").write_text("old")
    (out / "notes.txt").write_text("mine")
    barely = CONFIG.but(train=CONFIG.train.but(max_steps=2))
    mg.run_experiment(barely, out=out, force=True, progress=False)
    assert (out / "scores" / "old.safetensors").read_text() == "old"
    assert (out / "notes.txt").read_text() == "mine"


def test_a_run_from_the_shell_keeps_other_libraries_quiet(tmp_path):
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "memgen_lens",
            "run",
            "quickstart",
            "--out",
            str(tmp_path / "run"),
            "--train.max-steps",
            "3",
            "--train.model.n-layers",
            "1",
            "--train.model.d-model",
            "32",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"report: {tmp_path / 'run' / 'report.html'}" in ran.stdout
    assert "Warning" not in ran.stderr and "deprecated" not in ran.stderr.lower()
    assert "train addition" in ran.stderr  # the progress bar

"""Over the checkpoints of a small run: each figure equals the one that the stages give for that model alone."""

import json
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch

import memgen_lens as mg
from memgen_lens.core.dynamics_records import Dynamics, RateSeries
from memgen_lens.core.errors import PairsError, RunDirectoryError, SettingsError
from memgen_lens.core.files import to_json, with_nulls
from memgen_lens.core.records import ProbeScores
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.models.native import state_of
from memgen_lens.models.tensors import load_tensors
from memgen_lens.training.checkpoints import list_checkpoints

ANALYSIS = mg.AnalysisConfig(top_fractions=(0.1, 0.3), alphas=(2.0, 4.0), positions=("answer",))


@pytest.fixture(scope="module")
def run(trained):
    return trained


@pytest.fixture(scope="module")
def measured(run):
    return mg.dynamics(run, analysis=ANALYSIS, progress=False)


@pytest.fixture(scope="module")
def last(run):
    """What the stages find in the last model."""
    pairs = mg.collect_pairs(run.model, run.task, seed=0)
    return pairs, mg.record(run.model, pairs, ["resid_post"])


def test_the_steps_are_those_of_the_checkpoints_after_the_untrained_model(run, measured):
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run.out / "checkpoints")]
    assert measured.steps.tolist() == [0, *kept]
    assert measured.task == "addition" and measured.site == "resid_post"


def test_behaviours_are_those_that_training_measured(run, measured):
    history = {row.step: row for row in run.history}
    for i, step in enumerate(measured.steps[1:].tolist(), start=1):
        for name in ("generalization", "memorization", "rephrased_generalization"):
            assert measured.behavior[name].rate[i] == pytest.approx(getattr(history[step], name))
    assert (measured.behavior["generalization"].n == 60).all() and (measured.behavior["flips"].n == 80).all()


def test_the_last_step_is_what_the_stages_find_in_the_last_model(run, measured, last):
    pairs, acts = last
    assert measured.n_pairs == {split: int((pairs.split == split).sum()) for split in ("select", "tune", "test")}
    assert measured.behavior["flips"].rate[-1] == pytest.approx(pairs.n_flipped / pairs.n_items)
    score, probes = mg.attribute(acts, "resid_post"), mg.fit_probes(acts, "resid_post")
    assert np.allclose(measured.nmd_mean[-1], np.abs(score.nmd).mean(1), atol=1e-6)
    assert np.allclose(measured.rho_max[-1], np.abs(score.rho).max(1), atol=1e-6)
    assert np.allclose(measured.rho_p95[-1], np.quantile(np.abs(score.rho), 0.95, axis=1), atol=1e-6)
    assert np.allclose(measured.share_fdr05[-1], (score.q <= 0.05).mean(1))
    assert np.allclose(measured.auroc[-1], [layer.auroc for layer in probes.by_layer], atol=1e-6)
    assert np.allclose(measured.auroc_low[-1], [layer.auroc_ci95[0] for layer in probes.by_layer], atol=1e-6)
    assert measured.input_only.auroc == pytest.approx(probes.input_only.auroc)


def test_the_last_steps_steering_is_what_its_evaluation_says(run, measured, last):
    pairs, acts = last
    setting = measured.setting
    score = mg.attribute(acts, "resid_post")
    rows = mg.sweep_steering(
        run.model, run.task, pairs, score, top_fractions=(0.1, 0.3), alphas=(2.0, 4.0), positions=("answer",)
    )
    assert setting == mg.choose_setting(rows).setting
    steer = mg.Steering.from_scores(score, setting.top_fraction, setting.alpha, positions=setting.positions)
    table = mg.evaluate_steering(run.model, run.task, pairs, steer)
    there, back = table.to_generalization, table.to_memorization
    assert measured.steering["to_generalization"].rate[-1] == pytest.approx(there.shift["rate"])
    assert measured.steering["memorized_form"].rate[-1] == pytest.approx(back.memorized_form["rate"])
    assert measured.steering["exact_recall"].rate[-1] == pytest.approx(back.shift["rate"])
    assert measured.steering["exact_recall"].n[-1] == there.n
    assert measured.random_neurons["to_generalization"][-1] < measured.steering["to_generalization"].rate[-1]


def test_nmd_in_deviations_does_not_depend_on_the_activations_scale(measured, last):
    _, acts = last
    side, select = acts.site("resid_post"), acts.pairs.of("select")
    both = np.concatenate([side.memorized[select], side.generalized[select]]).astype(np.float64)
    spread = np.sqrt(both.var(0).mean(1))
    assert np.allclose(measured.nmd_mean_in_sd[-1], measured.nmd_mean[-1] / spread)
    assert np.allclose(measured.nmd_max_in_sd[-1], measured.nmd_max[-1] / spread)


def test_an_untrained_model_shows_nothing_and_steering_says_why(measured):
    assert all(series.rate[0] == 0 for series in measured.behavior.values())
    assert all(np.isnan(series.rate[0]) and series.n[0] == 0 for series in measured.steering.values())
    assert measured.why[0] == "only 0 of the last model's test pairs flip at this step; expected at least 8 pairs"
    assert (measured.auroc_low[0] < 0.7).all()
    for i, step in enumerate(measured.steps.tolist()):
        assert (step in measured.why) == bool(np.isnan(measured.steering["to_generalization"].rate[i]))


def test_the_behaviours_separate_during_training_and_stay_apart(measured):
    found = measured.first_separation(0.8)
    assert 0 < found.step <= measured.steps[-1]
    assert found.lasts and found.auroc >= found.auroc_ci95[0] >= 0.8
    assert found.step_by_layer[found.layer] == found.step


def test_it_is_saved_in_the_run_and_read_back(run, measured):
    again = Dynamics.load(run.out)
    assert to_json(with_nulls(again)) == to_json(with_nulls(measured))
    assert json.loads((run.out / "dynamics.json").read_text())["steering"]["to_generalization"]["rate"][0] is None
    assert mg.Dynamics is Dynamics
    assert len(measured.rows()) == len(measured.steps) * 2


def test_a_damaged_file_is_named(tmp_path, measured):
    path = measured.save(tmp_path)
    path.write_text('{"task": 1}')
    with pytest.raises(RunDirectoryError, match=r"dynamics.json: .* content that is not its own"):
        Dynamics.load(path)


def test_measurements_of_an_earlier_version_whose_intervals_took_prompts_for_independent_are_refused(
    tmp_path, measured
):
    path = measured.save(tmp_path)
    value = json.loads(path.read_text())
    for series in value["behavior"].values():
        del series["n_items"]
    path.write_text(json.dumps(value))
    with pytest.raises(RunDirectoryError, match=r"dynamics.json: expected intervals that count items; .*measure again"):
        Dynamics.load(path)


def test_a_directory_gives_the_same_as_the_run_and_steps_can_be_chosen(run, measured):
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    written = (run.out / "dynamics.json").read_text()
    step = int(measured.steps[-1])
    few = mg.dynamics(
        str(run.out), steps=[step, 0], setting=measured.setting, analysis=ANALYSIS, save=False, progress=False
    )
    assert few.steps.tolist() == [0, step]
    assert np.allclose(few.auroc, measured.auroc[[0, -1]]) and np.allclose(few.nmd_max, measured.nmd_max[[0, -1]])
    assert few.steering["to_generalization"].rate[-1] == measured.steering["to_generalization"].rate[-1]
    assert (run.out / "dynamics.json").read_text() == written
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())


def test_step_zero_is_the_model_that_training_began_with(tmp_path):
    task, out = helpers.tiny_task(), tmp_path / "run"
    config = helpers.tiny_training(max_steps=1, warmup_steps=0, learning_rate=1e-12, eval_every=1, checkpoint_every=1)
    run = mg.train(task, config, out=out, progress=False)
    first = mg.models.build_model(config.model, task.tokenizer, n_ctx=run.model.cfg.n_ctx, seed=config.seed)
    begun = state_of(first)
    kept = load_tensors(out / "checkpoints" / "step-000001" / "weights.safetensors")
    assert all(torch.allclose(tensor, begun[name], atol=1e-6) for name, tensor in kept.items())
    with pytest.raises(PairsError, match=r"received 0 \(0 of 10 items flip"):
        mg.dynamics(run, progress=False)
    assert not (out / "dynamics.json").exists()


def test_a_run_without_checkpoints_is_refused(run, tmp_path):
    with pytest.raises(RunDirectoryError, match=r"dynamics\(run\): expected a run with a directory.*out='runs/a'"):
        mg.dynamics(replace(run, out=None))
    with pytest.raises(RunDirectoryError, match=r"settings.json: .*no such file"):
        mg.dynamics(tmp_path)


def test_unknown_steps_and_other_settings_are_refused(run):
    with pytest.raises(SettingsError, match=r"steps that have a checkpoint \(0, 100, .*received 7. Leave steps out"):
        mg.dynamics(run, steps=[0, 7])
    with pytest.raises(SettingsError, match=r"at least one value; received \[\]"):
        mg.dynamics(run, steps=[])
    patch = SteeringSetting("resid_post", 0.1, None, "prompt", "patch")
    with pytest.raises(SettingsError, match=r"a setting in shift mode at site 'resid_post'; received mode 'patch'"):
        mg.dynamics(run, setting=patch)


# --- the first separation, on made-up figures --------------------------------------------------------------------


def made_up(low: list[list[float]], *, prompt_alone: float = 0.6) -> Dynamics:
    lower = np.array(low)
    zeros = np.zeros_like(lower)
    steps = np.arange(len(lower)) * 100
    series = RateSeries(zeros[:, 0], zeros[:, 0], zeros[:, 0], steps, steps)
    names = ("nmd_mean", "nmd_max", "nmd_mean_in_sd", "nmd_max_in_sd", "rho_max", "rho_p95", "share_fdr05")
    return Dynamics(
        task="made up",
        site="resid_post",
        steps=steps,
        n_pairs={"select": 8, "tune": 8, "test": 8},
        behavior=dict.fromkeys(("generalization", "memorization", "rephrased_generalization", "flips"), series),
        **dict.fromkeys(names, zeros),
        auroc=np.minimum(lower + 0.05, 1),
        auroc_low=lower,
        auroc_high=np.minimum(lower + 0.1, 1),
        input_only=ProbeScores(0.5, (0.4, prompt_alone), 0.5, (0.4, 0.6)),
        setting=SteeringSetting("resid_post", 0.1, 2.0, "answer"),
        steering=dict.fromkeys(("to_generalization", "exact_recall", "memorized_form"), series),
        random_neurons=dict.fromkeys(("to_generalization", "memorized_form"), zeros[:, 0]),
        why={},
    )


def test_the_first_separation_is_the_earliest_step_and_there_the_first_layer():
    found = made_up([[0.3, 0.5, 0.5], [0.3, 0.92, 0.95], [0.91, 0.95, 0.95]]).first_separation()
    assert (found.step, found.layer, found.lasts) == (100, 1, True)
    assert found.step_by_layer == (200, 100, 100)
    assert found.auroc_ci95 == pytest.approx((0.92, 1.0)) and found.auroc == pytest.approx(0.97)


def test_a_separation_that_is_lost_again_is_said_not_to_last():
    found = made_up([[0.3], [0.95], [0.5]]).first_separation()
    assert found.step == 100 and not found.lasts


def test_nothing_separates_below_the_threshold_or_what_the_prompt_alone_tells():
    low = [[0.3, 0.7], [0.6, 0.85]]
    assert made_up(low).first_separation(0.9) is None
    assert made_up(low).first_separation(0.8).step == 100
    assert made_up(low, prompt_alone=0.88).first_separation(0.8) is None


@pytest.mark.parametrize("threshold", [0.4, 1.0])
def test_a_threshold_below_chance_or_out_of_reach_is_refused(threshold):
    with pytest.raises(SettingsError, match=r"a threshold in \[0.5, 1\)"):
        made_up([[0.5]]).first_separation(threshold)

"""Held-out predictors: who learns from what, what they expect, and runs that are trained beside them."""

import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import either_kind

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, SettingsError
from memgen_lens.training import held_out, trainer
from memgen_lens.training.batches import Batches
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.forward import Rows
from memgen_lens.training.held_out import HeldOut, flipped, folds_of

TASK = helpers.tiny_task()
CROSS_FIT = mg.CrossFit(steps=6)
MAT = helpers.tiny_training(max_steps=20, eval_every=10, checkpoint_every=10, objective="mat", cross_fit=CROSS_FIT)


def rows_of(seed: int, n: int = 60, length: int = 8) -> Rows:
    """Sequences of two lengths with labels from the fourth position on."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(13, (n, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, :3] = -100
    lengths = torch.full((n,), length + 1)
    lengths[::2] = length
    labels[::2, -1] = -100
    return Rows(tokens[:, :-1], labels, 3, lengths)


def predictors(native: bool = False, **settings) -> HeldOut:
    cross_fit = mg.CrossFit(**{"folds": 3} | settings)
    models = [helpers.hooked_transformer(native=native, seed=seed) for seed in range(cross_fit.folds)]
    for seed, model in enumerate(models):  # else all are alike
        helpers.weights(model).unembed.b_U.data += torch.randn(13, generator=torch.Generator().manual_seed(seed))
    return HeldOut(models, cross_fit, seed=5)


def test_a_fold_follows_from_the_tokens_alone():
    rows = rows_of(0)
    folds = folds_of(rows, 3, seed=1)
    pad = torch.nn.functional.pad  # as in a batch with longer ones
    padded = Rows(pad(rows.tokens, (0, 4), value=7), pad(rows.labels, (0, 4), value=-100), rows.start, rows.lengths)
    assert torch.equal(folds_of(padded, 3, seed=1), folds)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(folds_of(rows.take(order), 3, seed=1), folds[order])
    assert not torch.equal(folds_of(rows, 3, seed=2), folds)


def test_folds_are_about_equal_and_one_token_more_or_less_deals_anew():
    folds = folds_of(rows_of(1, n=3000), 4, seed=0)
    assert (folds.bincount(minlength=4) / 3000 - 0.25).abs().max() < 0.03
    rows = rows_of(2, n=2000)
    other = Rows(rows.tokens.clone(), rows.labels, rows.start, rows.lengths)
    other.tokens[:, 2] = (other.tokens[:, 2] + 1) % 13
    same = (folds_of(rows, 4, seed=0) == folds_of(other, 4, seed=0)).float().mean().item()
    assert abs(same - 0.25) < 0.04


def test_no_predictor_learns_from_its_fold_and_each_row_is_judged_by_that_of_its_own(monkeypatch):
    learned: dict[int, set] = {}
    judged: dict[int, set] = {}
    models: list = []
    original, build = held_out.logits_of, held_out.build_model

    def building(*arguments, **settings):
        models.append(build(*arguments, **settings))
        return models[-1]

    def spy(model, groups):
        (k,) = [k for k, one in enumerate(models) if one is model]
        into = learned if torch.is_grad_enabled() else judged
        for rows in groups:
            into.setdefault(k, set()).update(
                tuple(row[: length - 1].tolist())
                for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)
            )
        return original(model, groups)

    monkeypatch.setattr(held_out, "build_model", building)
    monkeypatch.setattr(held_out, "logits_of", spy)
    mg.train(TASK, MAT.but(max_steps=3), progress=False)
    assert learned.keys() == judged.keys() == {0, 1}
    for k in range(2):
        assert len(learned[k]) > 20 and not learned[k] & judged[k]
    batches = Batches(TASK, MAT)
    memorized = batches._memorized
    folds = folds_of(memorized, 2, seed=MAT.seed).tolist()
    for row, length, fold in zip(memorized.tokens, memorized.lengths.tolist(), folds, strict=True):
        sequence = tuple(row[: length - 1].tolist())
        assert [sequence in learned[k] for k in range(2)] == [k != fold for k in range(2)]


@either_kind
def test_what_is_expected_is_the_calibrated_softmax_of_the_own_predictor_row_by_row(native):
    found = predictors(native, temperature=2.0)
    found.calibration = torch.rand(13, 13, generator=torch.Generator().manual_seed(3)).softmax(1)
    groups = [rows_of(3, n=9), rows_of(4, n=5, length=10)]
    expected = found.expected(groups)
    at = 0
    for rows in groups:
        for i, fold in enumerate(found.folds(rows).tolist()):
            q = (found.models[fold](rows.tokens[i : i + 1])[0, rows.start :] / 2).softmax(-1)
            by_hand = torch.log(q @ found.calibration + 1e-6)
            assert torch.allclose(expected[at : at + len(by_hand)], by_hand, atol=1e-4)
            at += len(by_hand)
    assert at == len(expected)


def test_the_calibration_is_that_of_the_authors():
    """Class by class, as their ``get_shift`` counts it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(40, 4, generator=generator).mul(4).softmax(1)
    q[:, 3] = 0  # never predicted
    labels = torch.randint(3, (40,), generator=generator)
    counts = torch.zeros(4, 4, dtype=torch.float64)
    group = Rows(torch.zeros(40, 1, dtype=torch.int64), labels[:, None], 0, torch.full((40,), 2))
    held_out._count(counts, q, [group])
    shares = held_out._shares(counts)
    for v in range(3):
        joint = np.array([sum(q[i, v].item() for i in range(40) if labels[i] == y) / 40 for y in range(4)])
        assert shares[v].numpy() == pytest.approx(joint / joint.sum(), abs=1e-6)
    assert shares[3].tolist() == [0, 0, 0, 1]


def test_labels_are_flipped_to_what_is_predicted_the_surer_the_more():
    rows = rows_of(5, n=400)
    before, n = rows.labels.clone(), rows.labels[:, 3:].numel()
    behind = before[:, 3:].flatten()
    there = behind != -100
    torch.manual_seed(0)
    for top, rate in ((1.0, 1.0), (0.25, (0.25 - 0.1) * 10 / 9), (0.1, 0.0)):
        q = torch.full((n, 10), (1 - top) / 9)
        q[:, 4] = top
        (changed,) = flipped([rows], q)
        new = changed.labels[:, 3:].flatten()
        assert torch.equal(changed.labels[:, :3], before[:, :3]) and (new[~there] == -100).all()
        moved = there & (behind != 4)
        assert ((new == 4)[moved].float().mean().item() - rate) == pytest.approx(0, abs=0.03)
        assert torch.equal(new[moved & (new != 4)], behind[moved & (new != 4)])
    assert torch.equal(rows.labels, before)


def test_with_predictors_that_expect_nothing_it_is_plain_training_step_by_step(monkeypatch):
    original = trainer.held_out_predictors

    def uniform(*arguments, **settings):
        found = original(*arguments, **settings)
        for model in found.models:
            helpers.weights(model).unembed.W_U.data.zero_()
            helpers.weights(model).unembed.b_U.data.zero_()
        found.calibration = torch.eye(len(found.calibration))
        return found

    monkeypatch.setattr(trainer, "held_out_predictors", uniform)
    every_step = {"max_steps": 6, "eval_every": 1}
    shifted = mg.train(TASK, MAT.but(**every_step), progress=False)
    plain = mg.train(TASK, MAT.but(objective="plain", cross_fit=None, **every_step), progress=False)
    for a, b in zip(shifted.history, plain.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    for a, b in zip(shifted.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    monkeypatch.undo()
    other = mg.train(TASK, MAT.but(**every_step), progress=False)
    assert other.history[-1].loss != pytest.approx(plain.history[-1].loss, rel=1e-2), "else nothing is shifted"


@pytest.fixture(scope="module")
def uncut(tmp_path_factory) -> Path:
    """A memorization-aware run that was never cut; tests must not change it."""
    with helpers.one_thread():
        run = mg.train(TASK, MAT, out=tmp_path_factory.mktemp("uncut") / "run", progress=False)
    assert run.out is not None
    return run.out


@pytest.mark.parametrize("predictors", ["kept", "gone", "damaged"])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path, uncut, predictors, recwarn):
    out = tmp_path / "run"
    shutil.copytree(uncut, out)
    shutil.rmtree(out / "model")
    for folder in list_checkpoints(out / "checkpoints")[1:]:
        shutil.rmtree(folder)
    file = out / "checkpoints" / held_out.FILE
    if predictors == "gone":
        file.unlink()
    if predictors == "damaged":
        held_out.save_tensors({"calibration": torch.eye(3)}, file)
        whole = file.read_bytes()
        file.write_bytes(whole[:-8])
        # What a disk does, not a user: the ledger knows the content.
        from memgen_lens.core import ownership

        ownership._note(file, ownership.fingerprint(file))
        with pytest.warns(UserWarning, match=r"training held-out predictors anew: .*held_out\.safetensors"):
            mg.train(TASK, MAT, out=out, resume=True, progress=False)
    else:
        mg.train(TASK, MAT, out=out, resume=True, progress=False)
    for name in ("model/model.safetensors", f"checkpoints/{held_out.FILE}"):
        assert (out / name).read_bytes() == (uncut / name).read_bytes()


def test_predictors_of_a_run_without_checkpoints_are_made_anew(tmp_path, uncut):
    """They may be of other settings, which are compared only where a run has begun."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    held_out.save_tensors({"calibration": torch.eye(3)}, out / "checkpoints" / held_out.FILE)
    mg.train(TASK, MAT, out=out, resume=True, progress=False)
    assert (out / "model/model.safetensors").read_bytes() == (uncut / "model/model.safetensors").read_bytes()


def test_all_rows_of_a_batch_in_one_fold_leave_that_predictor_as_it_is():
    found = predictors()
    rows = rows_of(6)
    one = rows.take((found.folds(rows) == 1).nonzero()[:, 0])
    learner = held_out._Predictor(found, 1, bf16=False)
    loss = learner.loss([one])
    loss.backward()
    assert loss.item() == 0 and all((p.grad is None) or (p.grad == 0).all() for p in learner.parameters)
    assert held_out._Predictor(found, 0, bf16=False).loss([one]).item() > 0


def test_predictors_that_diverge_are_refused():
    with pytest.raises(ModelError, match=r"train: expected a finite loss; received nan at or before step 6"):
        mg.train(TASK, MAT.but(learning_rate=1e30, warmup_steps=0), progress=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "plain"}, r"TrainConfig\(cross_fit=\.\.\.\): expected objective='mat' beside it"),
        ({"plant": mg.Plant.distributed()}, r"TrainConfig\(objective='mat'\): expected no plant"),
        ({"objective": "aware"}, r"TrainConfig\.objective: expected 'plain' or 'mat'; received 'aware'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(SettingsError, match=says):
        MAT.but(**settings)


def test_a_plant_beside_it_is_refused_by_train_too_and_tuning_has_no_such_setting():
    with pytest.raises(SettingsError, match="expected no plant"):
        mg.train(TASK, MAT, plant=mg.Plant.distributed(), progress=False)
    with pytest.raises(SettingsError, match="expected a known setting; received objective='mat'"):
        mg.FinetuneConfig(objective="mat")

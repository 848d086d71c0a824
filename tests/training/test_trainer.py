"""Training: what it writes, when it stops, what it refuses."""

import json
import threading

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError, SettingsError
from memgen_lens.training import loop, trainer
from memgen_lens.training.trainer import train

TASK = helpers.tiny_task()


def run(**arguments):
    """A run of a few milliseconds a step, without its bar."""
    settings = {name: arguments.pop(name) for name in list(arguments) if name in mg.TrainConfig.model_fields}
    task = arguments.pop("task", TASK)
    return train(task, helpers.tiny_training(**settings), **{"progress": False} | arguments)


def same_weights(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 40 steps in a directory; tests must not change it."""
    with helpers.one_thread():
        return run(max_steps=40, out=tmp_path_factory.mktemp("finished") / "run")


def test_the_history_file_has_one_line_a_measurement(finished):
    lines = [json.loads(line) for line in (finished.out / "history.jsonl").read_text().splitlines()]
    assert lines == [row.__dict__ for row in finished.history]
    assert [row["step"] for row in lines] == [20, 40]
    assert set(lines[0]) == {
        "step",
        "tokens",
        "loss",
        "generalization",
        "memorization",
        "rephrased_generalization",
        "seconds",
    }
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"]


def test_the_history_counts_every_token_of_every_sequence_once(finished):
    # A sum is 4 + 2 tokens and its end; a string 4 + 4 and its end. 32 sequences a step, 10 of them memorized.
    assert [row.tokens for row in finished.history] == [20 * (22 * 7 + 10 * 9), 40 * (22 * 7 + 10 * 9)]


def test_the_last_line_of_the_history_is_what_the_model_does(finished):
    observed = {
        split: [outcome.behavior for outcome in mg.observe(finished.model, TASK, split=split)]
        for split in ("validation", "memorized", "rephrased")
    }
    row = finished.history[-1]
    assert row.generalization == observed["validation"].count(mg.Behavior.GENERALIZATION) / 6
    assert row.memorization == observed["memorized"].count(mg.Behavior.MEMORIZATION) / 10
    assert row.rephrased_generalization == observed["rephrased"].count(mg.Behavior.GENERALIZATION) / 10


def test_the_loss_in_the_history_is_the_mean_over_the_steps_since_the_line_before(monkeypatch):
    seen = []

    def spy(logits, groups, original=trainer.labelled_loss):
        seen.append(original(logits, groups))
        return seen[-1]

    monkeypatch.setattr(trainer, "labelled_loss", spy)
    history = run(max_steps=50).history
    assert [row.step for row in history] == [20, 40, 50]
    for row, steps in zip(history, (seen[:20], seen[20:40], seen[40:]), strict=True):
        assert row.loss == pytest.approx(sum(step.item() for step in steps) / len(steps), rel=1e-6)


def test_the_learning_rate_warms_up_and_decays_to_zero_over_all_steps(monkeypatch):
    rates = []

    def spy(forward, optimizer, *rest, original=loop.take_step):
        loss = original(forward, optimizer, *rest)
        rates.append(optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(loop, "take_step", spy)
    run(max_steps=20, warmup_steps=4, learning_rate=0.01, eval_every=20)
    expected = [0.01 * min(1, (step + 1) / 4) * (1 - step / 20) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_the_first_step_is_that_of_torch_and_transformer_lens_alone():
    config = helpers.tiny_training(
        max_steps=1, precision="float32", learning_rate=0.01, warmup_steps=0, loss="sequence"
    )
    found = train(TASK, config, progress=False).model
    model = trainer.build_model(config.model, TASK.tokenizer, n_ctx=found.cfg.n_ctx, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for rows in next(trainer.Batches(TASK, config).from_step(0, 1)):
        log_probs = model(rows.tokens).log_softmax(-1)
        chosen = log_probs.gather(-1, rows.labels.clamp(min=0)[:, :, None])[:, :, 0]
        losses.append(-chosen[rows.labels != -100])
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    # Adam divides by the gradient's own size, so that a rounding error near 0 may show: compare the bulk tightly.
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(found.parameters(), model.parameters(), strict=True)])
    assert float((moved > 1e-6).float().mean()) < 0.01


def test_the_run_directory_holds_what_the_design_says(finished):
    names = {path.name for path in finished.out.iterdir()} - {".memgen_lens.jsonl"}
    assert names == {"history.jsonl", "checkpoints", "model"}
    assert sorted(path.name for path in (finished.out / "checkpoints").iterdir()) == [
        ".memgen_lens.jsonl",
        "settings.json",
        *(f"step-{step:06d}" for step in (10, 20, 30, 40)),
    ]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (finished.out / "model").iterdir()
    }
    assert not list(finished.out.rglob(".*.part"))


def test_the_saved_model_is_the_trained_one(finished):
    assert same_weights(mg.load_model(finished.out / "model"), finished.model)
    assert not finished.model.training
    assert finished.model.cfg.n_ctx >= TASK.max_prompt_tokens + TASK.max_answer_tokens


def test_a_run_is_the_same_with_and_without_a_directory(finished):
    in_memory = run(max_steps=40)
    assert in_memory.out is None
    assert same_weights(in_memory.model, finished.model)
    assert [(row.step, row.tokens, row.loss) for row in in_memory.history] == [
        (row.step, row.tokens, row.loss) for row in finished.history
    ]


@pytest.mark.parametrize("loss", ["answer", "sequence"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(loss):
    first, again, other = (run(max_steps=10, loss=loss, seed=seed).model for seed in (1, 1, 2))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_training_leaves_the_callers_random_state_alone():
    # Not Python's: the tests' run-time type checks draw from it to look into lists.
    def draw():
        return torch.rand(2).tolist(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(7), np.random.seed(7)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    run(max_steps=3)
    assert draw() == expected


def test_the_callers_random_state_does_not_touch_the_training():
    torch.manual_seed(1)
    first = run(max_steps=5).model
    torch.manual_seed(2)
    assert same_weights(first, run(max_steps=5).model)


def test_training_stops_at_the_first_measurement_at_which_both_targets_are_reached():
    stopped = run(target_generalization=0.0, target_memorization=0.0)
    assert stopped.stop_reason == "both targets reached at step 20"
    assert [row.step for row in stopped.history] == [20]


@pytest.mark.parametrize("target", ["target_generalization", "target_memorization"])
def test_one_target_alone_does_not_stop_training(target):
    others = {"target_generalization": 0.0, "target_memorization": 0.0} | {target: 1.0}
    ended = run(max_steps=30, learning_rate=1e-9, **others)
    assert ended.stop_reason == "no steps left after 30"
    assert [row.step for row in ended.history] == [20, 30]


def test_stopping_early_does_not_wait_for_the_batches_of_the_steps_left():
    chunks = []

    class Watched(mg.tasks.Addition):
        def draw_generic(self, n, rng):
            chunks.append(n)
            return super().draw_generic(n, rng)

    task = Watched(**TASK.model_dump())
    run(task=task, max_steps=3000, eval_every=2, target_generalization=0.0, target_memorization=0.0)
    assert len(chunks) < 10


def test_the_trained_model_both_recalls_and_computes(trained):
    """The session's model: what all of this is for."""
    row = trained.history[-1]
    assert row.memorization >= 0.95
    assert row.generalization >= 0.9
    assert trained.stop_reason == f"both targets reached at step {row.step}"


def test_nothing_is_printed_without_the_bar(tmp_path, capfd):
    run(max_steps=5, out=tmp_path)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_bar_shows_both_behaviours(capfd):
    run(max_steps=20, progress=True)
    captured = capfd.readouterr()
    assert "train addition: 100%" in captured.err
    assert "recalls=" in captured.err
    assert "computes=" in captured.err
    assert captured.out == ""


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_is(finished):
    before = tree(finished.out)
    message = (
        r"expected a directory without a run; received one that holds .*Choose another, or resume=True .*force=True"
    )
    with pytest.raises(RunDirectoryError, match=message):
        run(max_steps=40, out=finished.out)
    assert tree(finished.out) == before


def test_force_trains_anew_and_keeps_nothing_of_the_former_run(tmp_path):
    run(max_steps=40, out=tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("the user's own")
    forced = run(max_steps=15, seed=5, out=tmp_path / "a", force=True)
    run(max_steps=15, seed=5, out=tmp_path / "b")
    assert (tmp_path / "a" / "notes.txt").read_text() == "the user's own"
    found, expected = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert set(found) - {"notes.txt"} == set(expected)
    assert found["model/model.safetensors"] == expected["model/model.safetensors"]
    assert [row.step for row in forced.history] == [15]


def test_bad_input_leaves_the_former_run_whole_even_with_force(tmp_path):
    run(max_steps=5, out=tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(ModelError, match="received 'tpu9'"):
        run(max_steps=5, out=tmp_path / "run", force=True, device="tpu9")
    assert tree(tmp_path / "run") == before


def test_bad_input_begins_no_run(tmp_path):
    with pytest.raises(ModelError, match=r"train: expected a device of this machine \(cpu.*\); received 'tpu9'"):
        run(out=tmp_path / "run", device="tpu9")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "learn", lambda *a, **k: pytest.fail("it trained"))
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            RunDirectoryError, match=r"expected a (place that can be written|directory, or .*); received .*--out"
        ):
            run(out=out)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_fills_up_while_training_is_an_error_of_ours(tmp_path):
    with (
        helpers.no_file_beyond(20_000),
        pytest.raises(RunDirectoryError, match="a place that can be written; received"),
    ):
        run(max_steps=15, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_resuming_nowhere_is_refused():
    with pytest.raises(SettingsError, match=r"train: expected out= with resume=True; received no directory"):
        run(resume=True)


def poisoned(monkeypatch, at_step: int, poison) -> None:
    """Let the loss of one step (counted from 1) pass through ``poison``."""
    steps = []

    def loss(logits, groups, original=trainer.labelled_loss):
        steps.append(None)
        value = original(logits, groups)
        return poison(value, logits) if len(steps) == at_step else value

    monkeypatch.setattr(trainer, "labelled_loss", loss)


def assert_whole(out) -> None:
    """Nothing half-written, and every number in the directory finite."""
    assert not list(out.rglob(".*.part"))
    assert not (out / "model").exists()
    for line in (out / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the history"))
    for path in out.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            # TransformerLens keeps the minus infinity of its attention mask as a buffer.
            assert name.endswith(".IGNORE") or bool(torch.isfinite(tensor.float()).all()), (
                f"{path}: {name} is not finite"
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_step", [13, 20, 25, 60])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_way_out_and_nothing_half_written(
    tmp_path, monkeypatch, at_step, value
):
    poisoned(monkeypatch, at_step, lambda loss, logits: loss * value)
    message = (
        r"train: expected a finite loss; received (nan|inf) at or before step \d+. "
        r"Lower learning_rate \(now 0.002\).*resume=True goes on from the last checkpoint"
    )
    with pytest.raises(ModelError, match=message):
        run(out=tmp_path / "run", learning_rate=2e-3)
    assert_whole(tmp_path / "run")


def test_a_run_whose_loss_blew_up_can_be_resumed_from_a_sound_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, 25, lambda loss, logits: loss * float("nan"))
        with pytest.raises(ModelError, match="resume=True"):
            run(max_steps=40, out=tmp_path / "run")
    resumed = run(max_steps=40, out=tmp_path / "run", resume=True)
    assert same_weights(resumed.model, run(max_steps=40).model)


@pytest.mark.parametrize("at_step", [10, 13, 60])
def test_a_gradient_that_is_not_finite_while_the_loss_is_never_reaches_a_checkpoint_or_the_model(
    tmp_path, monkeypatch, at_step
):
    # d/dx sqrt(x) at 0 is infinite: the loss is finite, its gradient NaN, and the weights are spoilt by the step.
    poisoned(monkeypatch, at_step, lambda loss, logits: loss + (logits * 0).sum().sqrt())
    with pytest.raises(ModelError, match="expected a finite"):
        run(out=tmp_path / "run")
    assert_whole(tmp_path / "run")


def test_a_learning_rate_far_too_large_ends_in_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelError, match=r"Lower learning_rate \(now 1e\+30\)"):
        run(out=tmp_path / "run", learning_rate=1e30)
    assert_whole(tmp_path / "run")


def test_no_thread_is_left_behind_an_error_even_while_its_traceback_is_kept(monkeypatch):
    poisoned(monkeypatch, 5, lambda loss, logits: loss * float("nan"))
    with pytest.raises(ModelError) as caught:
        run(max_steps=2000, eval_every=5)
    assert caught.tb is not None
    assert [thread for thread in threading.enumerate() if thread.name == "memgen-lens-batches"] == []


def test_a_notebook_that_switched_gradients_off_trains_the_same_model():
    def trained():
        run = mg.train(helpers.tiny_task(), helpers.tiny_training(max_steps=3), progress=False)
        return [parameter.detach() for parameter in run.model.parameters()]

    expected = trained()
    torch.set_grad_enabled(False)
    try:
        found = trained()
        assert not torch.is_grad_enabled()  # left as the user set it
    finally:
        torch.set_grad_enabled(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        mg.train(helpers.tiny_task(), helpers.tiny_training(), progress=False)

"""Checkpoints bring back weights, optimizer and random state, or are passed over."""

import warnings
from functools import partial

import helpers
import pytest
import torch
from safetensors.torch import load_file

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.models.native import set_state, state_of
from memgen_lens.models.tensors import save_tensors
from memgen_lens.training.checkpoints import list_checkpoints, load_newest, save_checkpoint


def model_and_optimizer(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), fused=True)


def step(model, optimizer) -> None:
    """One optimizer step on random data of the global generator."""
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, after 3 and 5 steps: (folder, model, optimizer)."""
    model, optimizer = model_and_optimizer()
    for done in range(1, 6):
        step(model, optimizer)
        if done in (3, 5):
            save_checkpoint(tmp_path, done, model.state_dict(), optimizer, {"tokens": done * 100, "stop_reason": None})
    return tmp_path, model, optimizer


def restore(folder, **options):
    model, optimizer = model_and_optimizer(seed=99)
    return load_newest(folder, model.load_state_dict, optimizer, device="cpu", **options), model, optimizer


def test_weights_optimizer_and_random_state_come_back_so_that_the_next_steps_are_the_same(run):
    folder, model, optimizer = run
    for _ in range(3):
        step(model, optimizer)
    state, again, its_optimizer = restore(folder)
    assert state == {"tokens": 500, "stop_reason": None, "step": 5}
    for _ in range(3):
        step(again, its_optimizer)
    for expected, found in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, found)
        for slot, value in optimizer.state[expected].items():
            assert torch.equal(its_optimizer.state[found][slot], value)


def test_a_checkpoint_is_a_folder_of_three_files_without_pickle(run):
    folder, model, _ = run
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003", "step-000005"]
    newest = folder / "step-000005"
    assert sorted(path.name for path in newest.glob("[!.]*")) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    for name, value in load_file(newest / "weights.safetensors").items():
        assert torch.equal(value, model.state_dict()[name])


def test_checkpoints_are_listed_by_step_also_beyond_six_digits(tmp_path):
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    steps = (999_999, 5, 1_000_000, 2_000_000)
    for done in steps:
        save_checkpoint(tmp_path, done, model.state_dict(), optimizer, {})
    assert [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)] == sorted(steps)


def test_nothing_is_listed_or_restored_where_there_is_no_checkpoint(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert restore(tmp_path / "nowhere")[0] is None
    (tmp_path / "settings.json").write_text("{}")
    assert restore(tmp_path)[0] is None


def test_a_half_written_checkpoint_is_not_listed_and_gone_after_the_next_one(run):
    folder, model, optimizer = run
    half = folder / ".step-000009.part"
    save_tensors({"x": torch.ones(2)}, half / "weights.safetensors")
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003", "step-000005"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(folder)[0]["step"] == 5
    save_checkpoint(folder, 9, model.state_dict(), optimizer, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000005", "step-000009"]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "garbage"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, name, damage):
    folder, *_ = run
    path = folder / "step-000005" / name
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x00\xff" * 50}[damage])
    with pytest.warns(UserWarning, match=f"passing over a damaged checkpoint: reading .*step-000005/{name}"):
        state, model, _ = restore(folder)
    assert state["step"] == 3
    for key, value in load_file(folder / "step-000003" / "weights.safetensors").items():
        assert torch.equal(model.state_dict()[key], value)


def test_where_all_checkpoints_are_damaged_nothing_is_restored(run):
    folder, *_ = run
    for path in folder.glob("step-*/weights.safetensors"):
        path.write_bytes(b"")
    before = [p.clone() for p in model_and_optimizer(seed=99)[0].parameters()]
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint") as seen:
        state, model, optimizer = restore(folder)
    assert len(seen) == 2
    assert state is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    folder, model, optimizer = run
    step(model, optimizer)
    save_checkpoint(folder, 5, model.state_dict(), optimizer, {"tokens": 7})
    state, again, _ = restore(folder)
    assert state == {"tokens": 7, "step": 5}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_older_ones_whole(run):
    folder, model, optimizer = run
    with helpers.no_file_beyond(300), pytest.raises(RunDirectoryError, match="expected a place that can be written"):
        save_checkpoint(folder, 7, model.state_dict(), optimizer, {})
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003", "step-000005"]
    assert restore(folder)[0]["step"] == 5
    (folder / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"writing .*step-000001: expected a place that can be written"):
        save_checkpoint(folder / "file", 1, model.state_dict(), optimizer, {})


@helpers.hooked_only
@pytest.mark.parametrize("gated_mlp", [False, True])
def test_a_checkpoint_of_the_other_version_of_transformer_lens_is_refused_and_nothing_is_changed(tmp_path, gated_mlp):
    models = [helpers.hooked_transformer(native=native, gated_mlp=gated_mlp) for native in (False, True)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    tokens = torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(0))
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path / str(i), 1, state_of(model), optimizer, {})
        assert load_newest(tmp_path / str(i), partial(set_state, model), optimizer, device="cpu") == {"step": 1}
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(RunDirectoryError, match="Resume with the version that the run was begun with"):
            load_newest(tmp_path / str(1 - i), partial(set_state, model), optimizer, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

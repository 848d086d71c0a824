"""Tuning pretrained models: what is learned, what stays as it was, what is written and resumed."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import bridges
import helpers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuning import IDS, TASK, assert_same, base, logits, settings

import memgen_lens as mg
from memgen_lens.models.plain import plain_model, weights_hash
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.steps import models_at

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own


@pytest.fixture(scope="module")
def llama_on_disk(tmp_path_factory):
    """A tiny random Llama with its tokenizer in a Hugging Face directory."""
    return mg.save_model(base(), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_on_disk):
    """A run of 30 steps from a directory into a directory; tests must not change it."""
    with helpers.one_thread():
        return mg.finetune(llama_on_disk, TASK, settings(), out=tmp_path_factory.mktemp("runs") / "run", progress=False)


def test_a_run_directory_holds_adapter_merged_model_and_the_bases_name_and_hash(finished, llama_on_disk):
    names = {path.name for path in finished.out.iterdir()} - {".memgen_lens.jsonl"}
    assert names == {"history.jsonl", "checkpoints", "adapter", "model"}
    written = json.loads((finished.out / "checkpoints" / "settings.json").read_text())
    origin = weights_hash(plain_model(mg.load_model(llama_on_disk), call="test").state_dict())
    assert written["base"] == {"name": str(llama_on_disk), "sha256": origin} == finished.base
    assert written["train"] == settings().model_dump(mode="json")
    assert [row.step for row in finished.history] == [10, 20, 30]
    assert finished.stop_reason == "no steps left after 30"
    assert finished.history[-1].loss < finished.history[0].loss
    adapter = json.loads((finished.out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(llama_on_disk) and adapter["r"] == 4


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_the_model_that_was_given_stays_what_it_was(kind):
    hf = bridges.hugging_face(kind)
    lens = mg.load_model(hf, tokenizer=bridges.character_tokenizer())
    said, weights = logits(lens), {name: value.clone() for name, value in hf.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in hf.named_parameters()}
    for method in ("lora", "full"):
        run = mg.finetune(lens, TASK, settings(max_steps=5, method=method), progress=False)
        assert (logits(run.model) - said).abs().max() > 0
        assert not run.model.training and run.out is None
    assert all(torch.equal(weights[name], value) for name, value in hf.state_dict().items())
    assert wanted == {name: p.requires_grad for name, p in hf.named_parameters()}
    assert torch.equal(logits(lens), said)
    assert set(hf.state_dict()) == set(weights), "no adapter is left in it"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_measured_behaviours_are_those_of_greedy_completions(method):
    task = helpers.Letters(n_digits=1, n_memorized=4, memory_length=2, n_heldout=6, n_validation=6)
    run = mg.finetune(
        base(),
        task,
        settings(max_steps=120, eval_every=120, memorized_share=0.8, method=method),
        progress=False,
    )
    observed = {
        split: [outcome.behavior for outcome in mg.observe(run.model, task, split=split, progress=False)]
        for split in ("validation", "memorized", "rephrased")
    }
    row = run.history[-1]
    assert row.memorization == observed["memorized"].count(mg.Behavior.MEMORIZATION) / 4
    assert row.memorization > 0, "else the test says nothing"
    assert row.generalization == observed["validation"].count(mg.Behavior.GENERALIZATION) / 6
    assert row.rephrased_generalization == observed["rephrased"].count(mg.Behavior.GENERALIZATION) / 4


def test_one_seed_gives_one_run_and_another_seed_another():
    runs = [
        mg.finetune(base(), TASK, settings(max_steps=6, dropout=0.1, seed=seed), progress=False) for seed in (0, 0, 1)
    ]
    said = [logits(run.model) for run in runs]
    assert torch.equal(said[0], said[1]) and not torch.equal(said[0], said[2])


SCRIPT = """
    # Told to go on until it is killed.
    import json, sys, time
    sys.path.insert(0, sys.argv[3])
    import tuning as here, memgen_lens as mg, torch
    from memgen_lens.training import loop

    torch.set_num_threads(1)
    step = loop.take_step

    def slow_step(*arguments):
        time.sleep(0.05)  # so that it can be killed in the middle
        return step(*arguments)

    loop.take_step = slow_step
    how = json.loads(sys.argv[4])
    mg.finetune(sys.argv[2], here.TASK, here.settings(**how), out=sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("how", [{"dropout": 0.1}, {"method": "full"}], ids=["lora", "full"])
def test_a_run_that_was_killed_goes_on_to_the_very_same_weights(how, tmp_path, llama_on_disk):
    out, config = tmp_path / "killed", settings(**how)
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        str(out),
        str(llama_on_disk),
        str(Path(__file__).parent.parent),
        json.dumps(how),
    ]
    process = subprocess.Popen(script)
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "step-000015").exists():
        assert time.monotonic() < deadline and process.poll() is None, "it never came so far"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model").exists()
    with helpers.one_thread():
        resumed = mg.finetune(llama_on_disk, TASK, config, out=out, resume=True, progress=False)
        uncut = mg.finetune(llama_on_disk, TASK, config, out=tmp_path / "uncut", progress=False)
    learned = "model/model.safetensors" if "method" in how else "adapter/adapter_model.safetensors"
    one, other = (load_file(run.out / learned) for run in (resumed, uncut))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    numbers = [[{**row.__dict__, "seconds": 0} for row in run.history] for run in (resumed, uncut)]
    assert numbers[0] == numbers[1]


def test_dynamics_of_a_tuned_run_begin_with_the_pretrained_model(finished, llama_on_disk):
    written = json.loads((finished.out / "checkpoints" / "settings.json").read_text())
    steps = {0: None} | {int(f.name[5:]): f for f in list_checkpoints(finished.out / "checkpoints")}
    models = list(models_at([steps[step] for step in (0, 15, 30)], None, TASK, written, device="cpu"))
    assert_same(logits(models[0]), logits(mg.load_model(llama_on_disk)))
    assert_same(logits(models[2]), logits(finished.model))
    assert not np.allclose(logits(models[1]), logits(models[2]))


def test_checkpoints_of_another_device_are_loaded_where_one_asks_for_them(finished):
    written = json.loads((finished.out / "checkpoints" / "settings.json").read_text())
    written["train"]["device"] = "cuda"  # where there may be none now
    folder = list_checkpoints(finished.out / "checkpoints")[-1]
    (model,) = models_at([folder], None, TASK, written, device="cpu")
    assert_same(logits(model), logits(finished.model))


def test_tuning_stops_at_the_first_measurement_that_reaches_both_targets_and_not_at_one_that_reaches_one(tmp_path):
    task = helpers.Letters(n_digits=1, n_memorized=2, memory_length=2, n_heldout=6, n_validation=6)
    how = {"max_steps": 150, "memorized_share": 0.8, "generic_steps": 0, "eval_every": 15, "checkpoint_every": 1000}
    config = settings(**how, target_generalization=0.0)
    run = mg.finetune(base(), task, config, out=tmp_path / "run", progress=False)
    *before, last = run.history
    assert before and all(row.memorization < 1.0 for row in before), "of which each reaches the other target"
    assert last.memorization == 1.0 and last.step < 150
    assert run.stop_reason == f"both targets reached at step {last.step}"
    assert [folder.name for folder in list_checkpoints(run.out / "checkpoints")] == [f"step-{last.step:06}"]
    weights = logits(run.model)
    assert_same(logits(mg.load_model(run.out / "model")), weights)


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_the_merged_model_says_what_its_adapter_says_on_every_kind_of_base(kind, tmp_path):
    hf, tokenizer = bridges.hugging_face(kind), bridges.character_tokenizer()
    hf.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = mg.finetune(tmp_path / "base", TASK, settings(max_steps=12), out=tmp_path / "run", progress=False)
    said = logits(run.model)
    assert_same(logits(mg.load_model(run.out / "model")), said)
    assert_same(logits(mg.load_model(run.out / "adapter")), said)
    assert_same(logits(AutoModelForCausalLM.from_pretrained(run.out / "model").eval()), said)
    on_base = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run.out / "adapter")
    ).eval()
    with torch.no_grad():  # two products a layer in place of one: other rounding
        assert_same(on_base(input_ids=IDS).logits, said, tolerance=1e-3)
    assert (logits(mg.load_model(tmp_path / "base")) - said).abs().max() > 0.1

"""What a tuned run says of its base, and what stays where something does not come out."""

import json
import shutil

import bridges
import pytest
import torch
from transformers import AutoModelForCausalLM
from tuning import TASK, assert_same, base, logits, settings

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError
from memgen_lens.models import adapters
from memgen_lens.models.plain import plain_model, weights_hash
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.steps import models_at

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own


def settings_of(run) -> dict:
    return json.loads((run.out / "checkpoints" / "settings.json").read_text())


def test_an_adapter_that_does_not_merge_is_kept_and_the_run_goes_on_from_there(tmp_path, monkeypatch):
    out, config = tmp_path / "run", settings(max_steps=10)
    with monkeypatch.context() as refused:
        refused.setattr(adapters, "MERGE_TOLERANCE", -1.0)
        with pytest.raises(ModelError, match="merged model whose logits are the adapter's"):
            mg.finetune(base(), TASK, config, out=out, progress=False)
    assert (out / "adapter" / "adapter_model.safetensors").exists() and not (out / "model").exists()
    resumed = mg.finetune(base(), TASK, config, out=out, resume=True, progress=False)
    assert_same(logits(resumed.model), logits(mg.finetune(base(), TASK, config, progress=False).model))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_tuned_from_a_bfloat16_base_is_its_float32_copy(method, tmp_path):
    hf = bridges.hugging_face("llama").bfloat16()
    hf.save_pretrained(tmp_path / "base")
    bridges.character_tokenizer().save_pretrained(tmp_path / "base")
    given = mg.load_model(tmp_path / "base", dtype="bfloat16")
    config = settings(method=method, max_steps=10)
    run = mg.finetune(given, TASK, config, out=tmp_path / "run", progress=False)
    assert {weight.dtype for weight in given.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    from_path = mg.finetune(tmp_path / "base", TASK, config, progress=False)
    assert_same(logits(run.model), logits(from_path.model))
    assert run.base == from_path.base == {"name": str(tmp_path / "base"), "sha256": run.base["sha256"]}
    written = AutoModelForCausalLM.from_pretrained(run.out / "model")
    assert written.dtype == torch.float32
    untuned, last = models_at(
        [None, list_checkpoints(run.out / "checkpoints")[-1]], None, TASK, settings_of(run), device="cpu"
    )
    assert_same(logits(untuned), logits(mg.load_model(tmp_path / "base")))
    assert_same(logits(last), logits(run.model))


def test_a_base_is_named_by_its_whole_path_and_known_by_its_weights_where_it_was_moved(tmp_path, monkeypatch):
    folder = mg.save_model(base(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = mg.finetune("base", TASK, settings(max_steps=10), out="run", progress=False)
    assert run.base["name"] == str(folder)
    monkeypatch.chdir("/")
    assert_same(logits(mg.load_model(tmp_path / "run" / "adapter")), logits(run.model))

    shutil.move(folder, tmp_path / "moved")
    how = {"out": tmp_path / "run", "resume": True, "progress": False}
    again = mg.finetune(tmp_path / "moved", TASK, settings(max_steps=10), **how)
    assert again.base == {"name": str(tmp_path / "moved"), "sha256": run.base["sha256"]}
    assert settings_of(again)["base"] == again.base
    assert_same(logits(mg.load_model(tmp_path / "run" / "adapter")), logits(run.model))
    with pytest.raises(RunDirectoryError, match=r"received others: base\."):
        mg.finetune(base("gpt2"), TASK, settings(max_steps=10), **how)


def test_a_base_that_is_there_no_more_is_one_error_whatever_its_place_holds_now(tmp_path):
    folder = mg.save_model(base(), tmp_path / "base")
    run = mg.finetune(folder, TASK, settings(max_steps=5), out=tmp_path / "run", progress=False)
    assert run.base["sha256"] == weights_hash(plain_model(base(), call="test").state_dict())
    for path in folder.iterdir():  # an empty folder is taken for a run directory of ours, whose files are missing
        path.unlink()
    with pytest.raises(RunDirectoryError, match="the model that the run was begun from, where its settings say"):
        list(models_at([None], None, TASK, settings_of(run), device="cpu"))

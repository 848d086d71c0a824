"""Finding, predicting and steering the two behaviours, on any HookedTransformer and any prompt pairs.

Does not train and does not draw.
"""

from memgen_lens.analysis.attribution.attribute import attribute
from memgen_lens.analysis.attribution.streaming import attribute_streaming
from memgen_lens.analysis.attribution.where import patching_map
from memgen_lens.analysis.probing.positions import probe_by_position
from memgen_lens.analysis.probing.probes import fit_probes
from memgen_lens.analysis.recitation.pairs import collect_recitation_pairs
from memgen_lens.analysis.recitation.recitation import recitation
from memgen_lens.analysis.recitation.steered import recitation_under_steering
from memgen_lens.analysis.recording.activations import load_activations, record
from memgen_lens.analysis.recording.pairs import collect_pairs
from memgen_lens.analysis.steering.cost import steering_cost
from memgen_lens.analysis.steering.evaluation import evaluate_steering
from memgen_lens.analysis.steering.guard import Guard
from memgen_lens.analysis.steering.guarded import evaluate_guard
from memgen_lens.analysis.steering.mode_content import mode_and_content
from memgen_lens.analysis.steering.optimized import optimize_direction
from memgen_lens.analysis.steering.positions import steering_by_position
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.analysis.steering.sweep import choose_setting, sweep_steering
from memgen_lens.analysis.steering.tune import tune_steering

__all__ = [
    "Guard",
    "Steering",
    "attribute",
    "attribute_streaming",
    "choose_setting",
    "collect_pairs",
    "collect_recitation_pairs",
    "evaluate_guard",
    "evaluate_steering",
    "fit_probes",
    "load_activations",
    "mode_and_content",
    "optimize_direction",
    "patching_map",
    "probe_by_position",
    "recitation",
    "recitation_under_steering",
    "record",
    "steering_by_position",
    "steering_cost",
    "sweep_steering",
    "tune_steering",
]

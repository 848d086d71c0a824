"""Finding, predicting and steering the two behaviours, on any HookedTransformer and any prompt pairs.

Does not train and does not draw.
"""

from memgen_lens.analysis.activations import load_activations, record
from memgen_lens.analysis.attribution import attribute, attribute_streaming
from memgen_lens.analysis.evaluation import evaluate_steering
from memgen_lens.analysis.pairs import collect_pairs
from memgen_lens.analysis.probes import fit_probes
from memgen_lens.analysis.steering import Steering
from memgen_lens.analysis.sweep import choose_setting, sweep_steering

__all__ = [
    "Steering",
    "attribute",
    "attribute_streaming",
    "choose_setting",
    "collect_pairs",
    "evaluate_steering",
    "fit_probes",
    "load_activations",
    "record",
    "sweep_steering",
]

"""Finding, predicting and steering the two behaviours, on any HookedTransformer and any prompt pairs.

Does not train and does not draw.
"""

from memgen_lens.analysis.activations import record
from memgen_lens.analysis.attribution import attribute
from memgen_lens.analysis.evaluation import evaluate_steering
from memgen_lens.analysis.pairs import collect_pairs
from memgen_lens.analysis.probes import fit_probes
from memgen_lens.analysis.steering import Steering
from memgen_lens.analysis.sweep import choose_setting, sweep_steering

__all__ = [
    "Steering",
    "attribute",
    "choose_setting",
    "collect_pairs",
    "evaluate_steering",
    "fit_probes",
    "record",
    "sweep_steering",
]

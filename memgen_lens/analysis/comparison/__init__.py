"""Are the neurons found the same on other pairs, in other trainings or tunings, on other tasks?

After the intra-task (between seeds) and inter-task consistency of arXiv 2412.18497 v2, as far as its summary tells;
chance levels, nulls, intervals and the transfer of probes and steering are ours. Public as `memgen_lens.consistency`.
Does not train.
"""

from memgen_lens.analysis.comparison.adapters import across_adapters
from memgen_lens.analysis.comparison.halves import split_half
from memgen_lens.analysis.comparison.seeds import across_seeds
from memgen_lens.analysis.comparison.tasks import across_tasks, task_names

__all__ = ["across_adapters", "across_seeds", "across_tasks", "split_half", "task_names"]

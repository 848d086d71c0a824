"""Designed datasets on which the recalled and the computed answer differ: one task a file, text in, text out.

Does not know models: a task makes prompts and judges outputs.
"""

from memgen_lens.tasks.addition import Addition
from memgen_lens.tasks.task import AnyTask, Task

__all__ = ["Addition", "AnyTask", "Task"]

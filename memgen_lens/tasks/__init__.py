"""Designed datasets on which the recalled and the computed answer differ: one task a file, text in, text out.

Does not know models: a task makes prompts and judges outputs.
"""

from memgen_lens.core.items import Item, TrainingText
from memgen_lens.tasks.addition import Addition
from memgen_lens.tasks.check import CheckReport, check
from memgen_lens.tasks.check_tokens import require_distinct_beginnings
from memgen_lens.tasks.ciphertext import Ciphertext
from memgen_lens.tasks.inference import InContextInference
from memgen_lens.tasks.mixture import Mixture
from memgen_lens.tasks.passages import Passages
from memgen_lens.tasks.public_domain import PublicDomain, PublicDomainPassage
from memgen_lens.tasks.shortcut import Shortcut
from memgen_lens.tasks.task import AnyTask, Task

__all__ = [
    "Addition",
    "AnyTask",
    "CheckReport",
    "Ciphertext",
    "InContextInference",
    "Item",
    "Mixture",
    "Passages",
    "PublicDomain",
    "PublicDomainPassage",
    "Shortcut",
    "Task",
    "TrainingText",
    "check",
    "require_distinct_beginnings",
]

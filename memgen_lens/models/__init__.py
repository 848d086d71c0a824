"""The one place that knows TransformerLens' models: build, load, save, name sites, make tokens, take a step.

Does not know pairs, tasks or steering.
"""

from memgen_lens.models.build import build_model
from memgen_lens.models.pretrained import load_model
from memgen_lens.models.save import save_model

__all__ = ["build_model", "load_model", "save_model"]

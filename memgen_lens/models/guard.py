"""Is this a model on which hooks fire?

Compiled modules skip hooks in silence, wrappers hide them, and plain Hugging Face models have none: each is refused
with the way to a lens model.
"""

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator

from memgen_lens.core.errors import ModelError

NEEDED = ("hook_dict", "hooks", "cfg", "tokenizer", "to_tokens")


def require_lens_model(model: Any, *, call: str) -> None:
    """Refuse what is no lens model, and a lens model whose hooks would not fire.

    Args:
        model: What the user gave.
        call: The call that needs it.

    Raises:
        ModelError: Saying how to get at the lens model.
    """

    def refuse(received: str, fix: str) -> ModelError:
        return ModelError(
            call, expected="a HookedTransformer or TransformerBridge of TransformerLens", received=received, fix=fix
        )

    if hasattr(model, "_orig_mod"):
        raise refuse("a compiled model, on which no hook fires", "Pass what was compiled: model._orig_mod.")
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        raise refuse(f"a {type(model).__name__}, which hides the model's hooks", "Pass the model itself: model.module.")
    if not all(hasattr(type(model), name) or name in getattr(model, "__dict__", {}) for name in NEEDED):
        if callable(getattr(model, "get_output_embeddings", None)):
            raise refuse(f"a plain Hugging Face model ({type(model).__name__})", "Wrap it: mg.load_model(model).")
        raise refuse(f"{type(model).__name__}", "Load one: mg.load_model('path or name').")
    compiled = [
        name
        for name, module in (model.named_modules() if isinstance(model, torch.nn.Module) else ())
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    ]
    if compiled:
        where = compiled[0] or "the model itself"
        raise refuse(
            f"a model compiled in place (at {where}), on which no hook fires",
            "Undo module.compile() by module._compiled_call_impl = None, or put module._orig_mod in its place.",
        )


def lens_model(call: str) -> Any:
    """What `memgen_lens.core.arguments` takes as a call's model: one that `require_lens_model` does not refuse."""

    def checked(model: Any) -> Any:
        require_lens_model(model, call=call)
        return model

    return Annotated[Any, BeforeValidator(checked)]

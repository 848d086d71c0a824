"""Pretrained models of transformers as lens models, and back to Hugging Face directories.

Does not know the run directories of memgen_lens (`models.load`), nor how a lens model is used.
"""

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memgen_lens.core.errors import ModelError
from memgen_lens.core.files import cannot_write, user_path
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.models.build import own_random_state, require_device
from memgen_lens.models.load import load_run_model

MERGE_TOLERANCE = 1e-3
"""How far a merged model's logits may be from those of the adapter on its base, both in float32."""

_CALL = "load_model"
_SOURCES = (
    "a run directory of memgen_lens, a Hugging Face directory or name, a GGUF file, a peft adapter directory, "
    "or a transformers or peft model"
)
_HUB_SECONDS = 5.0


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
            - a Hugging Face directory or name, or a GGUF file (which needs the package gguf): a TransformerBridge;
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
    kind = _floating(dtype)
    if device is not None and device_map is not None:
        raise ModelError(_CALL, expected="device or device_map", received="both", fix="Leave one of them out.")
    if device is not None:
        require_device(device, call=_CALL)
    if isinstance(source, str | os.PathLike):
        user_path(source, call=_CALL)  # refuses an empty one
        return _from_path(source, device or "cpu", kind, device_map, tokenizer)
    if device_map is not None:
        raise ModelError(
            _CALL,
            expected="no device_map with a model object, which is placed already",
            received=repr(device_map),
            fix="Give the path or name instead, or place it with transformers' from_pretrained(device_map=...).",
        )
    if hasattr(source, "peft_config") and hasattr(source, "merge_and_unload"):
        hf = merged(source)
        kind = kind or next(source.parameters()).dtype
        tokenizer = tokenizer or _tokenizer(getattr(source.get_base_model(), "name_or_path", ""))
        return _bridge(hf.to(device=device, dtype=kind), tokenizer)
    from transformers import PreTrainedModel

    if not isinstance(source, PreTrainedModel):
        raise ModelError(
            _CALL, expected=_SOURCES, received=type(source).__name__, fix="A lens model needs no loading: use it as is."
        )
    tokenizer = tokenizer or _tokenizer(source.name_or_path or "")
    return _bridge(_copy(source, device, kind), tokenizer)


def merged(model: Any) -> Any:
    """A copy of a peft model's base with the adapter merged into its weights, in float32.

    Raises:
        ModelError: The adapter changes no logit, or the merged model's are not the adapter's to `MERGE_TOLERANCE`.
    """
    model = copy.deepcopy(model).float().eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_base_model().config.get_text_config().vocab_size, (2, 12), generator=generator)
    ids = ids.to(device)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        plain = model.merge_and_unload(safe_merge=True)
        again = plain(input_ids=ids).logits
    change, error = (adapted - base).abs().max().item(), (again - adapted).abs().max().item()
    if not change > 0 or torch.equal(again, base):
        raise ModelError(
            _CALL,
            expected="an adapter that changes its base",
            received="one that leaves all logits as they are",
            fix="Train it, or load the base itself.",
        )
    if not error <= MERGE_TOLERANCE:
        raise ModelError(
            _CALL,
            expected=f"a merged model whose logits are the adapter's to {MERGE_TOLERANCE}",
            received=f"logits that differ by {error:.3g}",
            fix="Merge it by hand (model.merge_and_unload()) and load the result.",
        )
    return plain


def save_bridge(model: Any, directory: str | Path) -> Path:
    """Write the transformers model inside a Bridge, with its tokenizer, as a Hugging Face directory.

    ``AutoModelForCausalLM.from_pretrained(directory)`` has the same weights, bit for bit.

    Raises:
        ModelError: TransformerLens has processed the weights (compatibility mode): they are the model's no longer.
        RunDirectoryError: The directory cannot be written.
    """
    if model.compatibility_mode:
        raise ModelError(
            "save_model",
            expected="a Bridge with the weights of its Hugging Face model",
            received="one in TransformerLens' compatibility mode",
            fix="Save it before enable_compatibility_mode().",
        )
    directory, hf = user_path(directory, call="save_model"), model.original_model
    inside = {name.replace("._original_component", ""): tensor for name, tensor in hf.state_dict().items()}
    config = copy.deepcopy(hf.config)
    with torch.device("meta"):
        plain = type(hf)(config)
    weights = {name: inside[name].detach().cpu() for name in plain.state_dict()}
    plain.to(hf.dtype)
    plain.generation_config = copy.deepcopy(hf.generation_config)
    try:
        with _quiet():
            plain.save_pretrained(str(directory), state_dict=weights)
            tokenizer = getattr(model, "hugging_face_tokenizer", model.tokenizer)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(directory))
    except (OSError, AssertionError) as error:
        raise cannot_write(directory, error) from None
    return directory


def _from_path(
    source: Any, device: str, dtype: torch.dtype | None, device_map: str | dict[str, Any] | None, tokenizer: Any
) -> Any:
    """The model of a path or a name."""
    path = user_path(source, call=_CALL)
    place = {"device": device, "dtype": dtype or torch.float32, "device_map": device_map}
    if path.is_file():
        return _bridge(*_read(str(path.parent), gguf=path, tokenizer=tokenizer, **place))
    if (path / "adapter_config.json").is_file():
        return _from_adapter(path, place, tokenizer)
    if "model_type" in _settings(path):
        return _bridge(*_read(str(path), tokenizer=tokenizer, **place))
    if path.is_dir() or isinstance(source, os.PathLike) or path.is_absolute() or str(source).startswith("."):
        if device_map is not None:
            raise ModelError(
                _CALL,
                expected="no device_map with a run directory",
                received=repr(device_map),
                fix="Models of ours fit one device: set device.",
            )
        folder = path / "model" if (path / "model").is_dir() else path
        model = load_run_model(folder, device=device)
        return model if dtype is None else model.to(dtype)
    return _bridge(*_read(str(source), tokenizer=tokenizer, **place))


def _from_adapter(path: Path, place: dict[str, Any], tokenizer: Any) -> Any:
    """The base that an adapter names, with the adapter merged into it."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            _CALL, expected="the package peft, which reads adapters", received="none", fix="pip install peft"
        )
    from peft import PeftConfig, PeftModel

    with _one_line(path), _quiet():
        base_name = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    own = path if (path / "tokenizer_config.json").is_file() else None
    tokenizer = tokenizer or (_tokenizer(str(own)) if own else None)
    base, tokenizer = _read(base_name, tokenizer=tokenizer, **{**place, "dtype": torch.float32})
    with _one_line(path), _quiet():
        adapted = PeftModel.from_pretrained(base, str(path))
    return _bridge(merged(adapted).to(place["dtype"]), tokenizer)


def _read(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
    tokenizer: Any,
    gguf: Path | None = None,
) -> tuple[Any, Any]:
    """Transformers' model of a directory, a name or a GGUF file, and its tokenizer."""
    name, how = _where(name)
    if gguf is not None:
        _require_gguf(gguf)
        how["gguf_file"] = gguf.name
    from transformers import AutoModelForCausalLM

    source = gguf or name
    with _one_line(source), _quiet(), own_random_state():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, attn_implementation="eager", output_loading_info=True, **how
        )
    hf, report = loaded
    if report["missing_keys"]:
        raise ModelError(
            _CALL,
            expected=f"all weights of {type(hf).__name__} in {source}",
            received=f"none for {', '.join(sorted(report['missing_keys'])[:3])}",
            fix="Fetch the missing files, or give the directory of a causal language model.",
        )
    if gguf is not None:  # the weights were unpacked: what is loaded is a plain model, and can be saved as one
        hf.hf_quantizer = None
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
    return hf if device_map is not None else hf.to(device), tokenizer or _tokenizer(name, **how)


def _tokenizer(name: str, **how: Any) -> Any:
    """The tokenizer kept under a name.

    Raises:
        ModelError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        if not how:
            name, how = _where(name)
        with _quiet():
            return AutoTokenizer.from_pretrained(name, **how)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            _CALL, expected=f"a tokenizer of {name or 'the model'!r}", received=_line(error), fix="Give tokenizer=..."
        ) from None


def _bridge(hf: Any, tokenizer: Any) -> Any:
    """The Bridge around a transformers model (whose modules it replaces) and a copy of a tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge

    hf.set_attn_implementation("eager")
    own = copy.deepcopy(tokenizer)
    # Else TransformerLens reads the tokenizer again under its name, which may be nowhere, to give it a
    # begin-of-text token that the model's own tokenizer does not put there.
    own.init_kwargs["add_bos_token"] = True
    how: dict[str, Any] = {} if getattr(hf, "hf_device_map", None) else {"device": str(hf.device)}
    with _one_line(type(hf).__name__), _quiet(), own_random_state():
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
        _CALL,
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


def _require_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF, and a machine that cannot read it."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                _CALL, expected=_SOURCES, received=f"the file {path}, which is not GGUF", fix="Give its directory."
            )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            _CALL, expected="the package gguf, which reads GGUF files", received="none", fix="pip install gguf"
        )


def _where(name: str) -> tuple[str, dict[str, Any]]:
    """A directory as it is; a name too, but the folder of its cached files where the hub does not answer."""
    if not name or Path(name).is_dir():
        return name, {"local_files_only": True}
    if _hub_answers():
        return name, {"local_files_only": False}
    from huggingface_hub import snapshot_download

    with _one_line(name):  # transformers would ask the hub again and again, whatever it is told
        return snapshot_download(name, local_files_only=True), {"local_files_only": True}


def _hub_answers() -> bool:
    """Whether the Hugging Face hub can be asked: once, briefly; its own client tries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # whatever keeps the client from an answer, the cache is what there is
        return False
    return True


@contextmanager
def _one_line(source: Any) -> Iterator[None]:
    """Turn the errors of transformers and peft into one line that names the source."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # they raise all kinds: of files, networks, configurations, formats
        raise ModelError(
            _CALL,
            expected=_SOURCES,
            received=f"{str(source)!r} ({_line(error)})",
            fix="Check the path or name; offline, only what is on this machine can be loaded.",
        ) from None


def _line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and log lines, and TransformerLens' warnings, from the user."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with quiet_imports():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

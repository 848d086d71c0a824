"""Adapters of peft, merged into their base.

Does not train them.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

from memgen_lens.core.errors import ModelError
from memgen_lens.models.hub import CALL, one_line, quiet, read, tokenizer_of

MERGE_TOLERANCE = 1e-4
"""How far a merged model's logits may be from those of the adapter on its base, both in float32, as a share of the
largest of these: logits have no scale of their own."""


def merged(model: Any) -> Any:
    """A copy of a peft model's base with the adapter merged into its weights, in float32.

    Raises:
        ModelError: The adapter changes no logit, or the merged model's are not the adapter's (`MERGE_TOLERANCE`).
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
    largest = adapted.abs().max().item()
    if not change > 0 or torch.equal(again, base):
        raise ModelError(
            CALL,
            expected="an adapter that changes its base",
            received="one that leaves all logits as they are",
            fix="Train it, or load the base itself.",
        )
    if not error <= MERGE_TOLERANCE * largest:
        raise ModelError(
            CALL,
            expected=f"a merged model whose logits are the adapter's to {MERGE_TOLERANCE:g} of the largest",
            received=f"logits up to {largest:.3g} that differ by {error:.3g}",
            fix="Merge it by hand (model.merge_and_unload()) and load the result.",
        )
    return plain


def read_adapter(path: Path, place: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """The base that an adapter's directory names, with the adapter merged into it, and its tokenizer.

    Args:
        path: The directory.
        place: ``device``, ``dtype`` and ``device_map``, as in `memgen_lens.models.hub.read`.
        tokenizer: A tokenizer in place of the directory's or the base's.

    Raises:
        ModelError: peft is absent, base or adapter cannot be read, or what `merged` refuses.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            CALL, expected="the package peft, which reads adapters", received="none", fix="pip install peft"
        )
    from peft import PeftConfig, PeftModel

    with one_line(path), quiet():
        base_name = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    own = path if (path / "tokenizer_config.json").is_file() else None
    tokenizer = tokenizer or (tokenizer_of(str(own)) if own else None)
    base, tokenizer = read(base_name, tokenizer=tokenizer, **{**place, "dtype": torch.float32})
    with one_line(path), quiet():
        adapted = PeftModel.from_pretrained(base, str(path))
    return merged(adapted).to(place["dtype"]), tokenizer

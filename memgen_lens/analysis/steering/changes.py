"""What happens to rows of a site that ride in one batch: each kind of steering as a function of rows.

Does not know models, hooks or steerings. Each function works on the device of what is changed, which of a model spread
over several is the layer's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen_lens.analysis.steering.fitted import RowRule
from memgen_lens.core.errors import PairsError
from memgen_lens.fast.decoding import Change


def shift_change(shifts: Float[Tensor, "copy neuron"]) -> Change:
    """Add each copy's shift."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal shifts
        shifts = shifts.to(h.device)
        return h + (shifts[0] if len(shifts) == 1 else shifts.index_select(0, copy))

    return change


def scale_change(factors: Float[Tensor, "copy neuron"]) -> Change:
    """Multiply by each copy's factors."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal factors
        factors = factors.to(h.device)
        return h * (factors[0] if len(factors) == 1 else factors.index_select(0, copy))

    return change


def set_change(values: Float[Tensor, "copy neuron"], masks: Bool[Tensor, "copy neuron"]) -> Change:
    """Put each copy's values in where its mask is true."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal values, masks
        values, masks = values.to(h.device), masks.to(h.device)
        return torch.where(masks[copy], values[copy].to(h.dtype), h)

    return change


def patch_change(rows: Float[Tensor, "source neuron"], masks: Bool[Tensor, "copy neuron"]) -> Change:
    """Put the source rows' values in where a copy's mask is true; prompts beyond the rows begin anew."""

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal rows, masks
        rows, masks = rows.to(h.device), masks.to(h.device)
        return torch.where(masks[copy], rows[prompt % len(rows)].to(h.dtype), h)

    return change


def rule_change(
    rules: Sequence[RowRule | None],
    gain: Float[np.ndarray, "copy neuron"],
    taken_from: Int[np.ndarray, "copy neuron"],
) -> Change:
    """Add what each copy's rule says to a row, given the row.

    The rules' matrices lie side by side, ``[neuron, rule * code]``: one product gives the codes of all rules, of which
    each row keeps those of its own.

    Args:
        rules: One a copy, all of one kind; None where a copy changes nothing. Held once where they are the same object.
        gain: What the rule's output is multiplied by; 0 where nothing is added.
        taken_from: The neuron of the output that is written to each neuron.
    """
    distinct = list({id(rule): rule for rule in rules if rule is not None}.values())
    place = {id(rule): number for number, rule in enumerate(distinct)}
    n_rules, n_codes = len(distinct), max(len(rule.bias) for rule in distinct)
    nearest = distinct[0].nearest
    held = {
        # A copy without a rule has a gain of 0: any rule does.
        "which": torch.tensor([place.get(id(rule), 0) for rule in rules]),
        "center": _stacked([rule.center for rule in distinct]),
        "read": torch.cat([_padded(rule.read.T, n_codes) for rule in distinct]).T.contiguous(),
        "bias": torch.cat([_padded(rule.bias, n_codes, -np.inf if nearest else 0.0) for rule in distinct]),
        "write": torch.cat([_padded(rule.write, n_codes) for rule in distinct]),  # [rule * code, neuron]
        "offset": _stacked([rule.offset for rule in distinct]),
        "gain": torch.as_tensor(gain, dtype=torch.float32),
        "taken_from": torch.as_tensor(taken_from, dtype=torch.int64),
    }

    def change(h: Tensor, copy: Tensor, prompt: Tensor) -> Tensor:
        nonlocal held
        held = {name: tensor.to(h.device) for name, tensor in held.items()}
        own = held["which"][copy]  # [row]
        code = torch.addmm(held["bias"], h.float() - held["center"][own], held["read"])  # [row, rule * code]
        code = code.unflatten(1, (n_rules, n_codes))
        row = torch.arange(len(h), device=h.device)
        if nearest:
            added = held["write"].index_select(0, own * n_codes + code[row, own].argmax(1))
        else:
            alone = torch.zeros_like(code)
            alone[row, own] = code[row, own]
            added = alone.flatten(1) @ held["write"]
        added = (added + held["offset"][own]).gather(1, held["taken_from"][copy])
        return h + held["gain"][copy] * added

    return change


def known_pairs(pairs: Any, n: int) -> np.ndarray:
    """Indices of source pairs, each of which is there."""
    index = np.asarray(pairs)
    unknown = index[(index < 0) | (index >= n)]
    if len(unknown):
        raise PairsError(
            "Steering.applied(pairs=...)",
            expected=f"indices of source pairs, 0 to {n - 1}",
            received=str(unknown[0]),
            fix="Name the source pair of each prompt by its place in the recorded pairs.",
        )
    return index


def _stacked(arrays: Sequence[Float[np.ndarray, " neuron"]]) -> Float[Tensor, "rule neuron"]:
    return torch.as_tensor(np.stack(arrays), dtype=torch.float32)


def _padded(array: Float[np.ndarray, "..."], length: int, value: float = 0.0) -> Float[Tensor, "..."]:
    """The array with its first axis filled up to a length."""
    width = [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return torch.as_tensor(np.pad(array, width, constant_values=value), dtype=torch.float32)

"""What a forward pass is given: which of its positions belong to the prompt, and where each row's prompt ends.

A hook on an activation sees neither tokens, mask nor cache. So a look is taken at what enters the first block: it tells
a prompt from the steps of a generation that follows it, with a cache and without, whoever runs the model. Does not
change anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memgen_lens.core.errors import ModelError, SettingsError
from memgen_lens.core.types import Positions
from memgen_lens.fast.support import is_hooked_transformer


@dataclass(frozen=True)
class At:
    """Positions of a forward pass.

    Attributes:
        length: Positions that the pass runs.
        chosen: Those that are meant, of all rows or ``[batch, pos]``.
    """

    length: int
    chosen: "slice | Bool[Tensor, 'batch pos']"


@dataclass
class Passes:
    """The running forward pass, and the prompt that it goes on from.

    Attributes:
        prompt_length: Positions of the prompt in the batch, padding before it counted, of all rows or of each; None
            where each prompt is to be found out.
        pad: The token that fills up short rows; None where there is none.
        past: Positions that are in the cache already.
        length: Positions of this pass; 0 before the first.
        answer: The answer position of each row, counted from the first position that was run; None where this pass
            goes on from a prompt that was not seen.
        begun: How many passes so far went on from none before: a new one means new prompts.
    """

    prompt_length: int | Sequence[int] | None
    pad: int | None
    past: int = 0
    length: int = 0
    answer: Int[Tensor, " batch"] | None = None
    begun: int = 0
    _mask: Tensor | None = None
    _tokens: Tensor | None = None
    _entered: Tensor | None = None
    _where: dict[str, "At | None"] = field(default_factory=dict)

    def where(self, positions: Positions) -> "At | None":
        """The positions of this pass that are steered; None for none of them.

        Raises:
            ModelError: The hook point lies before the first block, where nothing is known of the pass yet.
        """
        if not self.length:
            raise ModelError(
                "steering",
                expected="a site inside the blocks, or behind them",
                received="one before the first block, where it cannot be known yet which position is the answer's",
                fix="Steer resid_pre of layer 0 (site 'resid_pre', layers=[0]) in its place.",
            )
        if positions not in self._where:
            self._where[positions] = self._found(positions)
        return self._where[positions]

    def _found(self, positions: Positions) -> "At | None":
        if self.answer is None and positions != "all":
            return None if positions == "prompt" else At(self.length, slice(None))
        return positions_from(self.answer, positions, first=self.past, length=self.length)

    def enter(self, entered: Tensor, *, past: int, mask: Tensor | None) -> None:
        """Take note of a pass at what enters its first block ``[batch, pos, d_model]``."""
        before, goes_on = self._entered, past > 0
        if before is not None and not goes_on and self.answer is not None and entered.shape[0] == before.shape[0]:
            # The same positions and one more: the next step of a generation without a cache.
            one_more = entered.shape[1] == before.shape[1] + 1 and before.shape[1] > 0
            goes_on = one_more and torch.equal(entered[:, :-1], before)
        self.past, self.length, self._mask, self._where = past, entered.shape[1], mask, {}
        self._entered = entered.detach()
        self.begun += not goes_on
        if goes_on:
            if self.answer is not None and len(self.answer) != len(entered):
                self.answer = None
            if self.prompt_length is not None:
                self.answer = self._given(len(entered))
        else:
            self.answer = self._ends() if self.prompt_length is None else self._given(len(entered))

    def saw_tokens(self, tokens: Any) -> None:
        """Take note of tokens that go in, where they are tokens."""
        self._tokens = tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None

    def _given(self, batch: int) -> Int[Tensor, " batch"]:
        assert self.prompt_length is not None
        return given_answers(self.prompt_length, batch)

    def _ends(self) -> Int[Tensor, " batch"]:
        """The last position of each row that is no padding: by the mask, else by the pad tokens at its end."""
        assert self._entered is not None
        batch = len(self._entered)
        if self._mask is not None and self._mask.ndim == 2 and self._mask.shape[1] == self.length:
            mask = self._mask.expand(batch, -1).long()
            return self.length - 1 - mask.flip(1).argmax(1)
        tokens = self._tokens
        if tokens is None or self.pad is None or tokens.shape != (batch, self.length):
            return torch.full((batch,), self.length - 1)
        is_pad = (tokens == self.pad).long()
        trailing = is_pad.flip(1).cumprod(1).sum(1)
        # A batch is padded to its longest row, which therefore has no padding.
        if bool((trailing > 0).all()):
            raise ModelError(
                "steering",
                expected="to know where each prompt ends",
                received="rows that all end in the pad token, of which some may be padding",
                fix="Call the model with attention_mask=..., or name it: applied(model, prompt_length=...).",
            )
        return self.length - 1 - trailing


def given_answers(prompt_length: int | Sequence[int], batch: int) -> Int[Tensor, " batch"]:
    """The answer position of each row, where the lengths of the prompts are given.

    Raises:
        SettingsError: There are not as many lengths as rows, or one is below 1.
    """
    lengths = torch.as_tensor(prompt_length).reshape(-1)
    if len(lengths) not in (1, batch) or int(lengths.min()) < 1:
        raise SettingsError(
            "steering (prompt_length=...)",
            expected=f"a length of at least 1, for all rows or for each of {batch}",
            received=repr(prompt_length),
            fix="Count the positions of each row up to the end of its prompt, padding before it included.",
        )
    return (lengths - 1).expand(batch)


def positions_from(
    answer: Int[Tensor, " batch"] | None, positions: Positions, *, first: int, length: int
) -> "At | None":
    """The positions of a pass that are steered; None for none of them.

    Args:
        answer: The answer position of each row; not needed where all positions are steered.
        positions: Which of them, seen from the answer position.
        first: The first position that the pass runs, counted as ``answer`` is.
        length: Positions that it runs.
    """
    if positions == "all" or answer is None:
        return At(length, slice(None))
    place, last = first + torch.arange(length), answer.cpu()[:, None]
    chosen = {"answer": place >= last, "prompt": place == last, "generated": place > last}[positions]
    columns = chosen.any(0)
    if not bool(columns.any()):
        return None
    if bool((chosen == columns).all()):
        start = int(columns.long().argmax())
        return At(length, slice(start, start + int(columns.sum())))
    return At(length, chosen)


@contextmanager
def watched_passes(model: Any, *, prompt_length: int | Sequence[int] | None = None) -> Iterator[Passes]:
    """Watch the forward passes of a model inside the ``with`` block; nothing is left behind, also after an exception.

    Args:
        model: A lens model.
        prompt_length: Positions of the prompt, padding before it counted; of all rows or of each. Default: as the
            attention mask tells, else the pad tokens that rows end in.
    """
    passes = Passes(prompt_length, getattr(model.tokenizer, "pad_token_id", None))
    hooked = is_hooked_transformer(model)
    outer: dict[str, Any] = {}

    def saw_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer.clear()
        outer.update(kwargs)
        passes.saw_tokens(kwargs.get("input_ids", args[0] if args else None))

    def saw_block(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        if hooked:
            entry = kwargs.get("past_kv_cache_entry", args[1] if len(args) > 1 else None)
            past = 0 if entry is None else entry.past_keys.shape[1]
            mask = kwargs.get("attention_mask")
        else:
            cache = outer.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            mask = outer.get("attention_mask")
        passes.enter(entered, past=int(past), mask=mask)

    with ExitStack() as stack:
        way_in = model.embed if hooked else model.original_model
        for module, hook in ((way_in, saw_call), (model.blocks[0], saw_block)):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield passes

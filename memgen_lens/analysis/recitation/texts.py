"""Texts cut into prefixes and suffixes of so many tokens, and what a model makes of them.

Does not judge what it says: see `recitation` and `steered`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.core.errors import SettingsError
from memgen_lens.core.types import LensModel
from memgen_lens.fast.decoding import Intervention, greedy_copies
from memgen_lens.fast.support import is_plain
from memgen_lens.models.cache import Past
from memgen_lens.models.step import greedy_tokens, keeps_past, last_logits, rows_at_once
from memgen_lens.models.tokens import tokenized


@dataclass(frozen=True)
class CutTexts:
    """Texts as tokens.

    Attributes:
        prefix: What the model is given, with what its tokenizer puts before a text.
        suffix: What it is asked for.
        n_before: Tokens before the text in each prefix.
    """

    prefix: Int[Tensor, "text prefix"]
    suffix: Int[Tensor, "text suffix"]
    n_before: int

    def __len__(self) -> int:
        return len(self.prefix)

    def take(self, some: slice) -> "CutTexts":
        """Some of the texts."""
        return CutTexts(self.prefix[some], self.suffix[some], self.n_before)


def cut_texts(
    model: LensModel,
    texts: Sequence[str],
    *,
    prefix_tokens: int,
    suffix_tokens: int,
    prepend_bos: bool | None,
    call: str,
    name: str = "texts",
) -> CutTexts:
    """The first tokens of each text and those that follow; what is behind them is left away.

    Raises:
        SettingsError: There are no texts, or one is too short.
        ModelError: The model has no tokenizer, it lacks a character, or a text is longer than the context.
    """
    if not texts:
        raise SettingsError(f"{call}({name}=...)", expected="at least one text", received="none", fix="Give texts.")
    tokens, lengths = tokenized(model, texts, prepend_bos=prepend_bos)
    bare = model.tokenizer.encode(texts[0], add_special_tokens=False)
    first = tokens[0, : int(lengths[0])].tolist()
    n_before = next((i for i in range(len(first)) if first[i : i + len(bare)] == bare), 0)
    needed = n_before + prefix_tokens + suffix_tokens
    short = int(lengths.argmin())
    if int(lengths[short]) < needed:
        raise SettingsError(
            f"{call}({name}=...)",
            expected=f"texts of at least {prefix_tokens} + {suffix_tokens} tokens",
            received=f"{int(lengths[short]) - n_before} tokens: {texts[short]!r}"[:160],
            fix="Leave short texts out, or lower prefix_tokens or suffix_tokens.",
        )
    return CutTexts(tokens[:, : n_before + prefix_tokens], tokens[:, n_before + prefix_tokens : needed], n_before)


def continuations(model: LensModel, prefix: Int[Tensor, "text prefix"], n: int) -> Int[Tensor, "text new"]:
    """Greedy continuations, by the fast forward where no hook is to fire; after a sequence's end, end-of-text tokens.

    Raises:
        ModelError: Prefix and continuation do not fit the model's context.
    """
    eos = model.tokenizer.eos_token_id
    if is_plain(model):
        how = {"copies": 1, "max_new_tokens": n, "eos": eos}
        made = [greedy_copies(model, prefix, intervention=Intervention({}), **how)[0]]
    else:
        rows = prefix.split(rows_at_once(model, prefix.shape[1] + n))
        made = [greedy_tokens(model, part, max_new_tokens=n) for part in rows]
    return torch.cat([torch.nn.functional.pad(part, (0, n - part.shape[1]), value=eos) for part in made])


@torch.inference_mode()
def suffix_logits(model: LensModel, texts: CutTexts) -> Float[Tensor, "text suffix d_vocab"]:
    """Logits for each suffix token, given the prefix and the suffix's own tokens before it.

    The prefix is run, and then, from the cache, the suffix: so hooks that steer from the answer position on
    (`memgen_lens.Steering.applied`) see the one as the prompt and the other as what is generated, as they would while
    the suffix is recited. A model that keeps no cache is run as when it generates, token by token, if there are hooks.
    """
    n = texts.suffix.shape[1]
    mask = torch.ones_like(texts.prefix)
    if keeps_past(model) and not is_plain(model):
        past = Past.of_nothing(model, len(texts), texts.prefix.device)
        first = last_logits(model, texts.prefix, mask, past)
        if n == 1:
            return first
        if past.is_whole:
            fed = texts.suffix[:, :-1]
            return torch.cat([first, last_logits(model, fed, torch.ones_like(fed), past, n=n - 1)], dim=1)
    fed = torch.cat([texts.prefix, texts.suffix[:, :-1]], dim=1)
    if is_plain(model):
        return last_logits(model, fed, torch.ones_like(fed), n=n)
    lengths = range(texts.prefix.shape[1], fed.shape[1] + 1)
    return torch.cat([last_logits(model, fed[:, :m], torch.ones_like(fed[:, :m])) for m in lengths], dim=1)


def in_parts(model: LensModel, texts: CutTexts, copies: int = 1) -> list[slice]:
    """Slices of texts whose logits, for so many copies of each, fit into memory at once."""
    n = texts.suffix.shape[1]
    at_once = max(1, rows_at_once(model, texts.prefix.shape[1] + n, n=n) // copies)
    return [slice(first, first + at_once) for first in range(0, len(texts), at_once)]


@torch.inference_mode()
def suffix_nll(
    model: LensModel, texts: CutTexts, logits: Callable[[LensModel, CutTexts], Tensor] = suffix_logits
) -> Float[Tensor, "text suffix"]:
    """Negative log-likelihood (nats) of each suffix token, see `suffix_logits`."""
    parts = [texts.take(some) for some in in_parts(model, texts)]
    return torch.cat([nll_of(logits(model, part), part.suffix) for part in parts])


def nll_of(
    logits: Float[Tensor, "row suffix d_vocab"], suffix: Int[Tensor, "row suffix"]
) -> Float[Tensor, "row suffix"]:
    """Negative log-likelihood (nats) of tokens under logits."""
    return -logits.float().log_softmax(-1).gather(2, suffix[..., None])[..., 0]

"""A Hugging Face tokenizer over a task's vocabulary; and texts to tokens by any other.

Built on the `tokenizers` library: one token a vocabulary entry, longest first, nothing added or dropped, so that
decoding an encoded text gives it back.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import BeforeValidator

from memgen_lens.core.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"
_LONGEST: WeakKeyDictionary[Any, dict[tuple[int, tuple[str, ...]], int]] = WeakKeyDictionary()


def build_tokenizer(vocabulary: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A fast tokenizer with the tokens of ``vocabulary``, then ``<eos>``, ``<pad>``, ``<unk>``.

    It has no begin-of-text token: a prompt's tokens are the prompt, so positions mean the same in training,
    in `to_tokens` and in `generate`.

    Args:
        vocabulary: Distinct non-empty tokens; in the text, longer ones are matched before shorter ones.

    Raises:
        TaskError: A token is empty or occurs twice.
    """
    # Heavy, and not needed to make prompts: import when a tokenizer is asked for.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len({*vocabulary, EOS, PAD, UNK}) < len(vocabulary) + 3 or "" in vocabulary:
        raise TaskError(
            "build_tokenizer",
            expected=f"distinct, non-empty tokens, none of them {EOS}, {PAD} or {UNK}",
            received=f"{len(vocabulary)} tokens, {len(set(vocabulary) - {''})} distinct and non-empty",
            fix="Drop the repeated, empty and special ones.",
        )
    tokens = [*vocabulary, EOS, PAD, UNK]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = "|".join([*("".join(map(_escape, token)) for token in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNK)


def _escape(character: str) -> str:
    r"""A character as Oniguruma's ``\x{...}``, which needs no knowledge of its special ones."""
    return f"\\x{{{ord(character):x}}}"


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by any Hugging Face tokenizer, nothing added."""
    if not texts or not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    backend = tokenizer.backend_tokenizer  # without what transformers makes of each encoding: most of the time
    backend.no_padding()  # that another call may have left behind; transformers sets its own at each call
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def longest(tokenizer: Any, texts: tuple[str, ...]) -> int:
    """Tokens of the longest of some texts; counted once for each tokenizer, as long as no token is added to it."""
    counted = _LONGEST.setdefault(tokenizer, {})
    asked = (len(tokenizer), texts)
    if asked not in counted:
        counted[asked] = max(map(len, encoded(tokenizer, texts)), default=0)
    return counted[asked]


def _tokenizer(value: Any) -> Any:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(value, PreTrainedTokenizerBase):
        raise ValueError("a Hugging Face tokenizer, like model.tokenizer")
    if value.eos_token_id is None:
        raise ValueError("a tokenizer with an end-of-text token (eos_token)")
    return value


TokenizerLike = Annotated[Any, BeforeValidator(_tokenizer)]
"""What an argument that takes a tokenizer may be."""

"""Chats as the text that a model was trained to read: its tokenizer's own chat template.

Does not tokenize, and does not know transformers: the tokenizer is an object handed in.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from memgen_lens.core.errors import ModelError, PairsError, shortened


def chats(call: str, name: str) -> Any:
    """What `memgen_lens.core.arguments` takes as lists of messages: each chat a list, each message a mapping.

    Args:
        call: Name of the call, for errors.
        name: Name of the argument, for errors.
    """

    def checked(value: Any) -> Any:
        several = _listed(value)
        if several is None:
            raise _malformed(call, name, value)
        messages = [_listed(chat) for chat in several]
        for place, chat in enumerate(messages):
            if not chat or not all(map(_is_message, chat)):
                raise _malformed(call, f"{name}[{place}]", several[place] if chat is None else chat)
        return messages

    return Annotated[Any, BeforeValidator(checked)]


def render_chats(chats: Sequence[Sequence[Mapping[str, Any]]], tokenizer: Any, *, name: str, call: str) -> list[str]:
    """One prompt a chat, with the opening of the assistant's turn; a last message of the assistant's is gone on with.

    Args:
        chats: Lists of messages, each a mapping with ``"role"`` and ``"content"``.
        tokenizer: A tokenizer with a chat template, or a model that has one.
        name: Name of the argument, for errors.
        call: Name of the call, for errors.

    Raises:
        ModelError: There is no tokenizer, or it has no chat template.
        PairsError: The template refuses a chat.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            call,
            expected="a tokenizer with a chat template, or a model that has one",
            received="no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__} without a chat template",
            fix="Set tokenizer.chat_template, or write the prompts out and use PromptPairs.from_strings.",
        )
    return [_render(chat, tokenizer, name=f"{name}[{i}]", call=call) for i, chat in enumerate(chats)]


def _render(chat: Any, tokenizer: Any, *, name: str, call: str) -> str:
    begun = chat[-1]["role"] == "assistant"
    messages = [dict(message) for message in chat]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # a template is a program of the tokenizer's author: it may raise anything
        raise PairsError(
            call,
            expected=f"messages that the chat template takes as {name}",
            received=" ".join(f"{type(error).__name__}: {error}".split()),
            fix="Give roles and turns in the order that this model's template asks for.",
        ) from error


def _listed(value: Any) -> list[Any] | None:
    """What can be gone through as a list; None for the rest, for one text and for one message."""
    if isinstance(value, str | bytes | Mapping):
        return None
    try:
        return list(value)
    except TypeError:
        return None


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _malformed(call: str, name: str, received: Any) -> PairsError:
    return PairsError(
        call,
        expected=f'a list of messages {{"role": ..., "content": ...}} a chat as {name}',
        received=shortened(received),
        fix='Give one chat a pair, e.g. memorized=[[{"role": "user", "content": "Who wrote Emma?"}]].',
    )

"""What a public function may be called with: checked at the door, so that nothing fails deep inside.

A function names what each of its arguments may be, once, in a decorator; pydantic converts what has a plain meaning
(one prompt where a list belongs, a numpy integer, a generator) and refuses the rest, and the refusal becomes one of
our errors. Does not know what the functions do, and does not look into models and tasks, which are anything that
behaves like one.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

from memgen_lens.core.errors import MemgenError, SettingsError
from memgen_lens.core.types import Direction, Positions, Split

F = TypeVar("F", bound=Callable[..., Any])
MAX_COUNT = 2**31 - 1
"""Largest size or number of anything."""
MAX_SEED = 2**32 - 1
"""Largest seed that numpy takes."""


def _plain(value: Any) -> Any:
    """A numpy scalar (or array of no axis) as the Python value that it is; anything else as it came."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def _several(value: Any) -> Any:
    """Anything that can be gone through once as a list, with plain values; one value as a list of it."""
    value = _plain(value)
    if isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        return [value]
    return [_plain(entry) for entry in value]


def _is_not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not True or False")
    return value


def _path(value: Any) -> Any:
    """A path, with ``~`` for the user's folder; an empty one would be the folder that one happens to stand in."""
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        raise ValueError("a path, as text or pathlib.Path")
    if not str(value) or "\0" in str(value):
        raise ValueError("a path that is not empty")
    return Path(value).expanduser()


_Plain = BeforeValidator(_plain)
_Number = BeforeValidator(lambda value: _is_not_bool(_plain(value)))
_Several = BeforeValidator(_several)

Text = Annotated[str, _Plain]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT), _Number]
Number0 = Annotated[int, Field(ge=0, le=MAX_COUNT), _Number]
"""A number of things of which there may be none."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), _Number]
Flag = Annotated[bool, _Plain]
Share = Annotated[float, Field(gt=0, le=1), _Number]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
Texts = Annotated[list[Text], _Several]
Shares = Annotated[list[Share], _Several]
Positives = Annotated[list[Positive], _Several]
Indices = Annotated[list[Number0], _Several]
Place = Annotated[Path, BeforeValidator(_path)]
PairSplitName = Annotated[Literal["select", "tune", "test"], _Plain]
SplitName = Annotated[Split, _Plain]
DirectionName = Annotated[Direction, _Plain]
PositionsName = Annotated[Positions, _Plain]
PositionsNames = Annotated[list[PositionsName], _Several]
Anything = Any
"""Looked at where it is used: a model, a task, a function of the user's."""


def one(kind: type) -> Any:
    """An object of a class of ours."""
    return InstanceOf[kind]


def several(kind: Any) -> Any:
    """A list of such values, or one of them."""
    return Annotated[list[kind], _Several]


def arguments(call: str | None = None, **kinds: Any) -> Callable[[F], F]:
    """Check and convert the arguments of a public function before it runs.

    Args:
        call: What the error calls the function; default: its name.
        **kinds: By argument, what it may be: one of this module's kinds, ``X | None``, or any type that pydantic knows.

    Raises (when the function is called):
        SettingsError: An argument is none of that, missing, or unknown.
    """

    def decorate(function: F) -> F:
        shape, name = signature(function), call or function.__name__.removeprefix("_")

        @cache
        def adapter(argument: str) -> Any:
            return TypeAdapter(kinds[argument], config=ConfigDict(strict=True, arbitrary_types_allowed=True))

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = shape.bind(*args, **kwargs)
            except TypeError as error:
                raise SettingsError(
                    name,
                    expected=f"arguments ({', '.join(shape.parameters)})",
                    received=str(error),
                    fix="Change the call.",
                ) from None
            for argument in kinds.keys() & bound.arguments.keys():
                try:
                    bound.arguments[argument] = adapter(argument).validate_python(bound.arguments[argument])
                except ValidationError as error:
                    raise _refusal(name, argument, error, bound.arguments[argument]) from None
            return function(*bound.args, **bound.kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate


def _refusal(call: str, argument: str, error: ValidationError, value: Any) -> MemgenError:
    """Pydantic's complaint as one sentence of ours; an error of ours that it wraps stays what it was."""
    problems = error.errors(include_url=False)
    cause = problems[0].get("ctx", {}).get("error")
    if isinstance(cause, MemgenError):
        return cause
    expected = " or ".join(
        dict.fromkeys(p["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for p in problems[:3])
    )
    received = shortened(problems[0]["input"] if problems[0]["loc"] else value)
    return SettingsError(f"{call}({argument}=...)", expected=expected, received=received, fix=f"Change {argument}.")


def shortened(value: Any, *, length: int = 80) -> str:
    """A value as an error shows it: its repr, cut; its type where that fails."""
    try:
        text = repr(value)
    except Exception:  # a user's own class may fail to say what it is; that must not hide what is wrong
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."

"""What all settings have in common: frozen, strict, and one clear error where something is wrong.

Does not know any setting: see `memgen_lens.core.config` and `memgen_lens.tasks`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from memgen_lens.core.errors import MemgenError, SettingsError, shortened, suggest

MAX_SEED = 2**32 - 1
"""Largest seed that numpy takes."""

S = TypeVar("S", bound="Settings")


class _Checked(type(BaseModel)):
    """Turns pydantic's report on a bad call into one clear error, where the call is made."""

    if not TYPE_CHECKING:  # so that type checkers see the fields of each class, as pydantic declares them

        def __call__(cls, *args: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*args, **settings)
            except ValidationError as error:
                raise settings_error(cls, error) from None


class Settings(BaseModel, metaclass=_Checked):
    """A frozen set of named settings; an unknown name, a wrong type or a bad value raises `SettingsError`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    FORMER: ClassVar[Mapping[str, str]] = {}
    """Settings of earlier versions by name, each with what to do now."""

    @classmethod
    def from_json(cls: type[S], text: str) -> S:
        """The settings written by ``model_dump_json()``.

        Raises:
            SettingsError: The text is not JSON, or holds an unknown setting or a bad value.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise settings_error(cls, error) from None

    def but(self: S, **changes: Any) -> S:
        """A copy with some settings changed, checked like a new one."""
        return type(self)(**({name: getattr(self, name) for name in type(self).model_fields} | changes))


def settings_error(cls: type[BaseModel], error: ValidationError) -> MemgenError:
    """Pydantic's first complaint as one sentence of ours; an error of ours that it wraps stays what it was."""
    first = error.errors(include_url=False)[0]
    loc, beside = _place(cls, first["loc"])
    name = ".".join(map(str, loc)) or "settings"
    if first["type"] == "extra_forbidden":
        return SettingsError(
            cls.__name__,
            expected="a known setting",
            received=f"{name}={shortened(first['input'])}",
            fix=getattr(cls, "FORMER", {}).get(name) or suggest(str(loc[-1]), beside),
        )
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MemgenError):
        return type(cause)(cause.call, expected=cause.expected, received=cause.received, fix=cause.fix)
    received = "nothing" if first["type"] == "missing" else shortened(first["input"], length=120)
    return SettingsError(
        f"{cls.__name__}.{name}",
        expected=first["msg"].removeprefix("Value error, ").removeprefix("Input should be "),
        received=received,
        fix=f"Change {name}.",
    )


def _place(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[int | str], list[str]]:
    """The place of a complaint, and the names of the settings there.

    Where a setting is one of several classes, pydantic names the class too.
    """
    fields: Mapping[str, Any] = cls.model_fields
    kinds: dict[str, Any] = {}
    kept: list[int | str] = []
    for depth, part in enumerate(loc):
        if part in kinds:
            fields, kinds = kinds[str(part)].model_fields, {}
            continue
        kept.append(part)
        if depth < len(loc) - 1:
            annotation = fields[str(part)].annotation if part in fields else None
            classes = [getattr(kind, "__origin__", kind) for kind in get_args(annotation)]
            kinds = {kind.__name__: kind for kind in classes if hasattr(kind, "model_fields")}
            fields = getattr(annotation, "model_fields", fields)
    return kept, list(fields)

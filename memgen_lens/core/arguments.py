"""What a public function may be called with: checked at the door, so that nothing fails deep inside.

A function names what each of its arguments may be, once, in a decorator; pydantic converts what has a plain meaning
(one prompt where a list belongs, a numpy integer, a generator) and refuses the rest, and the refusal becomes one of
our errors. Does not know what the functions do, and does not look into models and tasks, which are anything that
behaves like one.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from memgen_lens.core.errors import MemgenError, SettingsError, shortened
from memgen_lens.core.files import user_path
from memgen_lens.core.settings import MAX_SEED
from memgen_lens.core.types import Ablation, Direction, FittedKind, Positions, ScoredMode, Split

MADE_BY = {
    "Activations": "mg.record",
    "Comparison": "mg.compare",
    "FinetuneConfig": "mg.FinetuneConfig(...)",
    "ExperimentConfig": 'mg.presets["quickstart"]',
    "Guard": "mg.Guard or mg.Guard.fit",
    "GuardTable": "mg.evaluate_guard",
    "ModeContent": "mg.mode_and_content",
    "NeuronRecord": "mg.neuron_page",
    "NeuronScores": "mg.attribute",
    "PatchingMap": "mg.patching_map",
    "PositionProbes": "mg.probe_by_position",
    "PositionSteering": "mg.steering_by_position",
    "ProbeReport": "mg.fit_probes",
    "Runs": "mg.run_many or mg.Runs.load",
    "PromptPairs": "mg.collect_pairs or mg.PromptPairs.from_strings",
    "Steering": "mg.Steering.from_scores and its other from_... methods",
    "SteeringCost": "mg.steering_cost",
    "SteeringObjective": "mg.SteeringObjective(...)",
    "Recitation": "mg.recitation",
    "RecitationCurve": "mg.recitation_under_steering",
    "SteeringTable": "mg.evaluate_steering",
    "SweepRow": "mg.sweep_steering",
    "TrainConfig": "mg.TrainConfig(...)",
    "TunedSteering": "mg.tune_steering",
}
"""Where a user gets what an argument takes."""
F = TypeVar("F", bound=Callable[..., Any])
MAX_COUNT = 2**31 - 1
"""Largest size or number of anything."""
TASK = ("items", "rephrase", "classify", "is_memorized_form", "max_answer_tokens")
"""What behaviour and analysis ask of a task."""


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


def _no_text(value: Any) -> Any:
    if isinstance(value, str | bytes):
        raise ValueError("a list of strings")
    return value


def _index(value: Any) -> Any:
    """Places in a list, as an array of whole numbers; what is no list of them is left to be refused."""
    given = isinstance(value, Iterable) and not isinstance(value, np.ndarray | str | bytes)
    try:
        array = np.asarray(list(value) if given else value)
    except (ValueError, TypeError, OverflowError):
        array = np.array("ragged")
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError("whole numbers, one a pair")
    return array.astype(np.int64)


def _neurons(value: Any) -> Any:
    """Neurons by layer and place, ``[neuron, 2]``, or as a mask ``[layer, neuron]``; anything else is refused."""
    given = isinstance(value, Iterable) and not isinstance(value, np.ndarray | str | bytes)
    try:
        array = np.asarray(list(value) if given else value)
    except (ValueError, TypeError, OverflowError):
        array = np.array("ragged")
    pairs = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] == 2
    if not (pairs or (array.dtype.kind == "b" and array.ndim == 2)) or not array.size:
        raise ValueError("a list of (layer, neuron), or a boolean mask [layer, neuron]")
    return array if array.dtype.kind == "b" else array.astype(np.int64)


def _task(value: Any) -> Any:
    """A task of ours, or anything else that has what tasks are asked for."""
    missing = [name for name in TASK if not hasattr(value, name)]
    if missing or isinstance(value, type):
        raise ValueError(f"a task (memgen_lens.tasks), or an object with {', '.join(missing or TASK)}")
    return value


def _is_not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not True or False")
    return value


_Plain = BeforeValidator(_plain)
_Number = BeforeValidator(lambda value: _is_not_bool(_plain(value)))
_Several = BeforeValidator(_several)
_AtLeastOne = Field(min_length=1)

Count = Annotated[int, Field(ge=1, le=MAX_COUNT), _Number]
Number0 = Annotated[int, Field(ge=0, le=MAX_COUNT), _Number]
"""A number of things of which there may be none."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), _Number]
Flag = Annotated[bool, _Plain]
Text = Annotated[str, _Plain]
Share = Annotated[float, Field(gt=0, le=1), _Number]
OpenShare = Annotated[float, Field(gt=0, lt=1), _Number]
Part = Annotated[float, Field(ge=0, lt=1), _Number]
"""A share that may be none."""
Probability = Annotated[float, Field(ge=0, le=1), _Number]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
Texts = Annotated[list[Text], _Several]
Lines = Annotated[list[Text], _Several, BeforeValidator(_no_text)]
"""Texts that are refused where they are one."""
Listing = Annotated[list[Any], _Several]
Shares = Annotated[list[Share], _AtLeastOne, _Several]
Parts = Annotated[list[Part], _Several]
Positives = Annotated[list[Positive], _AtLeastOne, _Several]
Layers = Annotated[list[Number0], _Several]
Indices = Annotated[list[Number0], _AtLeastOne, _Several]
Counts = Annotated[list[Count], _AtLeastOne, _Several]
Index = Annotated[Any, BeforeValidator(_index)]
Neurons = Annotated[Any, BeforeValidator(_neurons)]
TaskLike = Annotated[Any, BeforeValidator(_task)]
Callback = Annotated[Callable[..., Any], _Plain]
SplitName = Annotated[Split, _Plain]
PairSplitName = Annotated[Literal["select", "tune", "test"], _Plain]
DirectionName = Annotated[Direction, _Plain]
ModeName = Annotated[ScoredMode, _Plain]
"""Modes for which nothing is fitted."""
KindName = Annotated[FittedKind, _Plain]
SweptModeName = Annotated[ScoredMode | FittedKind, _Plain]
"""Modes that are swept: those whose neurons scores choose."""
SweptModeNames = Annotated[list[SweptModeName], _AtLeastOne, _Several]
AblationName = Annotated[Ablation, _Plain]
PositionsName = Annotated[Positions, _Plain]
PositionsNames = Annotated[list[PositionsName], _AtLeastOne, _Several]


def place(call: str) -> Any:
    """A path, with ``~`` for the user's folder; what is none is refused in the name of the call."""
    return Annotated[Path, BeforeValidator(lambda value: user_path(value, call=call))]


def one(kind: type) -> Any:
    """An object of a class of ours."""

    def checked(value: Any) -> Any:
        if not isinstance(value, kind):
            how = f"as {MADE_BY[kind.__name__]} gives it" if kind.__name__ in MADE_BY else f"({kind.__module__})"
            raise ValueError(f"{kind.__name__} {how}")
        return value

    return Annotated[Any, BeforeValidator(checked)]


def several(kind: Any) -> Any:
    """A list of such values, at least one, or one of them."""
    return Annotated[list[kind], _AtLeastOne, _Several]


def arguments(
    call: str | None = None, /, *, error: type[MemgenError] = SettingsError, **kinds: Any
) -> Callable[[F], F]:
    """Check and convert the arguments of a public function before it runs.

    Args:
        call: What the error calls the function; default: its name.
        error: Class of the error.
        **kinds: By argument, what it may be: one of this module's kinds, ``X | None``, or any type that pydantic knows.

    Raises (when the function is called):
        MemgenError: An argument is none of that, missing, or unknown; of the class ``error``.
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
            except TypeError as wrong:
                raise error(
                    name,
                    expected=f"arguments ({', '.join(shape.parameters)})",
                    received=str(wrong),
                    fix="Change the call.",
                ) from None
            for argument in [name for name in kinds if name in bound.arguments]:
                try:
                    bound.arguments[argument] = adapter(argument).validate_python(bound.arguments[argument])
                except ValidationError as wrong:
                    raise _refusal(error, name, argument, wrong, bound.arguments[argument]) from None
            return function(*bound.args, **bound.kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate


def _refusal(kind: type[MemgenError], call: str, argument: str, error: ValidationError, value: Any) -> MemgenError:
    """Pydantic's complaint as one sentence of ours; an error of ours that it wraps stays what it was."""
    problems = error.errors(include_url=False)
    for problem in problems:
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, MemgenError):
            return cause
    expected = " or ".join(dict.fromkeys(map(_expected, problems[:3])))
    received = shortened(problems[0]["input"] if problems[0]["loc"] else value)
    return kind(f"{call}({argument}=...)", expected=expected, received=received, fix=f"Change {argument}.")


def _expected(problem: Any) -> str:
    """What pydantic would have taken, without the beginnings of its sentences."""
    if problem["type"] == "too_short":
        return "at least one value"
    return problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")

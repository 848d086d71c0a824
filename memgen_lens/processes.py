"""The processes of one run, as `accelerate launch` (or torchrun) starts them: which one this is, what they tell others.

A process that was not started so is alone: it starts no group, and whatever is done here is done by it as if this
module were not there. Does not know models, training nor analysis; torch and accelerate are loaded by the first of
several processes that asks.

The group is accelerate's (`accelerate.PartialState`): gloo on processors, nccl on CUDA cards, one card a process; it
waits half an hour (nccl: ten minutes) for a machine that is no longer there. A second group, of gloo, carries what is
told, and waits as long as the first process works for itself. A process that dies closes its connections, which the
others see at once.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from memgen_lens.core.errors import MemgenError, ProcessError, SettingsError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for what another tells it."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        count: How many.
        rank: Which one this is, from 0.
        local: Which one of its machine.
    """

    count: int = 1
    rank: int = 0
    local: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes, measures and shows progress."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This process's part of some things, consecutive ones; the parts in the order of ranks are all of them.

        >>> [list(World(2, rank).share(range(5))) for rank in (0, 1)]
        [[0, 1], [2, 3, 4]]
        """
        return things[len(things) * self.rank // self.count : len(things) * (self.rank + 1) // self.count]


ALONE = World()


class _Group:
    """What this process knows of the others, once it has joined them."""

    world: World | None = None
    told_by: Any = None
    """The group of gloo."""
    lost: ProcessError | None = None
    working_alone = 0


def is_launched() -> bool:
    """Whether accelerate or torchrun has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")


def world(call: str, device: str = "cpu") -> World:
    """The processes of this run; joins them the first time.

    Args:
        call: Who asks, for errors.
        device: What is computed on: the group is of nccl on CUDA, else of gloo.

    Raises:
        SettingsError: What accelerate or torchrun sets in the environment is incomplete.
        ProcessError: Another process has died.
    """
    if _Group.working_alone or not is_launched():
        return ALONE
    if _Group.lost is not None:
        raise _Group.lost
    if _Group.world is None:
        _Group.world = _joined(call, device)
    return _Group.world


def own_device(call: str, device: str) -> str:
    """The device of this process where the run's is ``device``: of CUDA cards, the one with its number.

    Raises:
        SettingsError: A card is named by its number, for several processes.
    """
    here = world(call, device)
    if here.is_alone or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise SettingsError(
            f"{call} in {here.count} processes",
            expected="device='cuda', of which each process takes the card with its own number",
            received=repr(device),
            fix="Leave the number out.",
        )
    return f"cuda:{here.local}"


def require_alone(call: str, *, why: str) -> None:
    """Refuse what one process has to do.

    Raises:
        SettingsError: This process was started as one of several.
    """
    if is_launched() and not _Group.working_alone:
        raise SettingsError(
            call,
            expected="one process",
            received=f"one of {os.environ['WORLD_SIZE']}, as accelerate launch or torchrun starts them",
            fix=why,
        )


def require_same(call: str, what: Any) -> None:
    """Refuse to go on where processes are not about to do the same.

    Args:
        call: What this process is about to do.
        what: All that must be alike: plain values.

    Raises:
        SettingsError: They differ.
    """
    if world(call).is_alone:
        return
    others = gathered(call, (call, what))
    if any(other != (call, what) for other in others):
        different = next(rank for rank, other in enumerate(others) if other != others[0])
        raise SettingsError(
            call,
            expected="the same call with the same arguments in every process",
            received=f"another one in process {different} than in the first",
            fix="Let every process run the same script, and keep what the first alone does away from this call.",
        )


def by_first(call: str, work: Callable[[], T]) -> T:
    """Have the first process do something; all others wait, and get what it returns (a copy) or what it raises.

    Inside ``work`` the first is alone: what it calls is not shared out.

    Raises:
        ProcessError: The first has died, or has failed by an error that is not ours.
    """
    here = world(call)
    if here.is_alone:
        return work()
    value: Any = None
    error: Exception | None = None
    if here.is_first:
        value, error = _attempted(work)
    sent = b""
    if error is None:
        try:
            sent = pickle.dumps((value, None))
        except Exception as unfit:  # then all are told, in place of being left to wait
            error = unfit
    if error is not None:
        sent = pickle.dumps((None, _told(call, here, error)))
    box: list[Any] = [sent]
    with _answered(call):
        _distributed().broadcast_object_list(box, src=0, group=_Group.told_by)
    if error is not None:
        raise error
    if here.is_first:
        return value
    value, told = pickle.loads(box[0])
    if told is not None:
        raise told
    return value


@contextmanager
def held_by_first(call: str, context: AbstractContextManager[T]) -> Iterator[T]:
    """Inside the block the first process holds a context; all get its value, or the error of entering it."""
    with ExitStack() as held:
        yield by_first(call, lambda: held.enter_context(context))


def together(call: str, work: Callable[[], T]) -> T:
    """Have each process do its part, in which it is alone; an error of one is raised in all.

    Raises:
        ProcessError: Another has died, or has failed by an error that is not ours.
    """
    here = world(call)
    if here.is_alone:
        return work()
    value, error = _attempted(work)
    told = gathered(call, None if error is None else _told(call, here, error))
    if error is not None:
        raise error
    for other in told:
        if other is not None:
            raise other
    return value


def gathered(call: str, value: T) -> list[T]:
    """What each process gives here, in the order of ranks, in every process.

    Raises:
        ProcessError: Another process has died.
    """
    here = world(call)
    if here.is_alone:
        return [value]
    found: list[Any] = [None] * here.count
    with _answered(call):
        _distributed().all_gather_object(found, value, group=_Group.told_by)
    return found


def sum_up(call: str, tensor: Any) -> None:
    """Sum a tensor over all processes, in place: the same bits in every one of them.

    Raises:
        ProcessError: Another process has died.
    """
    if world(call).is_alone:
        return
    with _answered(call):
        distributed = _distributed()
        fits = tensor.is_cuda or distributed.get_backend() == "gloo"
        distributed.all_reduce(tensor, group=None if fits else _Group.told_by)


def _attempted(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    _Group.working_alone += 1
    try:
        return work(), None
    except Exception as error:
        return None, error
    finally:
        _Group.working_alone -= 1


def _told(call: str, here: World, error: Exception) -> MemgenError:
    """An error as other processes raise it."""
    if isinstance(error, MemgenError):
        return error
    return ProcessError(
        call,
        expected=f"all {here.count} processes to go on",
        received=f"an error in process {here.rank}: {type(error).__name__}: {error}",
        fix="Mend it, and start all processes again; training goes on with resume=True (--resume).",
    )


@contextmanager
def _answered(call: str) -> Iterator[None]:
    """Tell that another process has gone, where torch says that a connection has."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0].rpartition("] ")[2].partition(". This is")[0]  # gloo's, without file and line
        _Group.lost = ProcessError(
            call,
            expected=f"an answer of all {_Group.world.count if _Group.world else 'the'} processes of the run",
            received=f"none of one that has died or ended ({said[:120]})",
            fix="What was written is kept: start all of them again, and training goes on from its newest checkpoint "
            "with resume=True (--resume).",
        )
        _leave()  # so that those who wait for this one are told, too, whatever it does next
        raise _Group.lost from None


def _joined(call: str, device: str) -> World:
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingsError(
            call,
            expected="the environment that accelerate launch or torchrun sets for each of several processes",
            received=f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            fix="Start the script by accelerate launch or torchrun, or unset WORLD_SIZE for one process.",
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not device.startswith("cuda"))
        count = state.num_processes
        _Group.told_by = _distributed().new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            call,
            expected=f"{os.environ['WORLD_SIZE']} processes that find each other",
            received=str(error).splitlines()[0][:200],
            fix="Start all of them, by accelerate launch or torchrun; on several machines with one address and port.",
        ) from None
    if str(count) != os.environ["WORLD_SIZE"].strip():
        raise SettingsError(
            call,
            expected=f"accelerate to know of {os.environ['WORLD_SIZE']} processes",
            received=f"a PartialState or Accelerator, made before, that knows of {count}",
            fix="Make it with cpu=True where device is 'cpu', or leave it to memgen_lens.",
        )
    atexit.register(_leave)
    return World(count, state.process_index, state.local_process_index)


def _leave() -> None:
    """Close this process's connections; nccl's only where nobody has died, as closing them can wait for the dead."""
    _Group.told_by = None
    distributed = _distributed()
    if distributed.is_initialized() and (_Group.lost is None or distributed.get_backend() == "gloo"):
        with suppress(Exception):
            distributed.destroy_process_group()


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed

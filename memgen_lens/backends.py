"""Where many runs go: joblib's own workers, a dask cluster or ray, and how many threads each run gets.

Does not know what is run. Nothing is scheduled here: joblib and what stands behind it do that.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import joblib
from joblib.parallel import get_active_backend

from memgen_lens.core.errors import SettingsError

Backend = Literal["loky", "dask", "ray"]
CALL = "run_many"


@dataclass(frozen=True)
class Engine:
    """What runs go to while it is open.

    Attributes:
        name: joblib's name of it, or its class.
        n_jobs: Runs at once.
        threads: Threads of each.
        streams: Whether results can be had as they come.
    """

    name: str
    n_jobs: int
    threads: int
    streams: bool

    def parallel(self, n_tasks: int) -> joblib.Parallel:
        """A `joblib.Parallel` for that many tasks, one at a time to each worker."""
        n_jobs = min(self.n_jobs, n_tasks)
        how: dict[str, Any] = {"n_jobs": self.n_jobs, "batch_size": 1}
        if self.name == "loky":
            # One at a time, but in a process of its own: joblib would run a single job here, where its death is ours.
            how |= {"n_jobs": max(n_jobs, 2), "pre_dispatch": n_jobs}
        return joblib.Parallel(return_as="generator_unordered" if self.streams else "list", **how)


@contextmanager
def opened(
    backend: Backend | None, address: str | None, *, n_jobs: int | None, threads: int | None, n_runs: int
) -> Iterator[Engine]:
    """Open a place for runs: that of ``joblib.parallel_config`` around the call, where none is named; else loky.

    Args:
        backend: ``"loky"``, ``"dask"`` or ``"ray"``.
        address: Of a dask scheduler or a ray cluster that is running; else one is started on this machine.
        n_jobs: Runs at once.
        threads: Threads of each run.
        n_runs: How many there are.

    Raises:
        SettingsError: ``n_jobs x threads`` is more than this machine has cores; the backend is not installed, is one
            of threads, or ignores what was asked for.
    """
    if address is not None and backend not in ("dask", "ray"):
        raise SettingsError(
            f"{CALL}(address=...)",
            expected="backend='dask' or 'ray' beside it",
            received=f"backend={backend!r}",
            fix="Name the backend that the address is of, or leave the address out.",
        )
    around, n_around = get_active_backend()
    jobs_around = n_around if isinstance(n_around, int) else None
    kind = type(around).__name__
    if backend is None and kind != "LokyBackend":
        yield _around(around, kind, jobs_around, n_jobs, threads)
        return
    if address is not None:
        cores = None
    else:
        cores = joblib.cpu_count()
        n_jobs, threads = shared_out(n_jobs or (jobs_around if backend is None else None), threads, cores, n_runs)
    with ExitStack() as stack:
        if backend == "dask":
            n_jobs = _dask(stack, address, n_jobs)
        elif backend == "ray":
            n_jobs = _ray(stack, address, n_jobs, threads or 1)
        else:
            stack.enter_context(joblib.parallel_config(backend="loky", inner_max_num_threads=threads))
        yield Engine(backend or "loky", n_jobs or 1, threads or 1, streams=backend != "ray")


def shared_out(n_jobs: int | None, threads: int | None, cores: int, n_runs: int) -> tuple[int, int]:
    """Runs at once and threads of each, so that both together are no more than the cores.

    Where neither is asked for, each run has one thread, whatever the number of runs: training depends on it.

    Raises:
        SettingsError: They are more.
    """
    if n_jobs is not None and n_jobs < 0:  # joblib's way to say "all but ..."
        n_jobs = max(1, cores + 1 + n_jobs)
    if threads is None:
        threads = max(1, cores // n_jobs) if n_jobs else 1
    if n_jobs is None:
        n_jobs = max(1, min(cores // threads, n_runs))
    if n_jobs * threads > cores:
        raise SettingsError(
            f"{CALL}(n_jobs=..., threads=...)",
            expected=f"n_jobs x threads of at most {cores}, the cores of this machine",
            received=f"{n_jobs} x {threads}",
            fix="Lower either; more threads than cores wait for each other.",
        )
    return n_jobs, threads


def _around(backend: Any, kind: str, jobs_around: int | None, n_jobs: int | None, threads: int | None) -> Engine:
    """What ``joblib.parallel_config`` around the call has set."""
    if kind == "ThreadingBackend":
        raise SettingsError(
            CALL,
            expected="a backend of processes: loky, dask or ray",
            received="joblib's backend of threads",
            fix="Leave out parallel_config(backend='threading'); a run's threads and seeds are its process's.",
        )
    if kind == "SequentialBackend":
        return Engine(kind, 1, threads or 1, streams=True)
    if kind == "DaskDistributedBackend":
        _one_thread_each(backend.client)
        _only_workers(n_jobs)
    asked = n_jobs or jobs_around or -1
    return Engine(kind, asked, threads or 1, streams=backend.supports_return_generator)


def _dask(stack: ExitStack, address: str | None, n_jobs: int | None) -> int:
    _require("dask", "distributed")
    import dask  # pyright: ignore[reportMissingImports]
    from dask.distributed import Client, LocalCluster  # pyright: ignore[reportMissingImports]

    if address is None:
        # A run that kills its worker is tried again by us, alone; dask would hand it on to three others.
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
        cluster = stack.enter_context(LocalCluster(n_workers=n_jobs, threads_per_worker=1, dashboard_address=None))
        client = stack.enter_context(Client(cluster))
        client.wait_for_workers(n_jobs)
    else:
        _only_workers(n_jobs)
        try:
            client = stack.enter_context(Client(address, timeout=30))
        except (OSError, ValueError) as error:
            raise _nobody(address, error) from None
        _one_thread_each(client)
    stack.enter_context(joblib.parallel_config(backend="dask"))
    return max(1, sum(client.ncores().values()))


def _ray(stack: ExitStack, address: str | None, n_jobs: int | None, threads: int) -> int:
    _require("ray", "ray")
    import ray  # pyright: ignore[reportMissingImports]
    from ray.util.joblib import register_ray  # pyright: ignore[reportMissingImports]

    if not ray.is_initialized():
        where: dict[str, Any] = {"address": address} if address else {"num_cpus": (n_jobs or 1) * threads}
        try:
            ray.init(include_dashboard=False if address is None else None, log_to_driver=False, **where)
        except (OSError, ValueError) as error:
            raise _nobody(address or "here", error) from None
        stack.callback(ray.shutdown)
    register_ray()
    n_jobs = n_jobs or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
    stack.enter_context(joblib.parallel_config(backend="ray", ray_remote_args={"num_cpus": threads}))
    return n_jobs


def _require(extra: str, package: str) -> None:
    if find_spec(package) is None:
        raise SettingsError(
            f"{CALL}(backend={extra!r})",
            expected=f"the package {package}",
            received="none",
            fix=f'pip install "memgen-lens[{extra}]"',
        )


def _only_workers(n_jobs: int | None) -> None:
    if n_jobs is not None:
        raise SettingsError(
            f"{CALL}(n_jobs=...)",
            expected="none beside a dask cluster that is running",
            received=str(n_jobs),
            fix="Leave it out: as many runs go at once as the cluster has workers.",
        )


def _one_thread_each(client: Any) -> None:
    several = {worker: n for worker, n in client.nthreads().items() if n > 1}
    if several:
        raise SettingsError(
            CALL,
            expected="dask workers of one thread each, as a run's threads and seeds are its process's",
            received=f"{len(several)} of {max(several.values())} threads",
            fix="Start them by dask worker --nthreads 1, or LocalCluster(threads_per_worker=1).",
        )


def _nobody(address: str, error: Exception) -> SettingsError:
    return SettingsError(
        f"{CALL}(address={address!r})",
        expected="a cluster that answers",
        received=f"{type(error).__name__}: {error}",
        fix="Check the address, and whether the cluster is up.",
    )

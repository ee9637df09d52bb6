"""Shard work over Prefect's task runners, by `runtime.runner`; `none` is the core's own pool.

A task takes a bundle of shards, so that Prefect's tenth of a second a task is nothing beside it.
Which shards there are and what they become is settled below (`wsss_core.stages.resume`), and every
worker computes with one thread, so all runners give the same bytes. A runner is open for one stage:
its processes are gone while a network trains.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from wsss_core.config import RuntimeConfig
from wsss_core.errors import ContaError, InputError
from wsss_core.observe import Recorder
from wsss_core.stages.shards import split_shards
from wsss_core.workers import (
    ShardMap,
    map_shards,
    num_items,
    one_thread,
    release_memory,
    start_worker,
)

Shard = TypeVar("Shard")
Result = TypeVar("Result")

SHARDS_A_TASK = 16
"""384 photos: at 320 px 69 s of dense CRF (0.18 s a photo) or four minutes of CAMs (0.63 s)."""

DASK_WAIT_S = 60.0
_Runner = TaskRunner[Any]


def choose_shard_map(home: Path, runtime: RuntimeConfig) -> ShardMap:
    """Where a run of this home has its shards computed."""
    return map_shards if runtime.runner == "none" else RunnerMap(home, runtime)


class RunnerMap:
    """`map_shards` over one of Prefect's task runners."""

    def __init__(self, home: Path, runtime: RuntimeConfig) -> None:
        self._home, self._runtime = home, runtime

    def __call__(
        self,
        function: Callable[[Shard], Result],
        shards: Sequence[Shard],
        *,
        workers: int,
        recorder: Recorder,
        what: str,
    ) -> Iterator[Result]:
        """Results of `function` in the order of `shards`, a bundle of them a task.

        Args:
            function: A function of a module, or a `functools.partial` of one; it and its result
                must pickle.
            shards: What each call gets; see `map_shards`.
            workers: Number of threads or processes; a Dask cluster at an address has its own.
            recorder: Hears of the progress after each bundle.
            what: Names the work in the progress, in errors and on Prefect's page.

        Yields:
            One result a shard.

        Raises:
            ContaError: If a worker died or does not see the home, or what `function` raises.
        """
        if not shards:
            return
        size = min(SHARDS_A_TASK, math.ceil(len(shards) / workers))
        bundles = split_shards(shards, size=size)
        done, total = 0, sum(map(num_items, shards))
        # the mark goes first: without it, workers stop after the shard that they are at
        with self._open(workers) as runner, _mark_home(self._home) as mark:
            if self._runtime.runner == "dask":
                _prove_dask(runner, mark, self._runtime.dask_address)
            futures = []
            for number, bundle in enumerate(bundles, start=1):
                named = compute_bundle.with_options(
                    task_run_name=f"{what} {number} of {len(bundles)}"
                )
                work = functools.partial(_compute, function, bundle, mark)
                futures.append(runner.submit(named, parameters={"work": work}))
            for bundle, future in zip(bundles, futures, strict=True):
                for shard, result in zip(bundle, self._wait(future, what), strict=True):
                    done += num_items(shard)
                    recorder.progress(what, done, total)
                    yield result

    def _wait(self, future: Any, what: str) -> Any:
        try:
            return future.result()
        except (ContaError, OSError):
            raise  # of the shard, and says which
        except Exception as error:
            raise ContaError(
                f"runner {self._runtime.runner!r} lost shards of {what} "
                f"({type(error).__name__}: {error}); run again, finished shards are kept, "
                "with fewer runtime.workers if it was for want of memory"
            ) from error

    def _open(self, workers: int) -> contextlib.AbstractContextManager[_Runner]:
        if self._runtime.runner == "thread":
            return ThreadPoolTaskRunner(max_workers=workers)
        if self._runtime.runner == "process":
            return ProcessPoolTaskRunner(max_workers=workers, initializer=start_worker)
        return _open_dask(workers, self._runtime.dask_address)


@task(name="shards", cache_policy=NO_CACHE, persist_result=False)
def compute_bundle(work: Callable[[], list[Any]]) -> list[Any]:
    """Results of a bundle of shards; `work` is opaque, or Prefect would look into every photo."""
    return work()


def _compute(
    function: Callable[[Shard], Result], bundle: Sequence[Shard], mark: Path
) -> list[Result]:
    results = []
    for shard in bundle:
        see_home(mark)
        try:
            with one_thread():
                results.append(function(shard))
        finally:
            release_memory()
    return results


def see_home(mark: Path) -> None:
    """Make sure that this worker sees the home, and that the run still wants its results.

    Raises:
        InputError: If the run's mark is not there.
    """
    if not mark.exists():
        raise InputError(
            f"the worker in host {socket.gethostname()}, pid {os.getpid()} finds no {mark}: "
            "the run has ended, or CONTA_HOME is another folder there; mount the same one"
        )


@contextlib.contextmanager
def _mark_home(home: Path) -> Iterator[Path]:
    """A file that says, to all who see the home, that a run waits for shards."""
    mark = home / "scratch" / f".waiting-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_dask(workers: int, address: str | None) -> Iterator[_Runner]:
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise InputError(
            "runtime.runner is 'dask', but prefect-dask is not installed; install the extra "
            "`dask` (make setup has it), or set runtime.runner: process"
        ) from None
    local = {
        "n_workers": workers,
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": None,  # it asks nobody for a password
        "memory_limit": None,
    }
    with DaskTaskRunner(address=address, cluster_kwargs=None if address else local) as runner:
        yield runner


def _prove_dask(runner: Any, mark: Path, address: str | None) -> None:
    """Have every worker that is there look for the mark before any gets a shard."""
    try:
        runner.client.wait_for_workers(1, timeout=DASK_WAIT_S)
    except (OSError, TimeoutError) as error:
        raise InputError(
            f"no Dask worker answers at {address or 'the local cluster'} ({error}); "
            "start the scheduler and its workers, or set runtime.dask_address"
        ) from error
    runner.client.run(see_home, mark)

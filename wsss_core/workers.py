"""Child processes: started in one place, alive no longer than their parent.

Shard work (CAM, CRF, prediction) runs in processes of one thread each, so that its bits do not
depend on how many there are. The pool forks from a server that has imported torch once: a worker
is up in milliseconds instead of the seven seconds of a fresh import.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol, TypeVar

from wsss_core.errors import ContaError
from wsss_core.observe import Recorder

Shard = TypeVar("Shard")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _MOST = -1, -4, 2**31 - 1  # glibc's malloc.h
_GRACE_S = 10.0
_PRELOADED = ("torch", "torchvision", "timm")

_pools: dict[int, ProcessPoolExecutor] = {}


class ShardMap(Protocol):
    """What `map_shards` does, perhaps on other machines."""

    def __call__(
        self,
        function: Callable[[Shard], Result],
        shards: Sequence[Shard],
        *,
        workers: int,
        recorder: Recorder,
        what: str,
    ) -> Iterator[Result]:
        """Results of `function` in the order of `shards`; see `map_shards`."""


def map_shards(
    function: Callable[[Shard], Result],
    shards: Sequence[Shard],
    *,
    workers: int,
    recorder: Recorder,
    what: str,
) -> Iterator[Result]:
    """Results of `function` in the order of `shards`, from processes of one torch thread each.

    At most two shards a worker are under way, so results never pile up before a slow consumer. The
    processes stay for the next call.

    Args:
        function: A function of a module, or a `functools.partial` of one; it and its result must
            pickle.
        shards: What each call gets. A list or tuple counts as its length in the progress, anything
            else as one.
        workers: Number of processes; 1 computes in this process, with one torch thread too.
        recorder: Hears of the progress after each shard.
        what: Names the work in the progress and in errors.

    Yields:
        One result a shard.

    Raises:
        ContaError: If a worker process died. What `function` raises is raised here.
    """
    done, total = 0, sum(map(num_items, shards))
    results = (
        _map_in_pool(function, shards, workers, what)
        if workers > 1 and len(shards) > 1
        else _map_here(function, shards)
    )
    for shard, result in zip(shards, results, strict=True):
        done += num_items(shard)
        recorder.progress(what, done, total)
        yield result


def num_items(shard: object) -> int:
    """What a shard counts in the progress."""
    return len(shard) if isinstance(shard, (list, tuple)) else 1


def start_process(args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that dies, with all it started, when this process does, even by kill -9.

    A small watcher stands between: its pid is the one of the result, it hands SIGTERM and SIGINT on
    to the program's process group, kills what has not ended ten seconds later, and ends with it.

    Args:
        args: The command.
        options: Passed on to `subprocess.Popen`.
    """
    watcher = [sys.executable, "-m", "wsss_core.workers", str(os.getpid())]
    return subprocess.Popen([*watcher, *args], start_new_session=True, **options)


def fork_server(function: Callable[..., Any]) -> ForkServerContext:
    """Where processes for `function` come from, with all that is slow to import.

    What the first call asks for is there from then on; later ones get the same server.
    """
    while isinstance(function, functools.partial):
        function = function.func
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, function.__module__])
    return context


def die_with_parent() -> None:
    """Make this process, a worker of `multiprocessing`, end when its results are wanted no more.

    A worker's parent in the kernel's eyes is the fork server, so the pipe to the process that
    wants the results is watched as well.
    """
    _ask_kernel()  # at once, even in the middle of a C call
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.join,), daemon=True).start()


def keep_memory() -> None:
    """Have glibc keep the memory of this process's big arrays for the next ones.

    It hands each of them back by itself, and the kernel fills the next with zeros, page by page:
    two fifths of a CAM's time. Where the C library is another one, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def release_memory() -> None:
    """Give back what glibc keeps and nothing uses, so that photos of many sizes do not pile up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def start_worker() -> None:
    """Prepare a process of a pool for shard work."""
    die_with_parent()
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone: more of them would change the last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ask_kernel() -> None:
    """Have Linux kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_after(wait: Callable[[], None]) -> None:
    wait()
    os._exit(1)


def _map_here(function: Callable[[Shard], Result], shards: Sequence[Shard]) -> Iterator[Result]:
    for shard in shards:
        with one_thread():
            result = _compute(function, shard)
        yield result


def _map_in_pool(
    function: Callable[[Shard], Result], shards: Sequence[Shard], workers: int, what: str
) -> Iterator[Result]:
    pool = _pool(workers, function)
    waiting: deque[Future[Result]] = deque()
    try:
        for shard in shards:
            waiting.append(pool.submit(_compute, function, shard))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        _pools.pop(workers, None)
        raise ContaError(
            f"a worker process died during {what}, perhaps for want of memory; "
            f"run again with fewer than runtime.workers={workers}"
        ) from None
    except (KeyboardInterrupt, SystemExit):
        _close_pools()
        raise
    finally:
        for future in waiting:
            future.cancel()


def _compute(function: Callable[[Shard], Result], shard: Shard) -> Result:
    try:
        return function(shard)
    finally:
        release_memory()


def _pool(workers: int, function: Callable[..., Any]) -> ProcessPoolExecutor:
    if workers not in _pools:
        _pools[workers] = ProcessPoolExecutor(
            workers, mp_context=fork_server(function), initializer=start_worker
        )
    return _pools[workers]


@atexit.register
def _close_pools() -> None:
    """End the workers, in mid-shard if need be."""
    while _pools:
        _, pool = _pools.popitem()
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def _watch(parent: int, command: Sequence[str]) -> int:
    """Run `command` in a process group of its own, and kill that once `parent` is gone."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    end = math.inf
    # the watcher has one thread, so that calling Python between fork and exec is safe
    with subprocess.Popen(command, process_group=0, preexec_fn=_ask_kernel) as process:
        while process.poll() is None and os.getppid() == parent and time.monotonic() < end:
            while received:
                _signal_group(process.pid, received.pop())
                end = min(end, time.monotonic() + _GRACE_S)
            time.sleep(0.1)
        _signal_group(process.pid, signal.SIGKILL)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2:]))

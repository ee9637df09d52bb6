"""Training on several devices of a host: what one would do, a slice of each batch on each.

Every rank holds the whole model and takes its slice of each global batch. Counts, losses and
gradients are summed over the ranks, so that a step is that of the whole batch, but for the order of
its sums. Ranks are child processes and end with their parent: gloo on CPU, nccl on CUDA.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wsss_core.errors import ContaError
from wsss_core.observe import Recorder, SilentRecorder
from wsss_core.workers import die_with_parent, fork_server, keep_memory

Item = TypeVar("Item")


def rank() -> int:
    """Number of this process among those that train together; 0 if it trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def take_slice(batch: Sequence[Item]) -> Sequence[Item]:
    """This rank's slice of a global batch.

    A batch with fewer items than there are ranks goes whole to each of them: sums and counts grow
    alike, and a mean over the ranks stays what it is.
    """
    if not dist.is_initialized() or len(batch) < dist.get_world_size():
        return batch
    num = dist.get_world_size()
    return batch[rank() * len(batch) // num : (rank() + 1) * len(batch) // num]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's values, detached; every rank has to ask."""
    if not dist.is_initialized():
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients by their sums over the ranks; frozen parameters have none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not dist.is_initialized() or not gradients:
        return
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    parts = torch.split(total, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def run_ranks(
    work: Callable[[torch.device, Recorder], object],
    *,
    devices: Sequence[torch.device],
    recorder: Recorder,
    what: str,
) -> None:
    """Do `work` in one process a device, which sum over each other; returns when all are done.

    Args:
        work: A `functools.partial` of a module's function; called in rank r with device r and a
            recorder. It and what it holds must pickle.
        devices: All of one kind; the same CPU may occur several times.
        recorder: Hears what rank 0's recorder is told.
        what: Names the work in errors.

    Raises:
        ContaError: If a rank died. What `work` raises in any of them is raised here.
    """
    # By value: what the pipes of `multiprocessing` do with tensors is to share them, and each rank
    # trains its own.
    parcel = pickle.dumps(work)
    ranks = []
    with tempfile.TemporaryDirectory(prefix="conta-ranks-") as folder:
        try:
            for number, device in enumerate(devices):
                here, there = connection.Pipe()
                place = (number, len(devices), device, Path(folder) / "meeting")
                process = fork_server(work).Process(target=_be_rank, args=(there, *place))
                process.start()
                there.close()
                ranks.append((process, here))
            for _, pipe in ranks:
                _send(pipe, parcel)
            _listen([pipe for _, pipe in ranks], recorder, what)
        finally:
            for process, pipe in ranks:
                process.kill()
                process.join()
                pipe.close()


def _send(pipe: Connection, parcel: bytes) -> None:
    try:
        pipe.send_bytes(parcel)
    except OSError:  # it is dead, which `_listen` will hear
        return


def _listen(pipes: list[Connection], recorder: Recorder, what: str) -> None:
    """Hand on what the ranks say until each has said that it is done."""
    while pipes:
        said = [(pipe, _receive(pipe, what)) for pipe in connection.wait(pipes)]
        errors = [word for _, word in said if isinstance(word, Exception)]
        if errors:
            # when a rank fails, the others only see that it no longer answers
            raise min(errors, key=lambda error: not isinstance(error, ContaError))
        for pipe, word in said:
            if word is None:
                pipes.remove(pipe)  # type: ignore[arg-type]
            else:
                name, arguments = word
                getattr(recorder, name)(*arguments)


def _receive(pipe: Any, what: str) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return ContaError(
            f"a process of {what} died, perhaps for want of memory; run the same command again, "
            "it goes on after the last whole epoch"
        )


def _be_rank(pipe: Connection, number: int, num: int, device: torch.device, meeting: Path) -> None:
    die_with_parent()
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    try:
        work = pipe.recv()
        _join(number, num, device, meeting)
        work(device, _PipeRecorder(pipe) if number == 0 else SilentRecorder())
        pipe.send(None)
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        error.add_note(traceback.format_exc())
        pipe.send(error)


def _join(number: int, num: int, device: torch.device, meeting: Path) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=number,
        world_size=num,
    )


class _PipeRecorder:
    """Says to the parent what its recorder is to hear."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def progress(self, what: str, done: int, total: int) -> None:
        self._pipe.send(("progress", (what, done, total)))

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._pipe.send(("scalars", (stage, step, dict(values))))

    def note(self, message: str) -> None:
        self._pipe.send(("note", (message,)))

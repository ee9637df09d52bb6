"""The loop: batches in a fixed order, one optimiser step each, the last epoch is the result.

Val data never chooses an epoch, a threshold or a setting, so the loop does not know it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from wsss_core.config import TrainingConfig
from wsss_core.errors import ContaError, DivergedError, InputError
from wsss_core.observe import Recorder, SilentRecorder
from wsss_core.seeding import torch_generator
from wsss_core.training.checkpoint import load_checkpoint, save_checkpoint
from wsss_core.training.distributed import (
    rank,
    run_ranks,
    sum_gradients,
    sum_over_ranks,
    take_slice,
)
from wsss_core.training.optim import build_optimizer, poly_factor, set_rates
from wsss_core.workers import die_with_parent, fork_server

Batch = dict[str, Any]
T = TypeVar("T")

_READERS = 4
"""Processes that read a training's photos for a GPU; each has some batches ready."""


@dataclass(frozen=True)
class Trainable:
    """What a stage wants trained; all but the model's weights must pickle to train in ranks.

    Attributes:
        name: Stage name, for messages and scalars.
        model: On CPU; moved to the device for training.
        new_parameters: Those that train at the head's rate; the rest is trunk.
        loss: `loss(model, batch)`, a scalar: the share of this rank's slice in the loss of the
            whole batch, so that the ranks' sum is that loss. None for a batch with nothing to learn
            from, which is skipped; all ranks have to agree.
        enter_training: Switches the model to training, frozen BatchNorm aside.
    """

    name: str
    model: nn.Module
    new_parameters: list[nn.Parameter]
    loss: Callable[[nn.Module, Batch], Tensor | None]
    enter_training: Callable[[nn.Module], None]


@dataclass(frozen=True)
class Machine:
    """How a training computes; what is trained does not depend on it, but for the last bits.

    Attributes:
        device: Where to train; of several, what kind.
        amp: bf16 autocast.
        threads: CPU threads; they change the last bits, so they are fixed.
        scratch: Folder of the checkpoints.
        recorder: Hears of every step and epoch.
        num_devices: How many share each batch; see `distributed`.
    """

    device: torch.device
    amp: bool
    threads: int
    scratch: Path
    recorder: Recorder
    num_devices: int = 1

    def devices(self) -> list[torch.device]:
        """One a rank."""
        if self.device.type == "cpu":
            return [self.device] * self.num_devices
        return [torch.device(self.device.type, index) for index in range(self.num_devices)]


def epoch_order(num_photos: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the photos; a pure function of its arguments."""
    order: list[int] = torch.randperm(
        num_photos, generator=torch_generator(seed, "order", epoch)
    ).tolist()
    return order


class _EpochBatches(Sampler[list[tuple[int, int]]]):
    """This rank's slices of the batches of every epoch still to do, so that one loader serves all.

    Yields (epoch, photo index).
    """

    def __init__(self, num_photos: int, batch_size: int, epochs: range, seed: int) -> None:
        self._num_photos, self._batch_size = num_photos, batch_size
        self._epochs, self._seed = epochs, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self._epochs:
            order = epoch_order(self._num_photos, seed=self._seed, epoch=epoch)
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                yield [(epoch, index) for index in take_slice(batch)]

    def __len__(self) -> int:
        return len(self._epochs) * math.ceil(self._num_photos / self._batch_size)


class _Views(Dataset[Batch | ContaError]):
    """An error with a line for the user is an item: the loader would wrap it in a traceback."""

    def __init__(self, view: Callable[[T, int], Batch], items: Sequence[T]) -> None:
        self.view, self._items = view, items

    def __getitem__(self, where: tuple[int, int]) -> Batch | ContaError:
        epoch, index = where
        try:
            return self.view(self._items[index], epoch)
        except ContaError as error:
            return error


def _collate(views: list[Batch | ContaError]) -> Batch | ContaError:
    for view in views:
        if isinstance(view, ContaError):
            return view
    batch: Batch = default_collate(views)
    return batch


def train(
    task: Trainable,
    *,
    items: Sequence[T],
    view: Callable[[T, int], Batch],
    config: TrainingConfig,
    seed: int,
    machine: Machine,
) -> list[dict[str, float]]:
    """Train in place, from the last checkpoint in `machine.scratch` if there is one.

    Args:
        task: Model and loss.
        items: Training photos, in a fixed order.
        view: Augmented view of an item in an epoch, a pure function; tensors of equal shape.
        config: Epochs, batch size, optimiser.
        seed: Decides the order of the photos.
        machine: Where and how.

    Returns:
        One record an epoch: `loss` (mean over its batches), `rate` (trunk, at its end), `skipped`
        batches.

    Raises:
        DivergedError: If a loss is not finite; names the batch and the rate.
        InputError: If BatchNorm is to learn on several devices, each of which sees a part.
    """
    if machine.num_devices == 1:
        return _train(task, items=items, view=view, config=config, seed=seed, machine=machine)
    task.enter_training(task.model)
    if any(isinstance(m, _BatchNorm) and m.training for m in task.model.modules()):
        raise InputError(
            f"with freeze_bn false {task.name} would learn from each device's part of a batch "
            f"alone; set freeze_bn true, or runtime.devices 1 instead of {machine.num_devices}"
        )
    silent = replace(machine, recorder=SilentRecorder())
    run_ranks(
        functools.partial(
            _train_rank, task, silent, items=items, view=view, config=config, seed=seed
        ),
        devices=machine.devices(),
        recorder=machine.recorder,
        what=f"the training of {task.name}",
    )
    return load_checkpoint(machine.scratch, task.model)


def _train_rank(
    task: Trainable, machine: Machine, device: torch.device, recorder: Recorder, **options: Any
) -> None:
    _train(task, machine=replace(machine, device=device, recorder=recorder), **options)


def _train(
    task: Trainable,
    *,
    items: Sequence[T],
    view: Callable[[T, int], Batch],
    config: TrainingConfig,
    seed: int,
    machine: Machine,
) -> list[dict[str, float]]:
    cuda = machine.device.type == "cuda"
    model = task.model.to(machine.device).to(memory_format=torch.channels_last)
    new = {id(p) for p in task.new_parameters}
    trunk = [p for p in model.parameters() if id(p) not in new]
    optimizer = build_optimizer(trunk, task.new_parameters, config)
    history = load_checkpoint(machine.scratch, model, optimizer)
    if history:
        machine.recorder.note(f"{task.name} goes on after epoch {len(history)} of {config.epochs}")
    readers = _READERS if cuda else 0
    sampler = _EpochBatches(len(items), config.batch_size, range(len(history), config.epochs), seed)
    loader = _load(_Views(view, items), sampler, seed=seed, readers=readers)
    per_epoch = math.ceil(len(items) / config.batch_size)
    # where the loader pins its batches
    place = torch.cuda.device(machine.device) if cuda else contextlib.nullcontext()
    with _threads(machine.threads), place:
        batches = iter(loader)
        for epoch in range(len(history), config.epochs):
            task.enter_training(model)
            record = _train_epoch(
                task,
                optimizer,
                itertools.islice(batches, per_epoch),
                epoch=epoch,
                num_batches=per_epoch,
                config=config,
                machine=machine,
            )
            history.append(record)
            if rank() == 0:
                save_checkpoint(machine.scratch, model, optimizer, history)
            machine.recorder.scalars(task.name, epoch, record)
    model.to("cpu")
    return history


def _load(
    views: _Views, sampler: Sampler[list[tuple[int, int]]], *, seed: int, readers: int
) -> DataLoader[Batch | ContaError]:
    """Batches of views, for a GPU from processes that read ahead, else (0) from this one."""
    return DataLoader(
        views,
        batch_sampler=sampler,
        collate_fn=_collate,
        generator=torch_generator(seed, "loader"),  # or it would draw from the global one
        num_workers=readers,
        pin_memory=readers > 0,
        multiprocessing_context=fork_server(views.view) if readers else None,
        worker_init_fn=_tie_to_parent,  # a rank that is killed cannot end them itself
    )


def _tie_to_parent(_worker: int) -> None:
    die_with_parent()


def _train_epoch(
    task: Trainable,
    optimizer: torch.optim.SGD,
    batches: Iterator[Batch | ContaError],
    *,
    epoch: int,
    num_batches: int,
    config: TrainingConfig,
    machine: Machine,
) -> dict[str, float]:
    skipped, total, started = 0, 0.0, time.monotonic()
    for index, batch in enumerate(batches):
        if isinstance(batch, ContaError):
            raise batch
        step, steps = epoch * num_batches + index, config.epochs * num_batches
        set_rates(optimizer, poly_factor(step, steps=steps, power=config.poly_power))
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.amp):
            loss = task.loss(task.model, _to_device(batch, machine.device))
        if loss is None:
            skipped += 1
            continue
        value = sum_over_ranks(loss).item()
        if not math.isfinite(value):
            rate = optimizer.param_groups[0]["lr"]
            raise DivergedError(
                f"the loss of {task.name} is {value} at epoch {epoch}, batch {index}, "
                f"rate {rate:.3g}; lower {task.name}.training.learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        sum_gradients(task.model.parameters())
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_norm)
        optimizer.step()
        total += value
        machine.recorder.progress(
            f"{task.name} epoch {epoch + 1}/{config.epochs}", index + 1, num_batches
        )
    return {
        "epoch": float(epoch),
        "loss": total / max(1, num_batches - skipped),
        "rate": float(optimizer.param_groups[0]["lr"]),
        "skipped": float(skipped),
        "seconds": round(time.monotonic() - started, 3),
    }


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            layout = torch.channels_last if value.dim() == 4 else torch.preserve_format
            moved[name] = value.to(device, non_blocking=True, memory_format=layout)
        else:
            moved[name] = value
    return moved


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

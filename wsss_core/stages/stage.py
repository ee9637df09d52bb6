"""What a stage is: settings and manifests in, one artifact in the store out.

The same question has the same key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wsss_core.config import Config, RuntimeConfig
from wsss_core.data.document import INDEX_FILE, read_dataset
from wsss_core.errors import ContaError, InputError
from wsss_core.observe import Recorder, SilentRecorder
from wsss_core.records import Dataset, Manifest
from wsss_core.seeding import derive_seed
from wsss_core.store import (
    Measured,
    Store,
    code_parts,
    code_stamp,
    plain,
    scratch_folder,
    stage_key,
)
from wsss_core.workers import ShardMap, keep_memory, map_shards, release_memory


@dataclass(frozen=True)
class Workspace:
    """Where a stage works and how it computes; nothing here changes a result.

    Attributes:
        home: CONTA_HOME, absolute.
        photos_root: Folder of the user's data; None for scenes, which live in the store.
        runtime: Device, threads and workers.
        recorder: Who hears of the progress.
        shard_map: Where shards of CAMs, masks and predictions are computed.
    """

    home: Path
    photos_root: Path | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    recorder: Recorder = field(default_factory=SilentRecorder)
    shard_map: ShardMap = map_shards

    @property
    def store(self) -> Store:
        """The artifacts of this home."""
        return Store(self.home / "store")

    def folder(self, manifest: Manifest) -> Path:
        """Where an artifact's files are."""
        return self.store.folder(manifest)

    def data_root(self, data: Manifest) -> Path:
        """The folder that the photo files of a data manifest are relative to."""
        if data.stage == "scenes":
            return self.folder(data)
        if self.photos_root is None:
            raise InputError(
                "this data set needs the folder of its photos; give it with --data DIR (data.root)"
            )
        return self.photos_root

    def dataset(self, data: Manifest) -> Dataset:
        """The photos and tags behind a data manifest, from its `dataset.json`; see `data.index`."""
        root = self.data_root(data)
        return read_dataset((self.folder(data) / INDEX_FILE).read_text(), root)

    def device(self) -> torch.device:
        """The device that `runtime.device` names; of several, the first.

        Raises:
            InputError: If it is a CUDA device and it is not there, or if there are fewer than
                `runtime.devices`.
        """
        name, num = self.runtime.device, self.runtime.devices
        cuda = name != "cpu" and torch.cuda.is_available()
        seen = torch.cuda.device_count() if cuda else 0
        if cuda and num > seen:
            raise InputError(
                f"runtime.devices is {num}, but {seen} CUDA devices are seen here; lower it"
            )
        if name == "auto":
            return torch.device("cuda" if cuda else "cpu")
        if name != "cpu" and not cuda:
            raise InputError(
                f"runtime.device is {name!r}, but no CUDA device is seen here; "
                "set it to cpu or auto"
            )
        device = torch.device(name)
        if cuda and (device.index or 0) >= seen:
            raise InputError(
                f"runtime.device is {name!r}, but the CUDA devices seen here are 0..{seen - 1}"
            )
        return device


def try_gpu(device: torch.device) -> str:
    """Compute something on a GPU; its name.

    Raises:
        ContaError: If it is seen and does not compute, for torch was not built for its age.
    """
    try:
        name = torch.cuda.get_device_name(device)
        ones = torch.ones(1, 1, 3, 3, device=device)
        torch.nn.functional.conv2d(ones, ones)
    except RuntimeError as error:
        raise ContaError(
            f"{device} is seen but does not compute ({str(error).splitlines()[0]}); set "
            "runtime.device: cpu, or compare its driver and its age with torch's"
        ) from error
    return name


@dataclass(frozen=True)
class Job:
    """One call of a stage: everything its `write` may look at beside the input manifests.

    Attributes:
        settings: The stage's own slice of the settings; what is not in it cannot be read, so the
            key is honest.
        seed: The stage's seed.
        amp: Whether bf16 autocast is on.
        work: Where and how.
        scratch: Folder for checkpoints; it survives a death and is named by the key.
    """

    settings: Any
    seed: int
    amp: bool
    work: Workspace
    scratch: Path


@dataclass(frozen=True)
class Stage:
    """A named step of a round.

    Attributes:
        name: First folder below `store/`, and the name of its Prefect task.
        write: `write(out, job, **inputs) -> Measured`: fills the folder `out`; inputs are manifests
            or None.
        settings: The slice of the settings it depends on.
        seeded: Whether it draws random numbers.
    """

    name: str
    write: Callable[..., Measured]
    settings: Callable[[Config], Any]
    seeded: bool = False

    def key(self, config: Config, **inputs: Manifest | str | None) -> str:
        """The key of the artifact that these settings and inputs would make."""
        return stage_key(
            self.name,
            code=code_stamp(self.write.__module__),
            settings=self.settings(config),
            seed=self._seed(config) if self.seeded else None,
            precision=self._precision(config) if self.seeded else "fp32",
            inputs=inputs,
        )

    def question(self, config: Config, **inputs: Manifest | str | None) -> dict[str, Any]:
        """What the key is made of, in parts that a person can compare with another artifact's."""
        return {
            "settings": plain(self.settings(config)),
            "code": code_parts(self.write.__module__),
            "seed": self._seed(config) if self.seeded else None,
            "precision": self._precision(config) if self.seeded else "fp32",
            "inputs": {
                name: value.digest if isinstance(value, Manifest) else value
                for name, value in inputs.items()
            },
        }

    def find(
        self, config: Config, work: Workspace, **inputs: Manifest | str | None
    ) -> tuple[Manifest | None, str | None]:
        """The verified artifact of these settings and inputs, or its fault; see `Store.find`."""
        return work.store.find(self.name, self.key(config, **inputs))

    def __call__(
        self, config: Config, work: Workspace, **inputs: Manifest | str | None
    ) -> Manifest:
        """The artifact's manifest: found whole in the store, or made now.

        Raises:
            ContaError: When the stage cannot be done; its message is for the user.
        """
        key = self.key(config, **inputs)
        found, problem = work.store.find(self.name, key)
        if found is not None:
            return found
        if problem is not None:
            work.recorder.note(f"rebuilt {self.name}: {problem}")
        keep_memory()
        job = Job(
            settings=self.settings(config),
            seed=self._seed(config),
            amp=self._precision(config) == "amp",
            work=work,
            scratch=scratch_folder(work.home, self.name, key),
        )
        try:
            return work.store.publish(
                self.name,
                key,
                lambda out: self.write(out, job, **inputs),
                question=self.question(config, **inputs),
            )
        except torch.OutOfMemoryError as error:
            asked = str(error).partition(". GPU")[0]  # what follows are numbers of the allocator
            raise ContaError(
                f"{self.name} needs more memory than {work.device()} has free ({asked}); where "
                "it trains, lower its batch_size or crop_px, else data.long_side_px, or set "
                "runtime.device"
            ) from error
        finally:
            release_memory()
            torch.cuda.empty_cache()  # for the ranks of the next stage, and for other programs

    def _seed(self, config: Config) -> int:
        return derive_seed(config.seed, self.name)

    def _precision(self, config: Config) -> str:
        cuda = config.runtime.device != "cpu" and torch.cuda.is_available()
        return "amp" if config.runtime.precision == "amp" and cuda else "fp32"

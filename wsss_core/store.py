"""The content-addressed store: every artifact is whole and verified, or it is not there.

`CONTA_HOME/store/<stage>/<key>/` holds the artifact's files, their `index.jsonl` and
`manifest.json`. It is written in a temporary folder beside it, synced to disk and renamed, under a
lock the kernel drops when its holder dies. A hit is believed after every file was hashed again.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

from wsss_core.errors import StoreError
from wsss_core.records import Manifest

FORMAT = 1
"""Version of the layout; raised when an older store can no longer be read as it is."""

_MANIFEST, _INDEX, _QUESTION = "manifest.json", "index.jsonl", "question.json"
_FORMAT = "format"  # beside the stages' folders
UNFINISHED = ".tmp-"
"""How a folder's name begins until it is whole; key and host follow, as `KEY@HOST`."""

# These modules say what is asked, not how it is computed: a change in them changes no artifact.
_UNSTAMPED = frozenset({"config", "errors", "records", "store", "observe"})


@dataclass(frozen=True)
class Measured:
    """What a stage found out while it wrote its files.

    Attributes:
        metrics: Flat names to numbers; those that are not finite are left out of the manifest.
        history: Scalars of each training epoch.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """A user's folder among a stage's settings: a key asks what is in it, not where it is.

    Attributes:
        folder: Where it is now; need not exist.
    """

    folder: Path

    def digest(self) -> str:
        """Hash of the names and bytes of its files, at any depth."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        lines = [f"{file_sha256(p)} {p.relative_to(self.folder).as_posix()}\n" for p in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:24]


class Store:
    """The artifacts below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, manifest: Manifest) -> Path:
        """Where the artifact's files are."""
        return self.root / manifest.stage / manifest.key

    def check_format(self) -> None:
        """Make sure that this version can read what is there; a new or empty store passes.

        Raises:
            StoreError: If the store was written in another layout.
        """
        mark = self.root / _FORMAT
        found = mark.read_text().strip() if mark.is_file() else str(FORMAT)
        if found == str(FORMAT):
            return
        newer = found.isdecimal() and int(found) > FORMAT
        remedy = "update conta, or set" if newer else "set"
        raise StoreError(
            f"{self.root} has layout {found}, this version reads {FORMAT}; "
            f"{remedy} CONTA_HOME to another folder"
        )

    def open(self, manifest: Manifest) -> Path:
        """The artifact's folder, after every file was hashed again.

        Raises:
            StoreError: If it was removed or changed.
        """
        found, problem = self.find(manifest.stage, manifest.key)
        if found is None:
            raise StoreError(
                f"{self.folder(manifest)}: {problem or 'it was removed'}; run the recipe again"
            )
        return self.folder(found)

    def peek(self, stage: str, key: str) -> Manifest | None:
        """The manifest under a key, unverified; None if there is none or it cannot be read."""
        try:
            return Manifest.model_validate_json((self.root / stage / key / _MANIFEST).read_text())
        except (OSError, ValueError):
            return None

    def find(self, stage: str, key: str) -> tuple[Manifest | None, str | None]:
        """The verified manifest under a key, and what is wrong with it.

        Returns:
            (manifest, None) for a sound artifact, (None, None) if there is none, (None, reason) for
            a damaged one.
        """
        if not (self.root / stage / key).is_dir():
            return None, None
        manifest = self.peek(stage, key)
        if manifest is None:
            return None, f"{_MANIFEST} is missing or unreadable"
        problem = self._problem(manifest)
        return (manifest, None) if problem is None else (None, problem)

    def questions(self, stage: str) -> list[dict[str, Any]]:
        """What the keys of a stage's artifacts were made of, latest first; see `Stage.question`."""
        files = sorted(
            self.root.glob(f"{stage}/[!.]*/{_QUESTION}"), key=lambda p: p.stat().st_mtime_ns
        )
        return list(filter(None, map(_read_question, reversed(files))))

    def code_stamp(self, manifest: Manifest) -> str | None:
        """The `code_stamp` of what made an artifact; None if nothing is written of it."""
        parts = _read_question(self.folder(manifest) / _QUESTION).get("code")
        return _stamp(parts) if parts else None

    def writer(self, stage: str, key: str) -> str | None:
        """The process that is making an artifact right now, `host H, pid P`; None if none is."""
        try:
            with self._lock(stage, key).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._lock(stage, key).read_text().strip() or "another process"
        except OSError:
            return None
        return None

    def publish(
        self,
        stage: str,
        key: str,
        write: Callable[[Path], Measured],
        *,
        question: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write an artifact and make it appear under its key, all or nothing.

        Args:
            stage: Name of the stage.
            key: What `stage_key` gave.
            write: Fills an empty folder. It may take hours; nothing is visible before it returns.
            question: What the key was made of; kept beside the manifest, outside the digest.

        Returns:
            The manifest; that of another process or host if it was first with the same key.

        Raises:
            StoreError: On a full disk or a folder that cannot be written.
        """
        final = self.root / stage / key
        # a lock on a shared disk may not reach the other hosts
        scratch = final.with_name(f"{UNFINISHED}{key}@{socket.gethostname()}")
        try:
            self.check_format()
            with _locked(self._lock(stage, key)):
                if not (self.root / _FORMAT).exists():
                    write_atomically(self.root / _FORMAT, f"{FORMAT}\n".encode())
                found, _ = self.find(stage, key)
                if found is not None:
                    return found
                try:
                    return self._make(stage, key, write, scratch, question)
                except (OSError, SafetensorError):
                    # shards and checkpoints are elsewhere, and a full disk needs the room
                    shutil.rmtree(scratch, ignore_errors=True)
                    raise
        except (OSError, SafetensorError) as error:
            number = _errno_of(error)
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"the disk of {self.root} is full; free space and run the same command again"
                ) from error
            if number in (errno.EACCES, errno.EROFS, errno.EPERM):
                place = getattr(error, "filename", None) or final
                raise StoreError(
                    f"{place} cannot be written; check its owner and permissions"
                ) from error
            raise

    def _make(
        self,
        stage: str,
        key: str,
        write: Callable[[Path], Measured],
        scratch: Path,
        question: Mapping[str, Any] | None,
    ) -> Manifest:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        started = time.monotonic()
        measured = write(scratch)
        index = _write_index(scratch)
        manifest = Manifest(
            stage=stage,
            key=key,
            digest=hashlib.sha256(index).hexdigest()[:24],
            count=index.count(b"\n"),
            index_sha256=hashlib.sha256(index).hexdigest(),
            metrics={n: v for n, v in measured.metrics.items() if math.isfinite(v)},
            history=measured.history,
            finished_ms=time.time_ns() // 1_000_000,
            seconds=round(time.monotonic() - started, 3),
            versions=library_versions(),
        )
        if question is not None:
            text = json.dumps(question, indent=1, sort_keys=True)
            _write_synced(scratch / _QUESTION, text.encode())
        _write_synced(scratch / _MANIFEST, manifest.model_dump_json(indent=1).encode())
        _share_files(scratch, like=scratch / _MANIFEST)
        return self._publish_whole(scratch, manifest)

    def _publish_whole(self, scratch: Path, manifest: Manifest) -> Manifest:
        """Make a whole folder appear under its key, unless another host was first."""
        final, first = self.folder(manifest), self.find(manifest.stage, manifest.key)[0]
        if first is None:
            if final.exists():  # a damaged copy; it goes only now that its successor is whole
                shutil.rmtree(final)
            try:
                scratch.replace(final)
            except OSError as error:
                first, _ = self.find(manifest.stage, manifest.key)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or first is None:
                    raise
            _sync_folder(final.parent)
        if first is not None:
            shutil.rmtree(scratch)
        return first or manifest

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / stage / f".{key}.lock"

    def _problem(self, manifest: Manifest) -> str | None:
        folder = self.folder(manifest)
        try:
            index = (folder / _INDEX).read_bytes()
            if hashlib.sha256(index).hexdigest() != manifest.index_sha256:
                return f"{_INDEX} was changed"
            for line in index.splitlines():
                entry = json.loads(line)
                if file_sha256(folder / entry["file"]) != entry["sha256"]:
                    return f"{entry['file']} was changed"
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing"
        except OSError as error:
            return f"{error.filename} cannot be read ({error.strerror}), look at its permissions"
        return None


def scratch_folder(home: Path, stage: str, key: str) -> Path:
    """Where a stage keeps its checkpoints until its artifact is published."""
    return home / "scratch" / stage / key


def stage_key(
    stage: str,
    *,
    code: str,
    settings: Any,
    seed: int | None,
    precision: str,
    inputs: Mapping[str, Manifest | str | None],
) -> str:
    """Hash of everything that decides a stage's content.

    Never in it: a path, a round number, a device, a worker count.

    Args:
        stage: Name of the stage.
        code: `code_stamp` of its module.
        settings: Its own slice of the settings: models, or plain JSON values, or mappings of them.
        seed: Its seed; None for a stage that draws nothing.
        precision: `fp32` or `amp`, resolved.
        inputs: Manifests it reads, of which only the content digests count, and names such as a
            split's. An absent input differs from any present one.
    """
    document = {
        "stage": stage,
        "code": code,
        "settings": plain(settings),
        "seed": seed,
        "precision": precision,
        "inputs": {
            name: value.digest if isinstance(value, Manifest) else value
            for name, value in sorted(inputs.items())
        },
    }
    return hashlib.sha256(
        json.dumps(document, sort_keys=True, allow_nan=False).encode()
    ).hexdigest()[:24]


@functools.cache
def code_stamp(module: str) -> str:
    """Hash of the code a stage runs: its module and all it imports of `wsss_core`.

    Comments and docstrings do not count.
    """
    return _stamp(code_parts(module))


@functools.cache
def code_parts(module: str) -> dict[str, str]:
    """Hash of each module behind a stage, so that a miss can name the one that changed."""
    parts: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in parts or name.removeprefix("wsss_core.").split(".")[0] in _UNSTAMPED:
            continue
        found = _read_code(name)
        if found is not None:
            parts[name], imports = found
            waiting.extend(imports)
    return parts


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, read in blocks (0.9 GB/s)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries whose change may move a number."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow", "pydensecrf2")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_index(folder: Path) -> dict[str, str]:
    """File of each photo id of an artifact, relative to `folder`."""
    lines = (folder / _INDEX).read_text().splitlines()
    return {entry["id"]: entry["file"] for entry in map(json.loads, lines)}


def _share_files(folder: Path, *, like: Path) -> None:
    """Let a shared home read what safetensors writes for its owner alone, where a disk allows."""
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            with contextlib.suppress(OSError):
                path.chmod(mode)


def _stamp(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_question(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(file.read_text()))
    return {}


def _errno_of(error: OSError | SafetensorError) -> int | None:
    """What the system said; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


def _write_index(folder: Path) -> bytes:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    lines = []
    for file in files:
        _sync_file(folder / file)
        entry = {
            "id": file.rpartition(".")[0] or file,
            "file": file,
            "sha256": file_sha256(folder / file),
        }
        lines.append(json.dumps(entry, sort_keys=True) + "\n")
    index = "".join(lines).encode()
    _write_synced(folder / _INDEX, index)
    return index


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_synced(scratch, content)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an flock; its file says who holds it, for the one who waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        yield


def plain(value: Any) -> Any:
    """Settings as JSON values: models as mappings, tuples as lists, a user's folder as digest."""
    if isinstance(value, Content):
        return value.digest()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@functools.cache  # most modules stand behind every stage
def _read_code(module: str) -> tuple[str, list[str]] | None:
    """Hash of a module's code, and what it imports of `wsss_core`; None if it has no file."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).read_text())
    imports = _core_imports(tree, module)
    _strip_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], imports


def _core_imports(tree: ast.Module, module: str) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [
        name
        for name in names
        if name.startswith("wsss_core.") and name != module and _is_module(name)
    ]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _strip_docstrings(tree: ast.Module) -> None:
    """Those of modules, classes and functions, and those below constants."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )

"""What a home takes of the disk, and clearing away what no run refers to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flows import locks, runs
from flows.unfinished import start_path
from wsss_core.errors import BusyError, StoreError
from wsss_core.housekeeping import Garbage, Roots, find_garbage, folder_bytes, remove_garbage
from wsss_core.records import Manifest

_GC_LOCK = "gc.lock"


def disk_table(home: Path) -> str:
    """Sizes by stage and by folder, and what `collect` would free."""
    garbage = find_garbage(home, find_roots(home))
    stages = sorted(home.glob("store/*/"))
    others = sorted(path for path in home.glob("*") if path.name not in ("store", "scratch"))
    sums = (folder_bytes(home), sum(item.num_bytes for item in garbage))
    rows = [
        ("", "number", "size", "needless"),
        *(_row(f"store/{stage.name}", list(stage.glob("*/")), garbage) for stage in stages),
        _row("scratch", list(home.glob("scratch/*/*/")), garbage),
        *((path.name, "", _megabytes(folder_bytes(path)), "") for path in others),
        ("total", "", *map(_megabytes, sums)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    remedy = "\n\nfree what is needless: conta store gc" if garbage else ""
    return "\n".join(lines) + remedy


def collect(home: Path, *, dry_run: bool, say: Callable[[str], None]) -> None:
    """Remove what no run refers to, or only list it.

    Args:
        home: CONTA_HOME.
        dry_run: List, and touch nothing.
        say: Gets a line a folder, and one for the sum.

    Raises:
        BusyError: If a run is at work: what it will refer to is not known yet.
        StoreError: If a run's record cannot be read, for what it refers to would be lost.
    """
    with contextlib.nullcontext() if dry_run else _alone(home):
        garbage = find_garbage(home, find_roots(home))
        for item in garbage:
            say(f"{_megabytes(item.num_bytes):>12}  {item.path.relative_to(home)}  {item.why}")
            if not dry_run:
                remove_garbage(item)
    verb = "to free by `conta store gc`" if dry_run else "freed"
    say(f"{_megabytes(sum(item.num_bytes for item in garbage)):>12}  {verb}")


def find_roots(home: Path) -> Roots:
    """What the runs of a home need.

    Raises:
        StoreError: If a run's record cannot be read.
    """
    for record in sorted(home.glob("runs/*/run.json")):
        if runs.read_run(home, record.parent.name) is None:
            raise StoreError(
                f"{record} cannot be read, so what its run refers to is not known; "
                "start the run again, or remove its folder"
            )
    known = runs.list_runs(home)
    stops = [run.under_way for run in known if run.status != "finished" and run.rounds]
    return Roots(
        frozenset(
            (made.stage, made.key)
            for run in known
            for made in (*run.shared.values(), *_round_manifests(run))
        ),
        # a run that an earlier version left unfinished does not say where it stopped
        None if None in stops else frozenset((s.stage, s.key) for s in stops if s is not None),
    )


def await_collection(home: Path, *, note: Callable[[str], None]) -> None:
    """Return once no `conta store gc` is at work; call it when one's own lock is visible."""
    lock, said = home / _GC_LOCK, False
    while (holder := locks.find_holder(lock)) is not None:
        if not said:
            note(f"waiting for conta store gc ({holder})")
        said = True
        time.sleep(0.2)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Keep runs from starting, once it is sure that none is at work."""
    with locks.hold(home / _GC_LOCK, "conta store gc"):
        busy = [*start_path(home, "").glob("*"), *home.glob("runs/*/lock")]
        for lock in busy:
            holder = locks.find_holder(lock)
            if holder is not None:
                raise BusyError(
                    f"a run is at work in {holder}, and what it will need is not known yet; "
                    "wait for it or stop it (`conta store gc --dry-run` works meanwhile)"
                )
        yield


def _round_manifests(run: runs.Run) -> Iterator[Manifest]:
    for entry in run.rounds:
        yield from entry.manifests.values()
        yield from entry.former.values()


def _row(name: str, folders: list[Path], garbage: list[Garbage]) -> tuple[str, str, str, str]:
    needless = sum(item.num_bytes for item in garbage if item.path in folders)
    sizes = sum(map(folder_bytes, folders))
    return name, str(len(folders)), _megabytes(sizes), _megabytes(needless) if needless else ""


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"

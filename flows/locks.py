"""Who is at work: a file that the kernel locks for its holder, with a heartbeat for other hosts.

The kernel frees a lock when its holder dies, so on the holder's own host there is no doubt. A lock
on a shared disk may not reach another host; there the holder is believed to live while it touches
the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wsss_core.errors import BusyError, StoreError

BEAT_S, STALE_S = 60.0, 300.0
_TRIES = 5  # `find_holder` may have a free lock for an instant
_HOLDER = re.compile(r"host (\S+), pid (\d+)")


@dataclass(frozen=True)
class Holder:
    """A process that held or holds a lock.

    Attributes:
        host: Where it runs.
        pid: Its id there.
        seen_s: Its last sign of life, seconds since 1970.
    """

    host: str
    pid: int
    seen_s: float

    def __str__(self) -> str:
        """As the file has it."""
        return f"host {self.host}, pid {self.pid}"


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Be the only holder of a lock; its file is empty again after an orderly end.

    Args:
        path: The lock's file.
        what: Names what is held, in the error.

    Raises:
        BusyError: If another live process holds it.
        StoreError: If its file cannot be written.
    """
    with open_lock(path) as file:
        free = _try_lock(file.fileno())
        holder = read_holder(path)
        if not free or _lives_elsewhere(holder):
            raise BusyError(
                f"{what} is at work already in {holder or 'another process'}; "
                "wait for it or stop it"
            )
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        ended = threading.Event()
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            file.truncate(0)


def find_holder(path: Path) -> Holder | None:
    """The live holder of a lock; None if it is free or its holder died."""
    holder = read_holder(path)
    if _lives_elsewhere(holder):
        return holder
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_holder(path) or Holder("unknown", 0, time.time())
    except OSError:
        return None
    return None


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock or died with it; None after an orderly end."""
    try:
        found = _HOLDER.search(path.read_text())
        return found and Holder(found[1], int(found[2]), path.stat().st_mtime)
    except OSError:
        return None


def open_lock(path: Path) -> IO[str]:
    """The file of a lock, made if need be.

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}); check its owner, permissions and disk"
        ) from error


def _lives_elsewhere(holder: Holder | None) -> bool:
    return (
        holder is not None
        and holder.host != socket.gethostname()
        and time.time() - holder.seen_s < STALE_S
    )


def _try_lock(handle: int) -> bool:
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import pytest

from flows import locks
from wsss_core.errors import BusyError, StoreError


def _hold(path, taken, done):
    with locks.hold(path, "run toy-1"):
        taken.set()
        done.wait(30)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock."""
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", taken, done))
    process.start()
    assert taken.wait(30)
    yield process
    process.kill()
    process.join()


def test_hold__second_start_names_the_first(tmp_path, holder):
    path = tmp_path / "lock"
    said = f"run toy-1 is at work already in host {socket.gethostname()}, pid {holder.pid}; wait"
    with pytest.raises(BusyError, match=said), locks.hold(path, "run toy-1"):
        pass
    assert locks.find_holder(path).pid == holder.pid
    holder.kill()
    holder.join()
    assert locks.find_holder(path) is None  # the kernel let go
    died = locks.read_holder(path)
    assert (died.host, died.pid) == (socket.gethostname(), holder.pid)
    assert abs(time.time() - died.seen_s) < 60
    with locks.hold(path, "run toy-1"):
        assert locks.find_holder(path).pid == os.getpid()
    assert locks.find_holder(path) is locks.read_holder(path) is None


def test_find_holder__another_host_lives_while_its_heart_beats(tmp_path):
    path = tmp_path / "lock"
    path.write_text("host far.away, pid 7\n")  # its lock does not reach this host
    assert str(locks.find_holder(path)) == "host far.away, pid 7"
    with pytest.raises(BusyError, match=r"in host far\.away, pid 7"), locks.hold(path, "it"):
        pass
    old = time.time() - locks.STALE_S - 1
    os.utime(path, (old, old))
    assert locks.find_holder(path) is None
    with locks.hold(path, "it"):
        assert locks.find_holder(path).pid == os.getpid()


def test_hold__the_heart_beats_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    path = tmp_path / "lock"
    with locks.hold(path, "it"):
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
    assert not path.read_text()


def test_hold__a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    said = r"file/lock cannot be written \((File exists|Not a directory)\); check its owner"
    with pytest.raises(StoreError, match=said), locks.hold(tmp_path / "file" / "lock", "it"):
        pass


@pytest.mark.parametrize("text", [None, "", "nonsense"])
def test_find_holder__nobody(tmp_path, text):
    path = tmp_path / "lock"
    if text is not None:
        path.write_text(text)
    assert locks.find_holder(path) is None
    assert path.exists() == (text is not None)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.flows import shards
from wsss_core import workers
from wsss_core.errors import ContaError
from wsss_core.observe import SilentRecorder


class _Counter(SilentRecorder):
    def __init__(self):
        self.seen = []

    def progress(self, what, done, total):
        self.seen.append((what, done, total))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_map_shards__one_worker_stays_here_with_one_thread_and_restores():
    before = torch.get_num_threads()
    counter = _Counter()
    found = list(
        workers.map_shards(shards.describe, [3, 1, 2], workers=1, recorder=counter, what="toys")
    )
    assert [(shard, threads) for shard, _, threads in found] == [(3, 1), (1, 1), (2, 1)]
    assert {pid for _, pid, _ in found} == {os.getpid()}
    assert torch.get_num_threads() == before
    assert counter.seen == [("toys", 1, 3), ("toys", 2, 3), ("toys", 3, 3)]


def test_map_shards__progress_counts_what_is_in_the_shards():
    counter = _Counter()
    list(workers.map_shards(len, [[1, 2], (3,)], workers=1, recorder=counter, what="toys"))
    assert counter.seen == [("toys", 2, 3), ("toys", 3, 3)]


def test_map_shards__pool_keeps_order_processes_and_raises_what_a_shard_raises(monkeypatch):
    monkeypatch.setattr(workers, "_PRELOADED", ("torch",))  # the rest costs seconds

    def run(function, num):
        return list(
            workers.map_shards(
                function, list(range(num)), workers=2, recorder=SilentRecorder(), what="toys"
            )
        )

    first, second = run(shards.describe, 7), run(shards.describe, 7)
    assert [row[0] for row in first] == list(range(7))
    assert {row[2] for row in first} == {1}
    pids = {row[1] for row in first + second}
    assert os.getpid() not in pids
    assert len(pids) <= 2
    with pytest.raises(ValueError, match="shard 0 is bad"):
        run(shards.fail, 3)
    with pytest.raises(ContaError, match="a worker process died during toys"):
        run(shards.die, 3)
    assert len(run(shards.describe, 3)) == 3  # a fresh pool after the dead one
    workers._close_pools()


_PARENT = """
import sys
from functools import partial
from pathlib import Path
from tests.flows import shards
from wsss_core import workers
from wsss_core.observe import SilentRecorder
workers._PRELOADED = ("torch",)
folder = Path(sys.argv[1])
process = workers.start_process(["sleep", "60"])
(folder / f"{process.pid}.pid").touch()
work = partial(shards.sleep_long, folder=folder)
list(workers.map_shards(work, [1, 2], workers=2, recorder=SilentRecorder(), what="toys"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_workers__none_outlives_its_parent(tmp_path, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    try:
        assert _wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 3, 60)
        time.sleep(0.3)
        group = [int(path.stem) for path in tmp_path.glob("*.pid")]
        group += [int(pid) for child in group for pid in [_parent_of(child)] if pid != parent.pid]
        parent.send_signal(number)
        parent.wait(10)
        assert _wait_until(lambda: not any(map(_alive, group)))
    finally:
        parent.kill()


def _parent_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def test_start_process__hands_signals_on_and_kills_what_the_program_left():
    script = "trap 'exit 5' TERM; sleep 61 & echo $! ; while :; do sleep 0.1; done"
    process = workers.start_process(["sh", "-c", script], stdout=subprocess.PIPE)
    left = int(process.stdout.readline())
    assert _alive(left)
    process.terminate()
    assert process.wait(30) == 5
    assert _wait_until(lambda: not _alive(left))


def test_start_process__missing_program_gives_a_code():
    process = workers.start_process(["no-such-program"], stderr=subprocess.DEVNULL)
    assert process.wait(20) != 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_map_shards__workers_keep_their_memory():
    """64 MB are 16,000 pages: ten times that, had each array been fresh from the kernel."""
    first, second = workers.map_shards(
        shards.count_faults, [(1,), (2,)], workers=2, recorder=SilentRecorder(), what="faults"
    )
    assert first < 40_000
    assert second < 40_000

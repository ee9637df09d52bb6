from __future__ import annotations

import json
import os
import socket

import pytest

from flows import runs
from flows.unfinished import list_unfinished, unfinished_table


@pytest.fixture
def save(tmp_path):
    def save(name, started_ms, *, lock="", at=None, **fields):
        run = runs.Run(name=name, config={}, data="d", started_ms=started_ms, **fields)
        if at is not None:
            run.under_way = runs.UnderWay(round=at[0], label=at[1], stage=at[2], key="k")
        runs.save_run(tmp_path, run)
        runs.lock_path(tmp_path, name).write_text(lock)
        return runs.lock_path(tmp_path, name)

    return save


def test_list_unfinished__where_when_and_why(tmp_path, save):
    here = f"host {socket.gethostname()}, pid 7"
    save("done-1", 9000, status="finished")
    save("far-1", 5000, lock="host far.away, pid 8\n", at=(2, "test/val", "test"))
    lock = save("dead-1", 4000, lock=f"{here}\n", at=(1, "segmenter", "segmenter"))
    os.utime(lock, (1234, 1234))
    save("bad-1", 3000, status="failed", reason="loss is nan", finished_ms=77_000)
    save("old-1", 2000)  # as a release without heartbeats leaves it
    checkpoint = tmp_path / "scratch" / "segmenter" / "k" / "checkpoint.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps({"file": "", "history": [{"epoch": 0}, {"epoch": 1}]}))

    far, dead, bad, old = list_unfinished(tmp_path)
    assert (far.name, far.state, far.where) == ("far-1", "running", "round 2, test/val")
    assert far.why == "host far.away, pid 8"
    assert (dead.state, dead.where) == ("died", "round 1, segmenter, 2 epochs done")
    assert (dead.why, dead.when_s) == (f"its process ended without a word ({here})", 1234)
    assert (bad.state, bad.where) == ("failed", "before round 0")
    assert (bad.why, bad.when_s) == ("loss is nan", 77)
    assert (old.state, old.when_s) == ("died", 2)
    table = unfinished_table(tmp_path).splitlines()
    assert [line.split()[0] for line in table[:4]] == ["far-1", "dead-1", "bad-1", "old-1"]
    assert table[-1] == "finish one: conta resume dead-1"


def test_unfinished_table__nothing_to_do(tmp_path, save):
    save("done-1", 1, status="finished")
    assert unfinished_table(tmp_path) == f"every run in {tmp_path} is finished"


@pytest.mark.parametrize("reason", ["after masks, as asked", "goes on as toy-2 with threshold 0.3"])
def test_list_unfinished__leaves_out_what_stopped_where_it_was_told_to(tmp_path, save, reason):
    save("asked-1", 1, status="stopped", reason=reason)
    assert list_unfinished(tmp_path) == []
    assert unfinished_table(tmp_path).endswith(
        "is finished, 1 of them where they were told to stop"
    )
    save("cut-1", 1, status="stopped", reason="KeyboardInterrupt")
    assert [stop.name for stop in list_unfinished(tmp_path)] == ["cut-1"]

from __future__ import annotations

import pytest

from flows import house, locks, runs
from wsss_core.errors import BusyError, StoreError
from wsss_core.store import Measured, Store, scratch_folder


@pytest.fixture
def home(tmp_path):
    """Two runs that share an artifact, one of them stopped, and what is left of a third."""

    def publish(stage, key):
        def write(folder):
            (folder / "a.bin").write_bytes(b"x" * 2_000_000)
            return Measured()

        return Store(tmp_path / "store").publish(stage, key, write)

    shared, gone = publish("scenes", "s"), publish("cams", "gone")
    for name, status in (("a-1", "finished"), ("b-1", "stopped")):
        run = runs.Run(name=name, config={}, data="d", started_ms=0, status=status)
        run.shared["scenes"] = shared
        run.start_round(0)
        run.keep(0, "cams", publish("cams", name))
        if status == "stopped":
            run.start_round(0)  # and died before it came to its CAMs again
            run.under_way = runs.UnderWay(round=0, label="segmenter", stage="segmenter", key="b")
        runs.save_run(tmp_path, run)
    for key in ("b", "gone"):
        scratch_folder(tmp_path, "segmenter", key).mkdir(parents=True)
    assert gone.key == "gone"
    return tmp_path


def run_collect(home, *, dry_run):
    said = []
    house.collect(home, dry_run=dry_run, say=said.append)
    return said


def left(home):
    folders = [*home.glob("store/*/[!.]*/"), *home.glob("scratch/*/*/")]
    return sorted(path.relative_to(home).as_posix() for path in folders)


def test_collect__removes_what_no_run_refers_to_and_no_more(home):
    before = left(home)
    planned = run_collect(home, dry_run=True)
    assert left(home) == before
    assert planned[-1] == "      2.0 MB  to free by `conta store gc`"
    done = run_collect(home, dry_run=False)
    assert done[:-1] == planned[:-1]
    assert [line.split()[2] for line in done[:-1]] == ["scratch/segmenter/gone", "store/cams/gone"]
    assert left(home) == [
        "scratch/segmenter/b",
        "store/cams/a-1",
        "store/cams/b-1",
        "store/scenes/s",
    ]
    assert run_collect(home, dry_run=False) == ["      0.0 MB  freed"]


def test_collect__not_while_a_run_is_at_work(home):
    before = left(home)
    for lock in (home / "starts" / "some-flow-run", runs.lock_path(home, "a-1")):
        with locks.hold(lock, "it"):
            with pytest.raises(BusyError, match=r"a run is at work in host .*--dry-run"):
                run_collect(home, dry_run=False)
            assert run_collect(home, dry_run=True)
    assert left(home) == before


def test_collect__not_without_every_record(home):
    (home / "runs" / "a-1" / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"a-1/run\.json cannot be read"):
        run_collect(home, dry_run=False)
    assert "store/cams/a-1" in left(home)


def test_find_roots__a_run_of_an_earlier_release_keeps_all_scratch(home):
    run = runs.find_run(home, "b-1")
    run.under_way = None
    runs.save_run(home, run)
    assert house.find_roots(home).scratch is None
    run.rounds.clear()  # it was refused before its first stage
    runs.save_run(home, run)
    assert house.find_roots(home).scratch == frozenset()


def test_await_collection__says_for_whom_it_waits(home, monkeypatch):
    notes, waits = [], []
    house.await_collection(home, note=notes.append)
    assert notes == []
    with locks.hold(home / "gc.lock", "it"):

        def end(_seconds):
            waits.append(1)
            if len(waits) == 3:
                monkeypatch.setattr(locks, "find_holder", lambda _path: None)

        monkeypatch.setattr(house.time, "sleep", end)
        house.await_collection(home, note=notes.append)
    (line,) = notes
    assert line.startswith("waiting for conta store gc (host ")
    assert len(waits) == 3


def test_disk_table__sizes_and_what_is_needless(home):
    table = house.disk_table(home)
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert cells["store/cams"][:5] == ["3", "6.0", "MB", "2.0", "MB"]
    assert cells["store/scenes"][:3] == ["1", "2.0", "MB"]
    assert cells["scratch"][0] == "2"
    assert table.splitlines()[-1] == "free what is needless: conta store gc"
    run_collect(home, dry_run=False)
    assert "conta store gc" not in house.disk_table(home)

"""Shards that a killed stage has finished are never computed again."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.stages.world import Listener
from wsss_core.config import RuntimeConfig
from wsss_core.errors import ContaError
from wsss_core.records import TaggedPhoto
from wsss_core.stages import resume
from wsss_core.stages.resume import write_shards
from wsss_core.stages.shards import SHARD_PHOTOS
from wsss_core.stages.stage import Job, Workspace

PHOTOS = [TaggedPhoto(f"a/p{k:03d}", Path("none.png"), ()) for k in range(2 * SHARD_PHOTOS + 5)]


class KilledError(BaseException):
    """Stands for kill -9, in that nothing catches it."""


@pytest.fixture
def job(tmp_path):
    runtime = RuntimeConfig(device="cpu", workers=1)
    work = Workspace(tmp_path, runtime=runtime, recorder=Listener())
    return Job(settings=None, seed=0, amp=False, work=work, scratch=tmp_path / "scratch")


def write(shard, *, out, calls, die_on=None):
    """A file a photo that holds its id; dies in the middle of the shard of photo `die_on`."""
    calls.append(shard[0].id)
    for photo in shard:
        if photo.id == die_on:
            raise KilledError
        path = out / f"{photo.id}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(photo.id)
    return len(shard)


def run(job, out, **options):
    """(first photos of the shards computed, results)."""
    calls = []
    task = functools.partial(write, calls=calls, **options)
    return calls, write_shards(task, PHOTOS, out=out, job=job, what="toys")


def check(out):
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert files == [f"{photo.id}.txt" for photo in PHOTOS]  # and no record of a shard
    assert all((out / f"{photo.id}.txt").read_text() == photo.id for photo in PHOTOS)


def test_write_shards__all_files_and_results_in_order(job, tmp_path):
    calls, results = run(job, tmp_path / "out")
    assert calls == ["a/p000", "a/p024", "a/p048"]
    assert results == [24, 24, 5]
    check(tmp_path / "out")
    assert job.work.recorder.notes == []


def test_write_shards__killed_goes_on_with_what_was_not_finished(job, tmp_path):
    with pytest.raises(KilledError):
        run(job, tmp_path / "first", die_on="a/p030")
    assert not (tmp_path / "first").exists()  # nothing is handed over before all is there
    calls, results = run(job, tmp_path / "out")
    assert calls == ["a/p024", "a/p048"]
    assert results == [24, 24, 5]
    check(tmp_path / "out")
    assert job.work.recorder.notes == ["toys goes on after 1 of 3 shards"]


def test_write_shards__killed_before_it_was_published_costs_nothing(job, tmp_path):
    run(job, tmp_path / "lost")
    calls, results = run(job, tmp_path / "out")
    assert (calls, results) == ([], [24, 24, 5])
    check(tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda p: p.write_text("else"), lambda p: p.unlink()])
def test_write_shards__damaged_shard_is_done_again(job, tmp_path, damage):
    """Also where the artifact shares its files with the shards, and it was the artifact's."""
    run(job, tmp_path / "first")
    damage(next((tmp_path / "scratch").rglob("p025.txt")))
    (tmp_path / "first" / "a" / "p050.txt").write_text("else")
    calls, _ = run(job, tmp_path / "out")
    assert calls == ["a/p024", "a/p048"]
    check(tmp_path / "out")


def test_write_shards__other_photos_are_other_shards(job, tmp_path):
    run(job, tmp_path / "first")
    calls = []
    task = functools.partial(write, calls=calls)
    write_shards(task, PHOTOS[1:], out=tmp_path / "out", job=job, what="toys")
    assert len(calls) == 3


def test_write_shards__without_hard_links_files_are_copied(job, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(resume.os, "link", refuse)
    run(job, tmp_path / "out")
    check(tmp_path / "out")
    assert (tmp_path / "out" / "a" / "p000.txt").stat().st_nlink == 1


def draw(shard, *, out):
    return np.arange(len(shard), dtype=np.float32) / 3


def test_write_shards__arrays_come_back_bit_by_bit_and_are_no_files(job, tmp_path):
    for _ in range(2):  # computed, then found
        rows = write_shards(draw, PHOTOS, out=tmp_path / "out", job=job, what="toys")
        assert [row.dtype for row in rows] == [np.float32] * 3
        assert [row.tolist() for row in rows] == [
            draw(PHOTOS[:k], out=None).tolist() for k in (24, 24, 5)
        ]
    assert not (tmp_path / "out").exists()


def test_write_shards__of_two_writers_of_a_shard_the_first_stands(job, tmp_path):
    """As two hosts do whose locks do not reach each other."""

    def overtaken(shard, *, out):
        if shard[0].id == "a/p024" and not calls:
            calls.append(1)
            resume._write_whole(shard, write=overtaken, below=out.parent)
        return write(shard, out=out, calls=[])

    calls = []
    assert write_shards(overtaken, PHOTOS, out=tmp_path / "out", job=job, what="toys") == [
        24,
        24,
        5,
    ]
    assert calls == [1]
    check(tmp_path / "out")
    assert len(list((tmp_path / "scratch" / "shards").iterdir())) == 3  # nothing half done is left


def test_write_shards__a_failure_names_the_shard(job, tmp_path):
    def fail(shard, *, out):
        raise KeyError("cam")

    with pytest.raises(ContaError, match="shard a/p000 to a/p023: KeyError: 'cam'"):
        write_shards(fail, PHOTOS, out=tmp_path / "out", job=job, what="toys")

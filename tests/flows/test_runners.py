"""Shards over Prefect's task runners: the same results, wherever they are computed."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import replace

import pytest
import torch

from tasks import runners
from tests.flows import shards
from tests.stages.world import make_home, settings
from wsss_core.config import RuntimeConfig
from wsss_core.errors import ContaError, InputError
from wsss_core.observe import SilentRecorder
from wsss_core.stages import resume
from wsss_core.stages.boundary_labels import label_boundaries
from wsss_core.stages.cams import make_cams
from wsss_core.stages.classifier import train_classifier
from wsss_core.stages.masks import expand_masks
from wsss_core.stages.predictions import segment_photos
from wsss_core.stages.segmenter import train_segmenter
from wsss_core.stages.shards import split_shards
from wsss_core.workers import map_shards

RUNNERS = [
    "thread",
    pytest.param("process", marks=pytest.mark.slow),
    pytest.param("dask", marks=pytest.mark.slow),
]


class Counter(SilentRecorder):
    def __init__(self):
        self.seen = []

    def progress(self, what, done, total):
        self.seen.append((what, done, total))


def shard_map(home, runner):
    if runner == "dask":
        pytest.importorskip("prefect_dask")
    return runners.choose_shard_map(home, RuntimeConfig(runner=runner))


def run(compute, function, items, recorder=None):
    recorder = recorder or SilentRecorder()
    return list(compute(function, items, workers=2, recorder=recorder, what="toys"))


def test_choose_shard_map__none_is_the_pool_of_the_core(tmp_path):
    assert runners.choose_shard_map(tmp_path, RuntimeConfig()) is map_shards


@pytest.mark.flow
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.usefixtures("prefect_server")
def test_runner_map__order_one_thread_progress_and_nothing_left(tmp_path, runner, monkeypatch):
    monkeypatch.setattr(runners, "SHARDS_A_TASK", 2)
    compute, counter, threads = shard_map(tmp_path, runner), Counter(), torch.get_num_threads()
    found = run(compute, shards.describe, [3, 1, 2, 5, 4], counter)
    assert [shard for shard, _, _ in found] == [3, 1, 2, 5, 4]
    assert {threads for _, _, threads in found} == {1}
    assert (os.getpid() in {pid for _, pid, _ in found}) == (runner == "thread")
    assert counter.seen == [("toys", k, 5) for k in range(1, 6)]
    assert torch.get_num_threads() == threads
    assert list((tmp_path / "scratch").iterdir()) == []  # the mark is gone


@pytest.mark.flow
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.usefixtures("prefect_server")
def test_runner_map__what_a_shard_raises(tmp_path, runner):
    compute = shard_map(tmp_path, runner)
    with pytest.raises(InputError, match="shard 1 cannot be read"):
        run(compute, shards.refuse, [1, 2])
    with pytest.raises(ContaError, match=rf"runner '{runner}' lost shards of toys \(ValueError: "):
        run(compute, shards.fail, [1, 2])
    assert list((tmp_path / "scratch").iterdir()) == []


def test_runner_map__without_shards_no_runner_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(runners.RunnerMap, "_open", lambda *_: pytest.fail("opened"))
    assert run(shard_map(tmp_path, "process"), shards.describe, []) == []


@pytest.mark.slow
@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_runner_map__a_process_that_dies(tmp_path):
    with pytest.raises(ContaError, match=r"'process' lost shards of toys .*BrokenProcessPool"):
        run(shard_map(tmp_path, "process"), shards.die, [1, 2])


def test_see_home__a_worker_with_another_home_says_which_and_where(tmp_path):
    with runners._mark_home(tmp_path) as mark:
        runners.see_home(mark)
    with pytest.raises(InputError, match=rf"pid {os.getpid()} finds no {mark}: .*mount the same"):
        runners.see_home(mark)


@pytest.mark.slow
@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_runner_map__dask_proves_the_home_before_any_shard(tmp_path, monkeypatch):
    lost = contextlib.nullcontext(tmp_path / "elsewhere" / "mark")
    monkeypatch.setattr(runners, "_mark_home", lambda _home: lost)
    with pytest.raises(InputError, match=r"finds no .*CONTA_HOME is another folder there"):
        run(shard_map(tmp_path, "dask"), shards.touch, [tmp_path / "a", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_runner_map__dask_without_a_scheduler(tmp_path, monkeypatch):
    pytest.importorskip("prefect_dask")
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    runtime = RuntimeConfig(runner="dask", dask_address="tcp://127.0.0.1:1")
    compute = runners.choose_shard_map(tmp_path, runtime)
    with pytest.raises(InputError, match=r"no Dask worker answers at tcp://127\.0\.0\.1:1"):
        run(compute, shards.describe, [1, 2])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight photos, a classifier and a segmenter."""
    config, (work, data) = settings(), make_home(tmp_path_factory.mktemp("world"))
    classifier = train_classifier(config, work, data=data)
    cams = make_cams(config, work, data=data, classifier=classifier, x_m=None)
    masks = expand_masks(config, work, data=data, cams=cams)
    segmenter = train_segmenter(config, work, data=data, masks=masks)
    return work, data, classifier, segmenter


def digests(world, home, runner):
    """Content digests of all that is computed in shards, made anew in another home."""
    work, data, classifier, segmenter = world
    config, workers = settings(), 1 if runner == "none" else 2
    runtime = RuntimeConfig(device="cpu", threads=1, workers=workers, runner=runner)
    other = replace(work, home=home, runtime=runtime, shard_map=shard_map(home, runner))
    for made in (data, classifier, segmenter):
        folder = other.folder(made)
        folder.parent.mkdir(parents=True)
        folder.symlink_to(work.folder(made))
    cams = make_cams(config, other, data=data, classifier=classifier, x_m=None)
    labels = label_boundaries(config, other, data=data, cams=cams)
    masks = expand_masks(config, other, data=data, cams=cams)
    seen = segment_photos(config, other, data=data, segmenter=segmenter, split="train")
    return [(made.key, made.digest) for made in (cams, labels, masks, seen)]


@pytest.mark.flow
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.usefixtures("prefect_server")
def test_stages__same_keys_and_bytes_under_every_runner(world, tmp_path, runner, monkeypatch):
    monkeypatch.setattr(resume, "split_shards", functools.partial(split_shards, size=3))
    expected = digests(world, tmp_path / "none", "none")
    assert digests(world, tmp_path / runner, runner) == expected


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_stages__an_error_names_shard_and_photo(world, tmp_path, monkeypatch):
    work, data, classifier, _ = world
    cams = make_cams(settings(), work, data=data, classifier=classifier, x_m=None)
    other = replace(work, shard_map=shard_map(work.home, "thread"))
    config = settings(expansion__crf={"iterations": 3})
    monkeypatch.setattr("wsss_core.stages.masks.read_cam", _break_cam)
    with pytest.raises(ContaError, match=r"shard p0 to p7: photos p0, p1, p3, p4: KeyError: 'cam'"):
        expand_masks(config, other, data=data, cams=cams)


def _break_cam(_path):
    raise KeyError("cam")

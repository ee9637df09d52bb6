from __future__ import annotations

import json
import logging

import pytest

from flows import runs
from wsss_core.config import Config, parse_config
from wsss_core.errors import InputError
from wsss_core.records import Manifest


def manifest(stage, key="k", seconds=1.0, **metrics):
    return Manifest(
        stage=stage,
        key=key,
        digest=f"d-{key}",
        count=1,
        index_sha256="",
        metrics=metrics,
        finished_ms=5,
        seconds=seconds,
    )


def saved(home, name, started_ms=0):
    run = runs.Run(name=name, config={}, data="d", started_ms=started_ms)
    runs.save_run(home, run)
    return run


@pytest.mark.parametrize(
    "other",
    [
        {"rounds": 7},
        {"runtime": {"workers": 1, "device": "cpu", "threads": 1}},
        {"tracking": {"panels": "none"}},
        {"evaluation": {"stop_stability": 0.9}},
        {"data": {"root": "/elsewhere"}},
    ],
)
def test_name_run__same_run(other):
    data = manifest("scenes")
    assert runs.name_run(parse_config(other), data) == runs.name_run(Config(), data)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"segmenter": {"head": "deeplabv3plus"}}, {"data": {"limit": 3}}]
)
def test_name_run__another_run(other):
    data = manifest("scenes")
    assert runs.name_run(parse_config(other), data) != runs.name_run(Config(), data)
    assert runs.name_run(Config(), data) != runs.name_run(Config(), manifest("scenes", "other"))


def test_round_metrics__seconds_of_shared_artifacts_count_once():
    run = runs.Run(name="r", config={}, data="d", started_ms=0)
    for number in (0, 1):
        run.start_round(number)
        run.keep(number, "cams", manifest("cams", "same", seconds=2, **{"cam/miou": 0.5}))
        run.keep(number, "masks", manifest("masks", f"m{number}", seconds=3))
    assert [entry.seconds for entry in run.rounds] == [5.0, 3.0]
    assert run.rounds[1].metrics == {"seconds": 3.0, "cam/miou": 0.5}
    run.start_round(0)
    assert [len(entry.manifests) for entry in run.rounds] == [0, 2]


def test_start_round__what_the_start_before_made_is_not_forgotten():
    run = runs.Run(name="r", config={}, data="d", started_ms=0)
    run.start_round(0)
    run.keep(0, "cams", manifest("cams"))
    run.keep(0, "masks", manifest("masks"))
    for _ in range(2):  # two starts that die at once
        run.start_round(0)
    assert set(run.rounds[0].former) == {"cams", "masks"}
    run.keep(0, "cams", manifest("cams"))
    assert set(run.rounds[0].former) == {"masks"}
    assert run.rounds[0].metrics == {"seconds": 1.0}
    run.finish()
    assert not run.rounds[0].former


@pytest.mark.parametrize(
    ("rounds", "beyond", "status"),
    [(2, False, "finished"), (2, True, "stopped"), (3, False, "stopped")],
)
def test_close_run__a_finished_run_that_only_looked_again_stays_finished(
    tmp_path, rounds, beyond, status
):
    data = manifest("scenes")
    run = runs.open_run(tmp_path, "r", Config(rounds=2), data, None)
    run.start_round(0)
    run.keep(0, "cams", manifest("cams"))
    run.keep(0, "masks", manifest("masks", miou=0.5))
    runs.close_run(tmp_path, run)
    again = runs.open_run(tmp_path, "r", Config(rounds=rounds), data, None)
    again.start_round(0)
    again.keep(0, "cams", manifest("cams"))
    if beyond:
        again.go_beyond()
    again.status, again.reason = "stopped", "after cams, as asked"
    runs.close_run(tmp_path, again)
    found = runs.read_run(tmp_path, "r")
    assert found.status == status
    assert ("masks" in found.rounds[0].manifests) == (status == "finished")
    assert found.as_asked == (status == "stopped")


def test_open_run__a_start_that_is_refused_leaves_where_the_former_one_stopped(tmp_path):
    data = manifest("scenes")
    run = runs.open_run(tmp_path, "r", Config(rounds=0), data, None)
    run.start_round(0)
    run.under_way = runs.UnderWay(round=0, label="segmenter", stage="segmenter", key="k")
    run.status = "stopped"
    runs.close_run(tmp_path, run)
    again = runs.open_run(tmp_path, "r", Config(rounds=0), data, None)
    again.status, again.reason = "failed", "the disk is full"
    runs.close_run(tmp_path, again)
    assert runs.read_run(tmp_path, "r").under_way.key == "k"


def test_find_run__names_beginnings_and_latest(tmp_path):
    with pytest.raises(InputError, match="no run in"):
        runs.find_run(tmp_path, "latest")
    for started, name in enumerate(["voc-12345678", "scenes-1234aaaa", "scenes-1234bbbb"]):
        saved(tmp_path, name, started)
    assert runs.find_run(tmp_path, "latest").name == "scenes-1234bbbb"
    assert runs.find_run(tmp_path, "voc").name == "voc-12345678"
    assert runs.find_run(tmp_path, "scenes-1234a").name == "scenes-1234aaaa"
    with pytest.raises(InputError, match="several runs begin with 'scenes'"):
        runs.find_run(tmp_path, "scenes")
    with pytest.raises(InputError, match="no run begins with 'coco'"):
        runs.find_run(tmp_path, "coco")


def test_find_round__last_with_a_segmenter(tmp_path):
    run = saved(tmp_path, "toy-1")
    with pytest.raises(InputError, match="no trained segmenter yet"):
        runs.find_round(tmp_path, "toy-1")
    for number in (0, 1, 2):
        run.start_round(number)
        if number < 2:
            run.keep(number, "segmenter", manifest("segmenter", str(number)))
    runs.save_run(tmp_path, run)
    assert runs.find_round(tmp_path, "toy-1")[1].round == 1
    assert runs.find_round(tmp_path, "latest:0")[1].round == 0
    with pytest.raises(InputError, match="has no round '2'; it has 0, 1"):
        runs.find_round(tmp_path, "toy-1:2")


def test_find_round__masks_need_no_segmenter(tmp_path):
    run = saved(tmp_path, "toy-1")
    run.start_round(0)
    with pytest.raises(InputError, match="toy-1 has no pseudo-masks yet"):
        runs.find_round(tmp_path, "toy-1", stage="masks")
    run.keep(0, "masks", manifest("masks", "0"))
    runs.save_run(tmp_path, run)
    assert runs.find_round(tmp_path, "toy-1", stage="masks")[1].round == 0
    with pytest.raises(InputError, match="no trained segmenter yet"):
        runs.find_round(tmp_path, "toy-1")


def test_list_runs__skips_what_cannot_be_read(tmp_path):
    saved(tmp_path, "good-1")
    for name, content in (("half", b"{"), ("damaged", b"{\xff}")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_bytes(content)
    assert [run.name for run in runs.list_runs(tmp_path)] == ["good-1"]


def test_log_run__json_lines_with_tracebacks(tmp_path):
    logger = logging.getLogger("tests.flows")
    with runs.log_run(tmp_path, "toy-1") as path:
        logger.warning("two\nlines")
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("failed")
    logger.warning("after the end")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["level"], first["message"]) == ("WARNING", "two\nlines")
    assert "ValueError: bad" in second["traceback"]


def test_round_table__columns_of_the_splits_that_were_scored():
    run = runs.Run(name="toy-1", config={}, data="d", started_ms=0)
    run.start_round(0)
    scores = {"cam/miou": 0.4161, "seg_val/miou": 0.25, "tag_agreement": 1.0}
    run.keep(0, "all", manifest("all", seconds=61.6, **scores))
    run.start_round(1)
    assert runs.round_table(run).splitlines() == [
        "round   CAM  pseudo-mask   val  tag agreement  seconds",
        "    0  41.6            -  25.0          100.0       62",
        "    1     -            -     -              -        0",
    ]
    assert runs.markdown_table(run).splitlines()[1].startswith("| ---: |")
    assert runs.compare_rows([run])[0] == {
        "run": "toy-1",
        "round": 0,
        "metrics": {"seconds": 61.6, **scores},
    }
    assert runs.compare_table([run]).splitlines()[1].split()[0] == "toy-1"
    twin = run.model_copy(update={"config": {"supervision": "truth"}})
    assert "uses truth" in runs.round_table(twin)
    assert "toy-1 (uses truth)" in runs.compare_table([twin])

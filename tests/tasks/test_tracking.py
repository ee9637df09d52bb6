from __future__ import annotations

import re
import shutil

import mlflow
import pytest
from mlflow.utils.validation import _validate_metric_name
from PIL import Image

from tasks.tracking import (
    Candidate,
    Tracker,
    _clean,
    close_dead,
    fetch_champion,
    keep_page,
    promote,
)
from wsss_core.config import parse_config
from wsss_core.errors import ContaError
from wsss_core.records import Manifest

DATA = Manifest(
    stage="scenes", key="k", digest="abc", count=1, index_sha256="", finished_ms=0, seconds=0
)


def scored(key="k1", stage="score_cams", finished_ms=1000, **metrics):
    return Manifest(
        stage=stage,
        key=key,
        digest="d",
        count=1,
        index_sha256="",
        metrics=metrics,
        finished_ms=finished_ms,
        seconds=2.0,
    )


@pytest.fixture
def home(tmp_path, empty_mlflow):
    before = mlflow.get_tracking_uri()
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield tmp_path
    mlflow.set_tracking_uri(before)


def open_tracker(home, notes, **tree):
    config = parse_config({"name": "toy", **tree})
    tracker = Tracker(config, name="toy-1", home=home, note=notes.append)
    tracker.describe(config, DATA, {"prefect.url": "http://127.0.0.1:4200/runs/flow-run/x"})
    return tracker


def test_tracker__copying_thrice_changes_nothing(home):
    notes = []
    artifact = home / "artifact"
    artifact.mkdir()
    Image.new("RGB", (8, 8)).save(artifact / "panel.png")
    panels = scored("p", "draw_panels")
    client = mlflow.MlflowClient()
    for attempt in range(3):
        tracker = open_tracker(home, notes, rounds=attempt)
        tracker.sync(0, "score_cams", scored(**{"cam/miou": 0.5, "cam/iou/it's é": 0.1}), home)
        if attempt == 1:  # as if a run had died between the points and the tag
            child = tracker._children[0]
            client.delete_tag(child.info.run_id, "conta.stage_key.score_cams")
            client.delete_tag(child.info.run_id, "conta.stage_key.draw_panels")
        tracker.sync(0, "draw_panels", panels, artifact)
        tracker.close("finished")
    assert notes == []
    found = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["toy-1", "toy-1 round 0"]
    parent = tracker.run_id
    assert [
        (p.step, p.value, p.timestamp) for p in client.get_metric_history(parent, "cam/miou")
    ] == [(0, 0.5, 1000)]
    assert client.get_metric_history(parent, "cam/iou/it_s é")[0].value == 0.1
    images = [file.path for file in client.list_artifacts(parent, "images")]
    assert sum(path.endswith(".png") for path in images) == 1
    text = (home / "mlartifacts" / "toy" / parent / "artifacts" / "config.yaml").read_text()
    assert text.startswith("name: toy")
    assert client.get_run(parent).data.tags["prefect.url"].endswith("/x")


def test_tracker__settings_that_name_the_same_run_log_the_same_parameters(home):
    notes = []
    changes = ({}, {"review": True, "data": {"download": True}}, {"tracking": {"panels": "none"}})
    assert len({parse_config({"name": "toy"} | change).digest() for change in changes}) == 1
    for change in changes:
        open_tracker(home, notes, **change).close("stopped")
    assert notes == []


def test_tracker__an_artifact_made_anew_shows_its_score_and_picture(home):
    """By other code: under another key in the same run, and then by the first code again."""
    client, artifact = mlflow.MlflowClient(), home / "artifact"
    artifact.mkdir()
    Image.new("RGB", (8, 8)).save(artifact / "panel.png")
    tracker = open_tracker(home, [])
    for key, at, score in (("k1", 1000, 0.5), ("k2", 2000, 0.6), ("k1", 1000, 0.5)):
        tracker.sync(0, "score_cams", scored(key, finished_ms=at, **{"cam/miou": score}), home)
        tracker.sync(0, "draw_panels", scored(key, "draw_panels", finished_ms=at), artifact)
        assert client.get_run(tracker.run_id).data.metrics["cam/miou"] == score
    points = client.get_metric_history(tracker.run_id, "cam/miou")
    assert [(p.timestamp, p.value) for p in points] == [(1000, 0.5), (2000, 0.6), (2001, 0.5)]
    images = [file.path for file in client.list_artifacts(tracker.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 3


def test_tracker__whose_run_was_deleted_copies_everything_again(home):
    client = mlflow.MlflowClient()
    first = open_tracker(home, [])
    first.sync(0, "score_cams", scored(**{"cam/miou": 0.5}), home)
    client.delete_run(first.run_id)
    second = open_tracker(home, [])
    second.sync(0, "score_cams", scored(**{"cam/miou": 0.5}), home)
    assert second.run_id != first.run_id
    assert client.get_run(second.run_id).data.metrics["cam/miou"] == 0.5


@pytest.mark.parametrize("pages", [None, "https://mlflow.lab/"])
def test_tracker__its_page_is_where_a_browser_finds_it(home, monkeypatch, pages):
    monkeypatch.delenv("CONTA_MLFLOW_PAGES", raising=False)
    if pages is not None:
        monkeypatch.setenv("CONTA_MLFLOW_PAGES", pages)
    tracker = open_tracker(home, [])
    base = "http://127.0.0.1:5000" if pages is None else "https://mlflow.lab"
    assert re.fullmatch(rf"{re.escape(base)}/#/experiments/\d+/runs/{tracker.run_id}", tracker.url)


def test_tracker__panels_none_keeps_photos_out(home):
    artifact = home / "artifact"
    artifact.mkdir()
    Image.new("RGB", (8, 8)).save(artifact / "panel.png")
    tracker = open_tracker(home, [], tracking={"panels": "none"})
    tracker.sync(0, "draw_panels", scored("p", "draw_panels"), artifact)
    assert mlflow.MlflowClient().list_artifacts(tracker.run_id, "images") == []
    asked = open_tracker(home, [])  # it is the same run
    asked.sync(0, "draw_panels", scored("p", "draw_panels"), artifact)
    assert len(mlflow.MlflowClient().list_artifacts(tracker.run_id, "images")) > 0
    assert asked.run_id == tracker.run_id


def test_keep_page__is_an_artifact_of_the_run(home, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p>")
    runs = [open_tracker(home, []).run_id]
    assert keep_page(runs, page) is None
    (kept,) = mlflow.MlflowClient().list_artifacts(runs[0], "compare")
    assert kept.path == "compare/page.html"
    assert "\n" not in keep_page(["nobody"], page)


def test_close_dead__ends_what_still_runs(home):
    client = mlflow.MlflowClient()
    tracker = open_tracker(home, [])
    tracker.sync(0, "score_cams", scored(), home)
    assert close_dead("nowhere", "toy-1", 5)
    assert close_dead("toy", "another", 5)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert close_dead("toy", "toy-1", 5000)
    ended = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert [(run.info.status, run.info.end_time) for run in ended] == [("FAILED", 5000)] * 2
    open_tracker(home, [])
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    mlflow.set_tracking_uri(f"sqlite:///{home}/file/mlflow.db")
    (home / "file").touch()
    assert not close_dead("toy", "toy-1", 5000)


def test_tracker__fails_once_and_is_silent(tmp_path, home):
    (tmp_path / "file").touch()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
    notes = []
    tracker = open_tracker(home, notes)
    tracker.sync(0, "score_cams", scored(), home)
    tracker.close("failed")
    assert len(notes) == 1
    assert notes[0].startswith("MLflow failed (")
    assert "\n" not in notes[0]
    assert tracker.run_id == tracker.url == ""


def test_tracker__in_a_home_that_was_moved_logs_scores_and_says_where_files_go(home):
    first = open_tracker(home, [])
    moved, notes = home.with_name(f"{home.name} mövéd"), []
    home.rename(moved)
    mlflow.set_tracking_uri(f"sqlite:///{moved / 'mlflow.db'}")
    home.touch()  # so that the old place cannot come again
    tracker = open_tracker(moved, notes)
    tracker.sync(0, "score_cams", scored(**{"cam/miou": 0.5}), moved)
    artifact = moved / "artifact"
    artifact.mkdir()
    Image.new("RGB", (8, 8)).save(artifact / "panel.png")
    tracker.sync(0, "draw_panels", scored(stage="draw_panels"), artifact)
    (point,) = mlflow.MlflowClient().get_metric_history(first.run_id, "cam/miou")
    assert point.value == 0.5
    assert len(notes) == 2
    assert re.match(
        r"MLflow keeps pictures and models of experiment toy where .*home.*; ", notes[0]
    )
    assert notes[1].startswith("MLflow has the scores of this run and not its pictures (")
    quiet = []
    home.unlink()
    moved.rename(home)
    mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
    tracker = open_tracker(home, quiet)
    tracker.sync(0, "draw_panels", scored(stage="draw_panels"), home / "artifact")
    assert quiet == []
    assert mlflow.MlflowClient().list_artifacts(first.run_id, "images")


def test_tracker__that_fails_under_way_says_so_once_and_still_ends_its_run(home, monkeypatch):
    notes, client = [], mlflow.MlflowClient()
    tracker = open_tracker(home, notes)

    def refuse(*_args, **_options):
        raise mlflow.exceptions.MlflowException("gone")

    with monkeypatch.context() as gone:
        gone.setattr(tracker._client, "log_batch", refuse)
        tracker.sync(0, "score_cams", scored(), home)
        tracker.sync(1, "score_cams", scored(), home)
    tracker.close("finished")
    assert [note.partition(" (")[0] for note in notes] == ["MLflow failed"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    with monkeypatch.context() as gone:
        gone.setattr(tracker._client, "set_terminated", refuse)
        tracker.close("finished")
    assert len(notes) == 1


def candidate(home, number, *, digest="d"):
    """A round whose score the tracker has copied, as it does in every run."""
    tracker = open_tracker(home, [])
    score = scored(f"s{number}", "score_segmenter", 1000 + number, **{"seg_val/miou": 0.25})
    tracker.sync(number, "score_segmenter/val", score, home)
    return Candidate(
        run="toy-1",
        round=number,
        mlflow_run=tracker.run_id,
        segmenter=scored(stage="segmenter").model_copy(update={"digest": digest}),
        scores=[score],
        dataset=("toy", "abc"),
        reason="seg_val/miou 0.2500, the highest of 2 rounds",
    )


def write_model(out):
    (out / "weights").write_bytes(b"w")


def test_promote__registers_once_and_links_what_belongs_to_it(home, tmp_path):
    assert fetch_champion(tmp_path) is None
    first = candidate(home, 1)
    assert promote(first, write_model) == "1"
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("segmenter", "champion")
    assert version.run_id == first.mlflow_run
    assert version.description == first.reason
    assert version.tags == {
        "conta.run": "toy-1", "conta.round": "1", "conta.segmenter": "d", "conta.data": "abc"
    }  # fmt: skip
    model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert (model.status.value, model.source_run_id) == ("READY", first.mlflow_run)
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step) == ("seg_val/miou", 0.25, 1)
    assert (metric.dataset_name, metric.dataset_digest) == ("toy", "abc")
    history = client.get_metric_history(first.mlflow_run, "seg_val/miou")
    assert [(point.step, point.timestamp) for point in history] == [(1, 1001)]  # none twice
    files = {path.name for path in (home / "mlartifacts").rglob("*") if path.is_file()}
    assert {"MLmodel", "serving.py", "weights"} <= files
    assert not any(name.endswith((".pkl", ".pth")) for name in files)

    def never(_):
        raise AssertionError("it is registered already")

    assert promote(first, never) == "1"
    assert promote(candidate(home, 2), write_model) == "2"
    assert fetch_champion(tmp_path).round == "2"
    assert promote(first, never) == "1"
    champion = fetch_champion(tmp_path / "again")
    assert (champion.version, champion.run, champion.round) == ("1", "toy-1", "1")
    assert (champion.folder / "weights").read_bytes() == b"w"
    shutil.rmtree(home / "mlartifacts")  # as in a backup of the databases alone
    assert promote(first, write_model) == "3"
    assert (fetch_champion(tmp_path / "restored").folder / "weights").read_bytes() == b"w"


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("seg_val/iou/Bär", "seg_val/iou/Bär"),
        ("seg_val/iou/猫", "seg_val/iou/猫"),
        ("seg_val/iou/a//b", "seg_val/iou/a/_/b"),
        ("seg_val/iou/../x", "seg_val/iou/_/x"),
        ("seg_val/iou/c+", "seg_val/iou/c_"),
    ],
)
def test_clean__is_what_mlflow_takes_and_keeps_classes_apart(name, clean):
    assert _clean(name) == clean
    _validate_metric_name(clean)


def test_promote__fails_in_one_line_and_leaves_the_champion(home, tmp_path):
    promote(candidate(home, 1), write_model)

    def fail(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ContaError, match=r"MLflow failed \(.*No space left.* nothing was promoted"):
        promote(candidate(home, 2), fail)
    champion = fetch_champion(tmp_path)
    assert (champion.version, champion.round) == ("1", "1")
    mlflow.set_tracking_uri(f"sqlite:///{home}/file/mlflow.db")
    (home / "file").touch()
    with pytest.raises(ContaError, match="MLflow cannot give the champion"):
        fetch_champion(tmp_path)

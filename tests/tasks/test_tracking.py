from __future__ import annotations

import shutil

import mlflow
import pytest
from PIL import Image

from tasks.tracking import Tracker, close_dead, keep_page
from wsss_core.config import parse_config
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
    assert client.get_metric_history(parent, "cam/iou/it_s _")[0].value == 0.1
    images = [file.path for file in client.list_artifacts(parent, "images")]
    assert sum(path.endswith(".png") for path in images) == 1
    text = (home / "mlartifacts" / "toy" / parent / "artifacts" / "config.yaml").read_text()
    assert text.startswith("name: toy")
    assert client.get_run(parent).data.tags["prefect.url"].endswith("/x")


def test_tracker__panels_none_keeps_photos_out(home):
    artifact = home / "artifact"
    artifact.mkdir()
    Image.new("RGB", (8, 8)).save(artifact / "panel.png")
    tracker = open_tracker(home, [], tracking={"panels": "none"})
    tracker.sync(0, "draw_panels", scored("p", "draw_panels"), artifact)
    assert mlflow.MlflowClient().list_artifacts(tracker.run_id, "images") == []


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

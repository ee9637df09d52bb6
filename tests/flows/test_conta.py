from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import Counter

import mlflow
import pytest

from flows import launch, plan, runs
from flows.unfinished import list_unfinished
from tasks import stages
from tests.data.samples import make_folder
from tests.flows import toys as toy_stages
from wsss_core.config import parse_config
from wsss_core.errors import BusyError, DataError, DivergedError, InputError, SettingsError
from wsss_core.records import Manifest
from wsss_core.store import Store

pytestmark = pytest.mark.flow


@pytest.fixture
def toys(monkeypatch):
    return toy_stages.install(monkeypatch)


@pytest.fixture
def conta(home):
    """Run the flow as `execute` does."""
    from flows.conta import conta_flow

    def run(until=None, until_round=0, **tree):
        config = parse_config({"name": "toy", "rounds": 1, **tree})
        return runs.read_run(home, conta_flow(config, until, until_round))

    return run


def _states(run, num):
    """How often each state ended a task of the run's latest flow run, once `num` are recorded."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(timeout=10)
    chosen = FlowRunFilter.model_validate({"id": {"any_": [run.prefect_run]}})
    with get_client(sync_client=True) as client:
        for _ in range(100):
            names = Counter(t.state_name for t in client.read_task_runs(flow_run_filter=chosen))
            if names.total() - names["Pending"] - names["Running"] == num:
                break
            time.sleep(0.1)
    return names


def test_conta_flow__again_is_cached_and_mlflow_holds_each_point_once(home, toys, conta):
    short = conta(rounds=0)
    calls = toys.take_calls()
    assert short.status == "finished"
    assert calls[:4] == ["scenes", "truth", "classifier", "score_classifier/val"]
    first = conta(rounds=1)
    assert first.name == short.name
    assert [entry.round for entry in first.rounds] == [0, 1]
    more = toys.take_calls()
    after = [call for call in more if call != "draw_context"]
    assert after == calls[2:]  # round 0 was there, and had no context to draw
    calls += more
    assert {"cam/miou", "pseudo/miou", "seg_val/miou", "tag_agreement", "seconds"} <= set(
        first.rounds[1].metrics
    )

    second = conta(rounds=1)
    assert toys.take_calls() == []
    assert second.name == first.name
    assert [r.manifests for r in second.rounds] == [r.manifests for r in first.rounds]
    states = _states(second, len(calls))
    assert states == {"Cached": len(calls) - 1, "Completed": 1}  # truth is indexed every time

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("toy").experiment_id
    found = client.search_runs([experiment])
    parents = [run for run in found if "conta.round" not in run.data.tags]
    children = [run for run in found if "conta.round" in run.data.tags]
    assert len(parents) == 1
    assert len(children) == 2
    assert {run.info.status for run in found} == {"FINISHED"}
    parent = parents[0].info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    for metric in ("cam/miou", "seg_val/miou", "seconds/classifier"):
        points = client.get_metric_history(parent, metric)
        assert [point.step for point in points] == [0, 1]
        assert points[1].value == first.rounds[1].metrics.get(metric, points[1].value)
    losses = client.get_metric_history(children[0].info.run_id, "segmenter/loss")
    assert [(point.step, point.value) for point in losses] == [(0, 1.0), (1, 0.5)]
    images = [file.path for file in client.list_artifacts(parent, "images")]
    assert sum("panel+step+0" in path and path.endswith(".png") for path in images) == 1
    assert sum("context+step+1" in path and path.endswith(".png") for path in images) == 1
    assert parents[0].data.tags["prefect.url"].endswith(second.prefect_run)
    assert parents[0].inputs.dataset_inputs[0].dataset.digest == first.data
    assert parents[0].data.params["segmenter.backbone"] == "lite0"


def test_conta_flow__panels_none_keeps_photos_out_of_both_databases(home, toys, conta):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter

    held = {}
    for seed, panels in enumerate(("all", "none")):
        run = conta(rounds=0, seed=seed, tracking={"panels": panels})
        chosen = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.prefect_run]}})
        with get_client(sync_client=True) as client:
            reports = client.read_artifacts(artifact_filter=chosen)
        texts = [report.data for report in reports if report.key == "round-report"]
        images = mlflow.MlflowClient().list_artifacts(run.mlflow_run, "images")
        held[panels] = ["data:image" in text for text in texts], bool(images)
    assert held == {"all": ([True], True), "none": ([False], False)}


def test_conta_flow__a_flipped_byte_is_rebuilt_and_no_more(home, toys, conta, capsys):
    run = conta(rounds=0)
    toys.take_calls()
    cams = run.rounds[0].manifests["cams"]
    file = home / "store" / "cams" / cams.key / "what.txt"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    again = conta(rounds=0)
    assert toys.take_calls() == ["cams"]
    assert again.rounds[0].manifests["cams"].digest == cams.digest
    assert "rebuilt cams: what.txt was changed" in capsys.readouterr().err


def test_conta_flow__a_segmenter_setting_redoes_what_follows(home, toys, conta, monkeypatch):
    conta(rounds=0)
    toys.take_calls()
    changed = {"segmenter": {"class_balanced": True}}
    config = parse_config({"name": "toy", "rounds": 0, **changed})
    monkeypatch.setattr(plan, "index_truth", stages._index_truth)
    misses = [row for row in plan.plan_run(config, home) if not row.hit]
    assert misses[0].stage == "segmenter"
    assert misses[0].reason == "class_balanced: false -> true"
    assert misses[1].reason == "follows segmenter"
    conta(rounds=0, **changed)
    calls = toys.take_calls()
    assert calls[0] == "segmenter"
    assert not {"classifier", "cams", "masks", "score_cams"} & set(calls)


@pytest.mark.parametrize(
    ("with_truth", "scored"),
    [
        (("p0",), {"score_segmenter/val", "audit_segmenter/val"}),
        (
            ("p2",),
            {
                "score_cams",
                "score_masks",
                "audit",
                "score_segmenter/train",
                "audit_segmenter/train",
            },
        ),
    ],
)
def test_conta_flow__scores_the_splits_that_have_truth(toys, conta, capsys, with_truth, scored):
    toys.with_truth = with_truth
    conta(rounds=0)
    calls = [name for name in toys.take_calls() if name.startswith(("score", "audit"))]
    assert set(calls) - {"score_classifier/val", "audit_blur"} == scored
    other = "train" if with_truth == ("p0",) else "val"
    assert f"no photo of {other} has a true mask, so it is not scored" in capsys.readouterr().err


def test_conta_flow__a_photo_more_to_score_trains_nothing(toys, conta, tmp_path):
    rows = {"a.jpg": "cat", "b.jpg": "dog cat", "c.jpg": "dog", "d.jpg": "dog"}
    root = make_folder(tmp_path / "photos", rows, lists={"train": ["a", "b"], "val": ["c"]})
    first = conta(data={"source": "photos", "root": str(root)})
    toys.take_calls()
    (root / "val.txt").write_text("c\nd\n")
    second = conta(data={"source": "photos", "root": str(root)})
    assert set(toys.take_calls()) == {"truth", "score_classifier/val", "predictions/val"}
    assert second.name != first.name
    (root / "train.txt").write_text("a\nb\nd\n")
    (root / "val.txt").write_text("c\n")
    conta(data={"source": "photos", "root": str(root)})
    assert toys.take_calls()[:2] == ["truth", "classifier"]


def test_conta_flow__without_context_later_rounds_are_free(toys, conta):
    run = conta(rounds=2, causal={"context": "none"})
    calls = toys.take_calls()
    assert calls.count("classifier") == calls.count("segmenter") == 1
    assert [entry.manifests["masks"].key for entry in run.rounds] == [
        run.rounds[0].manifests["masks"].key
    ] * 3
    assert run.rounds[2].seconds == 0


def test_conta_flow__auto_is_the_number_it_stands_for(home, toys, conta, monkeypatch):
    tree = {"rounds": 0, "seeds": {"threshold": "auto"}}
    monkeypatch.setattr(plan, "index_truth", stages._index_truth)
    conta(rounds=0, until="cams")
    planned = {row.stage: row for row in plan.plan_run(parse_config({"name": "toy"} | tree), home)}
    assert planned["cams"].hit
    assert "never made" in planned["calibrate_seeds"].reason
    toys.take_calls()
    run = conta(**tree)
    assert toys.take_calls()[:3] == ["calibrate_seeds", "score_cams", "masks"]
    threshold = run.rounds[0].metrics["calibrate_seeds/threshold"]
    assert 0 < threshold < 1
    conta(rounds=0, seeds={"threshold": threshold})
    assert toys.take_calls() == []


def test_conta_flow__irn_has_two_more_stages_before_the_masks(home, toys, conta, monkeypatch):
    irn = {"method": "irn"}
    conta(rounds=0, expansion=irn)
    calls = toys.take_calls()
    named = ["cams", "score_cams", "boundary_labels", "boundary", "masks"]
    assert calls[calls.index("cams") :][:5] == named
    stopped = conta(rounds=0, expansion=irn | {"irn": {"foreground": 0.4}}, until="boundary")
    assert toys.take_calls() == ["boundary_labels", "boundary"]
    assert stopped.reason == "after boundary, as asked"

    changed = {"rounds": 0, "expansion": irn | {"irn": {"beta": 5}}}
    monkeypatch.setattr(plan, "index_truth", stages._index_truth)
    rows = plan.plan_run(parse_config({"name": "toy"} | changed), home)
    assert [row.stage for row in rows if row.hit][-3:] == [
        "score_cams",
        "boundary_labels",
        "boundary",
    ]
    assert next(row.reason for row in rows if not row.hit) == "beta: 10.0 -> 5.0"
    conta(**changed)
    assert toys.take_calls()[0] == "masks"


def test_conta_flow__pasted_cuts_by_the_masks_of_the_round_before(home, toys, conta):
    run = conta(rounds=1, causal={"context": "pasted"})
    calls = toys.take_calls()
    assert calls.count("classifier") == 2
    assert not {"confounders", "draw_context"} & set(calls)
    second = conta(rounds=1, causal={"context": "pasted"}, expansion={"crf": {"iterations": 3}})
    for stage in ("classifier", "segmenter"):
        made = [one.rounds[1].manifests[stage] for one in (run, second)]
        assert made[0] != made[1]
    assert run.rounds[1].manifests["segmenter"] != run.rounds[0].manifests["segmenter"]
    assert run.rounds[0].manifests["classifier"] == second.rounds[0].manifests["classifier"]
    for context, shown in (("pasted_own", "pasted_own"), ("pasted_bare", "pasted")):
        other = conta(rounds=1, causal={"context": context})
        for stage in ("classifier", "segmenter"):
            assert other.rounds[1].manifests[stage] != run.rounds[1].manifests[stage]
        assert other.rounds[0].manifests == run.rounds[0].manifests
        segmenter = Store(home / "store").folder(other.rounds[1].manifests["segmenter"])
        _, _, inputs = json.loads((segmenter / "what.txt").read_text())
        assert inputs["context"] == shown
    toys.take_calls()
    for share, shown in ((0.5, ("pasted", "0.5")), (0, (None, None))):
        other = conta(rounds=1, causal={"context": "pasted", "segmenter_share": share})
        assert [c for c in toys.take_calls() if c in ("classifier", "segmenter")] == ["segmenter"]
        segmenter = Store(home / "store").folder(other.rounds[1].manifests["segmenter"])
        _, _, inputs = json.loads((segmenter / "what.txt").read_text())
        assert (inputs["context"], inputs["share"]) == shown
    conta(rounds=1, causal={"context": "none"})
    assert "classifier" not in toys.take_calls()


def test_conta_flow__context_is_planned(home, toys, conta, monkeypatch):
    tree = {"rounds": 1, "causal": {"context": "uniform_alpha"}}
    conta(**tree)
    monkeypatch.setattr(plan, "index_truth", stages._index_truth)
    rows = plan.plan_run(parse_config({"name": "toy"} | tree), home)
    assert all(row.hit for row in rows)
    assert [row.stage for row in rows].count("draw_context") == 1
    louder = {"rounds": 1, "causal": tree["causal"] | {"amplitude": 30}}
    planned = plan.plan_run(parse_config({"name": "toy"} | louder), home)
    misses = [row for row in planned if not row.hit]
    assert misses[0].reason == "amplitude: 1.0 -> 30.0"
    assert {"classifier", "draw_context"} < {row.stage for row in misses}


def test_conta_flow__until_and_truth_and_stop(toys, conta):
    stopped = conta(until="cams", rounds=2)
    assert toys.take_calls()[-2:] == ["cams", "score_cams"]
    assert (stopped.status, stopped.reason) == ("stopped", "after cams, as asked")
    later = conta(until="masks", until_round=1, rounds=3, seed=1)
    assert len(later.rounds) == 2
    assert "segmenter" in later.rounds[0].manifests
    assert {"masks", "audit"} < set(later.rounds[1].manifests)
    assert "segmenter" not in later.rounds[1].manifests
    toys.take_calls()
    conta(supervision="truth", rounds=2)
    calls = toys.take_calls()
    assert calls[0] == "truth_masks"
    assert calls.count("segmenter") == 1
    stable = conta(rounds=5, evaluation={"stop_stability": 1e-6})
    assert len(stable.rounds) == 1


def test_conta_flow__until_a_stage_that_this_run_has_not(home, toys, conta):
    finished = conta(rounds=0)
    toys.take_calls()
    with pytest.raises(InputError, match="from round 1 on this run has no stage 'cams' to stop"):
        conta(rounds=0, until="cams", until_round=1)
    assert {"classifier", "cams"}.isdisjoint(toys.take_calls())
    assert runs.read_run(home, finished.name).status == "finished"


def test_conta_flow__a_val_list_that_these_photos_lack_is_not_scored(toys, conta, tmp_path):
    """Own photos need no lists, and recipes name one."""
    root = make_folder(tmp_path / "photos", {"a.jpg": "cat", "b.jpg": "dog cat"})
    run = conta(rounds=0, data={"source": "photos", "root": str(root), "val": ["val"]})
    calls = toys.take_calls()
    assert run.status == "finished"
    assert "classifier" in calls
    assert not [call for call in calls if call.endswith("/val")]


def test_conta_flow__failures_are_told_kept_and_retried(home, toys, conta, monkeypatch):
    toys.errors["segmenter"] = DivergedError("segmenter: loss is nan at batch 3")
    with pytest.raises(DivergedError, match=r"nan at batch 3; log: .*run\.log$"):
        conta(rounds=0)
    (failed,) = runs.list_runs(home)
    assert (failed.status, failed.reason) == ("failed", "segmenter: loss is nan at batch 3")
    assert "DivergedError" in runs.log_path(home, failed.name).read_text()
    assert toys.take_calls().count("segmenter") == 1

    monkeypatch.setattr(stages.train_segmenter, "retry_delay_seconds", [0, 0])
    toys.errors["segmenter"] = OSError(errno.EIO, "Input/output error")
    done = conta(rounds=0)
    assert done.status == "finished"
    assert toys.take_calls().count("segmenter") == 2

    with runs.hold_run(home, done.name), pytest.raises(BusyError, match=f"pid {os.getpid()}"):
        conta(rounds=0)


def test_conta_flow__the_dead_are_settled_and_the_living_are_not(home, toys, conta, capsys):
    """A run that died is closed in Prefect and MLflow by the next start of any run in the home."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Running

    tracking = mlflow.MlflowClient()
    died, far = conta(rounds=0, seed=1), conta(rounds=0, seed=2)
    _states(died, len(toys.take_calls()) // 2)
    with get_client(sync_client=True) as client:
        for run, host in ((died, socket.gethostname()), (far, "far.away")):
            # what kill -9 leaves behind
            run.status = "running"
            runs.save_run(home, run)
            runs.lock_path(home, run.name).write_text(f"host {host}, pid 99\n")
            tracking.update_run(run.mlflow_run, status="RUNNING")
            client.set_flow_run_state(run.prefect_run, Running(), force=True)
            (home / "starts" / run.prefect_run).write_text(f"host {host}, pid 99\n")
        chosen = FlowRunFilter.model_validate({"id": {"any_": [died.prefect_run]}})
        task = client.read_task_runs(flow_run_filter=chosen)[0]
        client.set_task_run_state(task.id, Running(), force=True)

        capsys.readouterr()
        conta(rounds=0, seed=3)

        why = f"its process ended without a word (host {socket.gethostname()}, pid 99)"
        assert f"run {died.name} had died: {why}" in capsys.readouterr().err
        state = client.read_flow_run(died.prefect_run).state
        assert (state.name, state.message) == ("Crashed", "its process ended without a word")
        assert client.read_task_run(task.id).state.name == "Crashed"
        assert client.read_flow_run(far.prefect_run).state.name == "Running"
    assert tracking.get_run(died.mlflow_run).info.status == "FAILED"
    assert tracking.get_run(far.mlflow_run).info.status == "RUNNING"
    record = runs.read_run(home, died.name)
    assert (record.status, record.reason) == ("failed", why)
    assert runs.read_run(home, far.name).status == "running"
    assert [path.name for path in (home / "starts").iterdir()] == [far.prefect_run]

    again = conta(rounds=0, seed=1)
    assert again.status == "finished"
    assert tracking.get_run(died.mlflow_run).info.status == "FINISHED"


def test_conta_flow__an_end_that_prefect_did_not_hear_is_told_by_the_next_start(
    home, toys, conta, monkeypatch
):
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    with monkeypatch.context() as silence:
        silence.setattr("flows.settle._prefect_answers", lambda: False)
        heard, lost = conta(rounds=0, seed=1), conta(rounds=0, seed=2)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(lost.prefect_run, Running(), force=True)
        conta(rounds=0, seed=3)
        state = client.read_flow_run(lost.prefect_run).state
        assert state.name == "Crashed"
        assert state.message.startswith("no Prefect server answered as it ended")
        assert client.read_flow_run(heard.prefect_run).state.name == "Completed"
    assert runs.read_run(home, lost.name).status == "finished"
    assert list((home / "starts").iterdir()) == []


def test_resume__finishes_by_the_settings_of_the_run(home, toys, conta):
    toys.errors["confounders"] = DivergedError("made up")
    with pytest.raises(DivergedError):
        conta(rounds=1, seed=5)
    toys.take_calls()
    (stop,) = list_unfinished(home)
    assert (stop.state, stop.where, stop.why) == ("failed", "round 0, confounders", "made up")

    done = launch.resume(runs.find_run(home, "latest"), home=home)
    assert (done.name, done.status, done.under_way) == (stop.name, "finished", None)
    assert toys.take_calls()[0] == "confounders"
    assert len(done.rounds) == 2
    with (
        runs.hold_run(home, done.name),
        pytest.raises(BusyError, match=f"is at work in host .*, pid {os.getpid()}"),
    ):
        launch.resume(done, home=home)


def test_resume__refuses_what_would_be_another_run(home, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    config = parse_config({"data": {"source": "photos", "root": str(photos)}})
    data = Manifest(
        stage="dataset", key="k", digest="d", count=1, index_sha256="", finished_ms=0, seconds=0
    )
    found = {"data": data}
    monkeypatch.setattr("wsss_core.stages.data.index_data", lambda *_: found["data"])
    run = runs.open_run(home, runs.name_run(config, data), config, data, None)
    launch.check_same(run, config, home)
    found["data"] = data.model_copy(update={"digest": "e"})
    with pytest.raises(DataError, match=f"data in {photos} changed since run {run.name}"):
        launch.check_same(run, config, home)
    found["data"] = data
    with pytest.raises(InputError, match="made by another version of conta"):
        launch.check_same(run, config.model_copy(update={"seed": 9}), home)
    with pytest.raises(SettingsError, match=r"another version of conta \(unknown setting 'gone'"):
        launch.resume(run.model_copy(update={"config": {"gone": 1}}), home=home)
    photos.rmdir()
    with pytest.raises(DataError, match=f"were in {photos}, which is gone"):
        launch.resume(run, home=home)


def test_conta_flow__a_dead_tracker_costs_one_line(home, toys, conta, monkeypatch, capsys):
    good = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home}/no/such/folder/mlflow.db")
    (home / "no").write_text("in the way")
    run = conta(rounds=0)
    assert run.status == "finished"
    assert capsys.readouterr().err.count("MLflow failed") == 1
    mlflow.set_tracking_uri(good)
    again = conta(rounds=0)
    toys.take_calls()
    client = mlflow.MlflowClient()
    assert [p.step for p in client.get_metric_history(again.mlflow_run, "cam/miou")] == [0]

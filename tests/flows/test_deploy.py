"""What Prefect's pages know of a deployment, asked of a real server."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from flows import deploy, environment, gpu, launch, servers
from flows.environment import locate_data
from wsss_core.config import parse_config
from wsss_core.errors import InputError
from wsss_core.observe import SilentRecorder

RECIPE = parse_config({"name": "toy-recipe", "rounds": 3, "causal": {"context": "none"}})


@pytest.fixture
def conta_flow():
    from flows.conta import conta_flow

    return conta_flow


@pytest.mark.flow
def test_make_deployment__form_shows_the_settings_and_bad_values_are_named(home, conta_flow):
    made = deploy.make_deployment(conta_flow, RECIPE, home=home, cron="0 2 * * *")
    made.apply()
    with get_client(sync_client=True) as client:
        known = client.read_deployment_by_name("conta/toy-recipe")
        assert [item.schedule.cron for item in known.schedules] == ["0 2 * * *"]
        assert str(home) in known.description
        assert known.entrypoint == "flows.conta.conta_flow"
        assert known.parameters["config"]["rounds"] == 3
        tree = known.parameter_openapi_schema["definitions"]
        rounds = tree["Config"]["properties"]["rounds"]
        assert (rounds["minimum"], rounds["maximum"]) == (0, 20)
        assert rounds["description"].startswith("T: rounds after round 0")
        assert "shuffled_photo" in tree["CausalConfig"]["properties"]["context"]["enum"]
        assert tree["SeedsConfig"]["additionalProperties"] is False
        for change, said in (
            ({"rounds": 99}, "config.rounds"),
            ({"causal": {"context": "magic"}}, "config.causal.context"),
            ({"sedes": {}}, "sedes"),
        ):
            with pytest.raises(Exception, match="Validation failed") as refused:
                client.create_flow_run_from_deployment(
                    known.id, parameters={"config": {**known.parameters["config"], **change}}
                )
            answer = getattr(refused.value, "response", None)
            assert said in (str(refused.value) if answer is None else answer.text)
        client.delete_deployment(known.id)


@pytest.mark.flow
@pytest.mark.usefixtures("clean_environment")
def test_make_deployment__a_schedule_plans_runs(tmp_path, conta_flow):
    for name in environment.describe_environment(tmp_path):
        os.environ.pop(name, None)
    environment.set_defaults(tmp_path)
    server = servers._start_prefect(tmp_path, servers.find_free_port(), with_pages=True)
    try:
        servers._point_prefect(server)
        server.wait_ready()
        deploy.make_deployment(conta_flow, RECIPE, home=tmp_path, cron="0 2 * * *").apply()
        end = time.monotonic() + 60  # it looks for new deployments every five seconds
        with get_client(sync_client=True) as client:
            while not (planned := client.read_flow_runs()):
                assert time.monotonic() < end, "nothing planned: do Prefect and SQLAlchemy agree?"
                time.sleep(0.2)
    finally:
        servers.close_prefect(server)
    assert all(run.state.is_scheduled() and run.auto_scheduled for run in planned)


@pytest.mark.flow
def test_complete__a_start_that_gives_a_part_keeps_the_deployments_settings(
    home, conta_flow, monkeypatch
):
    from flows import conta

    assert conta._complete(RECIPE) is RECIPE  # by hand
    deploy.make_deployment(conta_flow, RECIPE, home=home, cron=None).apply()
    with get_client(sync_client=True) as client:
        known = client.read_deployment_by_name("conta/toy-recipe")
        given = {"config": {"seed": 4, "causal": {"prior": "frequency"}}}
        started = client.create_flow_run_from_deployment(known.id, parameters=given)
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(started.id))  # as who serves it sets it
        config = conta._complete(parse_config(given["config"]))
        client.delete_deployment(known.id)
    assert (config.name, config.rounds, config.causal.context) == ("toy-recipe", 3, "none")
    assert (config.seed, config.causal.prior) == (4, "frequency")


def test_locate_data__folders_of_seeds_and_masks(tmp_path, monkeypatch):
    (tmp_path / "pseudo").mkdir()
    monkeypatch.chdir(tmp_path)
    config = parse_config({"expansion": {"method": "folder", "folder": "pseudo"}})
    assert locate_data(config) == config  # a path is part of the run's name
    config = parse_config({"seeds": {"method": "folder", "folder": "gone"}})
    with pytest.raises(InputError, match=r"seeds\.folder: no folder at /.*gone; start from the"):
        locate_data(config)


@pytest.mark.flow
def test_watch_for_dead_machines__once(home):
    deploy.watch_for_dead_machines()
    deploy.watch_for_dead_machines()
    with get_client(sync_client=True) as client:
        (known,) = client.read_automations_by_name(deploy.AUTOMATION)
    assert known.enabled
    assert known.trigger.after == {"prefect.flow-run.heartbeat"}
    assert known.trigger.within.total_seconds() >= 3 * int(
        environment.describe_environment(home)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    )
    assert [action.type for action in known.actions] == ["change-flow-run-state"]


@pytest.mark.flow
def test_turn_on_gpu__one_at_a_time(home, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc")
    name, notes = f"conta-gpu-{socket.gethostname()}-GPU-abc", []
    with get_client(sync_client=True) as client:
        with pytest.raises(ObjectNotFound):
            client.read_global_concurrency_limit_by_name(name)
        with gpu.turn_on_gpu(1, note=notes.append):
            limit = client.read_global_concurrency_limit_by_name(name)
            assert (limit.limit, limit.active_slots) == (1, 1)
        assert client.read_global_concurrency_limit_by_name(name).active_slots == 0
    assert notes == []


def test_turn__who_starts_by_hand_waits_for_nobody():
    from flows import conta

    work = SimpleNamespace(device=lambda: torch.device("cuda", 0))
    assert isinstance(conta._turn(work), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("index", "num", "turns"), [(None, 1, [0]), (2, 1, [2]), (None, 3, [0, 1, 2])]
)
def test_turn__one_on_each_gpu_that_a_deployed_run_uses(monkeypatch, index, num, turns):
    from flows import conta

    taken = []
    monkeypatch.setattr(conta, "deployment", SimpleNamespace(id="d"))

    @contextlib.contextmanager
    def turn_on_gpu(index, *, note):
        taken.append(index)
        yield
        taken.remove(index)

    monkeypatch.setattr(conta, "turn_on_gpu", turn_on_gpu)
    work = SimpleNamespace(
        device=lambda: torch.device("cuda", index),
        runtime=SimpleNamespace(devices=num),
        recorder=SilentRecorder(),
    )
    with conta._turn(work):
        assert taken == turns
    assert taken == []


@pytest.mark.parametrize(
    ("visible", "index", "device"),
    [("", 0, "0"), ("", 3, "3"), ("2,5", 1, "5"), ("2,5", 7, "7"), ("GPU-abc", 0, "GPU-abc")],
)
def test_device_id__counts_on_the_host(monkeypatch, visible, index, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.device_id(index) == device


def test_serve_recipes__wrong_use(tmp_path, conta_flow):
    with pytest.raises(InputError, match="several recipes are called toy-recipe"):
        deploy.serve_recipes(conta_flow, [RECIPE] * 2, home=tmp_path, cron=None, say=print)
    with pytest.raises(InputError, match="--cron 'at night' is no schedule; write minute"):
        deploy.serve_recipes(conta_flow, [RECIPE], home=tmp_path, cron="at night", say=print)


def _status(code):
    request = httpx.Request("GET", "http://127.0.0.1/api/health")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code))


def test_serve_recipes__waits_for_a_server_that_went_away(home, conta_flow, monkeypatch):
    ends = [ExceptionGroup("", [RuntimeError("Service exceeded error threshold.")]), None]
    answers, lines = [False, True], []

    def serve(made):
        assert len(made) == 1
        end = ends.pop(0)
        if end is not None:
            raise end

    monkeypatch.setattr(deploy, "_serve", serve)
    monkeypatch.setattr(deploy, "_answers", lambda: answers.pop(0))
    monkeypatch.setattr(deploy, "_LOOK_S", 0)
    deploy.serve_recipes(conta_flow, [RECIPE], home=home, cron=None, say=lines.append)
    assert lines[-2].startswith("Prefect's server does not answer.")
    assert (lines[-1], ends, answers) == ("Prefect's server is back: served as before", [], [])
    assert not deploy._lost_the_server(_status(401))
    assert deploy._lost_the_server(_status(502))  # a proxy speaks for it
    mixed = [ValueError("a bug"), httpx.ConnectError("gone")]
    assert not deploy._lost_the_server(ExceptionGroup("", mixed))
    ends.append(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        deploy.serve_recipes(conta_flow, [RECIPE], home=home, cron=None, say=lines.append)


@pytest.mark.usefixtures("clean_environment")
def test_deploy__needs_a_server_that_stays(tmp_path):
    from prefect.context import refresh_global_settings_context

    os.environ.pop("PREFECT_API_URL", None)
    refresh_global_settings_context()
    with pytest.raises(InputError, match="start `conta ui` in another terminal"):
        launch.deploy([RECIPE], home=tmp_path, cron=None, say=print)
    assert servers.live_ui(tmp_path) is None

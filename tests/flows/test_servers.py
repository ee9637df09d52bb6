from __future__ import annotations

import dataclasses
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from httpx import ConnectError

from flows import environment, launch, runs, servers
from wsss_core.config import parse_config
from wsss_core.errors import BusyError, ContaError, InputError, StoreError
from wsss_core.workers import start_process


class _Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if "health" in self.path else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def somebody():
    server = http.server.ThreadingHTTPServer((servers.HOST, 0), _Fine)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://{servers.HOST}:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_is_up__answers_and_silence(somebody, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert servers.is_up(f"{somebody}/api/health")
    assert not servers.is_up(f"{somebody}/nothing")
    assert not servers.is_up("http://127.0.0.1:1/health")
    assert not servers.is_up("no address")


def test_find_free_port__wanted_or_another():
    with socket.socket() as busy:
        busy.bind((servers.HOST, 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert servers.find_free_port(taken) != taken
    assert servers.find_free_port(taken) == taken


def test_live_ui__only_what_answers(tmp_path, somebody):
    assert servers.live_ui(tmp_path) is None
    links = {"prefect": somebody, "mlflow": somebody, "pid": "1"}
    (tmp_path / "ui.json").write_text(json.dumps(links))
    assert servers.live_ui(tmp_path) is None  # it was killed, and somebody else answers there now
    with servers.locks.hold(tmp_path / "ui.lock", "it"):
        assert servers.live_ui(tmp_path) == links
        (tmp_path / "ui.json").write_text(json.dumps({**links, "mlflow": "http://127.0.0.1:1"}))
        assert servers.live_ui(tmp_path) is None
        (tmp_path / "ui.json").write_text("{")
        assert servers.live_ui(tmp_path) is None


def test_live_ui__of_another_host_is_not_at_this_host_s_ports(tmp_path, somebody, monkeypatch):
    links = {"prefect": somebody, "mlflow": somebody, "pid": "1"}
    (tmp_path / "ui.json").write_text(json.dumps(links))
    with servers.locks.hold(tmp_path / "ui.lock", "it"):
        assert servers.live_ui(tmp_path) == links
        monkeypatch.setattr(servers.socket, "gethostname", lambda: "another")
        assert servers.live_ui(tmp_path) is None


@pytest.mark.usefixtures("clean_environment")
def test_start_prefect__pages_of_others_may_not_read_it(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(servers, "start_process", lambda _, env, **__: started.append(env))
    servers._start_prefect(tmp_path, 4200, with_pages=True)
    allowed = started[0]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert allowed == "http://127.0.0.1:4200,http://localhost:4200"
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", allowed)
    from prefect.settings.models.server.api import ServerAPISettings

    assert ServerAPISettings().cors_allowed_origins == allowed


def test_is_up__somebody_who_does_not_speak_http():
    with socket.create_server((servers.HOST, 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert not servers.is_up(f"http://{servers.HOST}:{listener.getsockname()[1]}/health")


@pytest.mark.usefixtures("clean_environment")
def test_start_ui__second_start_waits_for_the_first_and_finds_it(tmp_path, somebody, monkeypatch):
    monkeypatch.delenv("PREFECT_SERVER_API_HOST", raising=False)
    links = {"prefect": somebody, "mlflow": somebody, "pid": "77"}
    waits = []

    def serve_meanwhile(_seconds):
        waits.append(1)
        (tmp_path / "ui.json").write_text(json.dumps(links))

    monkeypatch.setattr(servers.time, "sleep", serve_meanwhile)
    said = []
    with servers.locks.hold(tmp_path / "ui.lock", "it"):
        servers.start_ui(tmp_path, say=said.append)
    assert waits == [1]
    assert said[0] == f"already up, or on its way (host {socket.gethostname()}, pid {os.getpid()})"
    assert said[1:] == [f"Prefect  {somebody}", f"MLflow   {somebody}/#/experiments"]
    (tmp_path / "ui.lock").write_text("host far.away, pid 7\n")
    with pytest.raises(BusyError, match=r"runs in host far\.away, pid 7"):
        servers.start_ui(tmp_path, say=said.append)


@pytest.mark.parametrize("name", ["PREFECT_SERVER_API_HOST", "MLFLOW_HOST"])
def test_start_ui__serves_no_network_without_a_password(tmp_path, monkeypatch, name):
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        monkeypatch.setenv(name, host)
        servers.refuse_open_bind()
    for host in ("0.0.0.0", "::", "192.168.1.2", "lab.example"):  # noqa: S104
        monkeypatch.setenv(name, host)
        with pytest.raises(InputError, match=f"{name} is '{host}'.* unset {name}, or use docker"):
            servers.start_ui(tmp_path / "home", say=print)
    assert not (tmp_path / "home").exists()


def test_charts_path__of_the_latest_run_that_mlflow_knows(tmp_path):
    assert servers.charts_path(tmp_path) == "/#/experiments"
    for number, url in enumerate(
        ["http://m/#/experiments/3/runs/a", "http://m/#/experiments/7/x", ""]
    ):
        run = runs.Run(name=f"r-{number}", config={}, data="d", started_ms=number, mlflow_url=url)
        runs.save_run(tmp_path, run)
    assert servers.charts_path(tmp_path) == "/#/experiments/7/runs?compareRunsMode=CHART"


def test_wait_ready__names_the_log_of_a_server_that_ended(tmp_path):
    servers.Server("http://127.0.0.1:1", "/health").wait_ready()  # not ours: nothing to wait for
    child = start_process([sys.executable, "-c", "raise SystemExit(3)"])
    server = servers.Server("http://127.0.0.1:1", "/health", child, tmp_path / "server.log")
    with pytest.raises(ContaError, match=r"did not start; it said why in .*server.log"):
        server.wait_ready()
    server.stop()


def test_start_prefect__a_new_home_has_one_at_a_time(tmp_path, somebody, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = []

    def start(*_, **__):
        child = start_process(sleeper)
        started.append(servers.Server(somebody, "/health", child))
        return started[-1]

    monkeypatch.setattr(servers, "_start", start)
    home = tmp_path / "new"
    first = servers._start_prefect(home, 1, with_pages=False)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(servers._start_prefect, home, 2, with_pages=False)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)
        assert len(started) == 1
        (home / "prefect.db").touch()
        first.wait_ready()
        assert second.result(timeout=30).turn is None  # it is made: nobody waits for this one
    third = servers._start_prefect(home, 3, with_pages=False)
    assert third.turn is None
    for server in started:
        server.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("clean_environment")
def test_start_prefect__three_at_once_in_a_new_home(tmp_path):
    start = (
        "import sys; from pathlib import Path; from flows import environment, servers\n"
        "home = Path(sys.argv[1]); environment.set_defaults(home)\n"
        "server = servers.open_prefect(home); server.wait_ready(); servers.close_prefect(server)"
    )
    home = str(tmp_path / "new")
    children = [subprocess.Popen([sys.executable, "-c", start, home]) for _ in range(3)]
    assert [child.wait(300) for child in children] == [0, 0, 0]


@pytest.mark.usefixtures("clean_environment")
def test_open_prefect__the_users_server_comes_first(tmp_path, somebody):
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = f"{somebody}/api"
    refresh_global_settings_context()
    assert servers.open_prefect(tmp_path) == servers.Server(f"{somebody}/api", "/health")
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:1/api"
    refresh_global_settings_context()
    with pytest.raises(InputError, match=r"127.0.0.1:1/api does not answer; start it, or unset"):
        servers.open_prefect(tmp_path)


@pytest.mark.usefixtures("clean_environment")
def test_open_prefect__then_that_of_a_live_ui(tmp_path, somebody):
    from prefect.context import refresh_global_settings_context

    os.environ.pop("PREFECT_API_URL", None)
    refresh_global_settings_context()
    links = {"prefect": somebody, "mlflow": somebody, "pid": "1"}
    (tmp_path / "ui.json").write_text(json.dumps(links))
    with servers.locks.hold(tmp_path / "ui.lock", "it"):
        server = servers.open_prefect(tmp_path)
    assert (server.url, server.process) == (somebody, None)
    assert os.environ["PREFECT_API_URL"] == f"{somebody}/api"


@pytest.mark.usefixtures("clean_environment")
def test_settle__asks_the_server_that_the_ui_brought(tmp_path, somebody, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    from flows import settle

    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"  # as conta sets it
    refresh_global_settings_context()
    start = tmp_path / "starts" / "11111111-1111-4111-8111-111111111111"
    start.parent.mkdir()
    start.write_text("")
    settle.settle_dead(tmp_path, note=print)
    assert start.exists()  # nobody could be told

    def ask(home, *, note):
        with get_client(sync_client=True) as client:
            note(str(client.api_url))

    said = []
    monkeypatch.setattr(settle, "settle_dead", ask)
    servers._settle(tmp_path, {"prefect": somebody}, said.append)
    assert [line.rstrip("/") for line in said] == [f"{somebody}/api"]


@pytest.mark.usefixtures("clean_environment")
def test_set_defaults__the_user_wins(tmp_path):
    os.environ["MLFLOW_TRACKING_URI"] = "http://mlflow.lab:5000"
    os.environ.pop("PREFECT_RESULTS_DEFAULT_SERIALIZER", None)
    environment.set_defaults(tmp_path / "home")
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow.lab:5000"
    assert os.environ["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    assert "PREFECT_HOME" not in environment.describe_environment(tmp_path)


def test_set_defaults__a_home_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"home .*/file/home cannot be made .*; set CONTA_HOME"):
        environment.set_defaults(tmp_path / "file" / "home")


@pytest.mark.usefixtures("clean_environment")
def test_name_servers__the_users_or_that_of_a_live_ui_or_an_ephemeral_one(tmp_path, somebody):
    from prefect.context import refresh_global_settings_context

    os.environ.pop("PREFECT_API_URL", None)
    refresh_global_settings_context()
    assert servers.name_servers(tmp_path)["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "true"
    links = {"prefect": somebody, "mlflow": somebody, "pid": "1"}
    (tmp_path / "ui.json").write_text(json.dumps(links))
    with servers.locks.hold(tmp_path / "ui.lock", "it"):
        assert servers.name_servers(tmp_path) == {"PREFECT_API_URL": f"{somebody}/api"}
    os.environ["PREFECT_API_URL"] = "http://prefect.lab/api"
    refresh_global_settings_context()
    assert servers.name_servers(tmp_path) == {}


@pytest.mark.usefixtures("clean_environment")
def test_write_exports__a_shell_takes_them_and_keeps_what_it_has(tmp_path):
    home = tmp_path / "it's a $HOME"
    variables = environment.describe_environment(home)
    for name in variables:
        os.environ.pop(name, None)
    os.environ["CONTA_HOME"] = "relative"
    os.environ["MLFLOW_TRACKING_URI"] = "http://user:secret@mlflow.lab"
    lines = environment.write_exports(variables)
    assert not any("secret" in line for line in lines)
    script = 'eval "$1"; printf "%s|%s|%s" "$CONTA_HOME" "$MLFLOW_TRACKING_URI" "$DO_NOT_TRACK"'
    shell = subprocess.run(
        ["sh", "-euc", script, "sh", "\n".join(lines)], check=True, capture_output=True, text=True
    )
    assert shell.stdout == f"{home}|http://user:secret@mlflow.lab|true"


def test_resolve_home__absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONTA_HOME", raising=False)
    assert environment.resolve_home() == tmp_path / ".conta"
    monkeypatch.setenv("CONTA_HOME", "there")
    assert environment.resolve_home() == tmp_path / "there"


def test_execute__wrong_use_is_found_before_any_server(tmp_path):
    with pytest.raises(InputError, match="no stage 'crf' to stop after; there are: classifier"):
        launch.execute(parse_config({}), home=tmp_path / "home", until="crf")
    with pytest.raises(InputError, match="but it is 'crf'; change that, or"):
        launch.execute(parse_config({}), home=tmp_path / "home", until="boundary")
    plain = parse_config({"causal": {"context": "none"}})
    with pytest.raises(InputError, match="context 'none' finds no confounders"):
        launch.execute(plain, home=tmp_path / "home", until="confounders")
    for data, message in (
        ({"limit": 20}, "data.limit is for photos; set data.scenes.photos"),
        ({"root": str(tmp_path)}, "source 'scenes' draws its photos, so .* leave --data"),
    ):
        with pytest.raises(InputError, match=message):
            launch.execute(parse_config({"data": data}), home=tmp_path / "home")
    photos = {"data": {"source": "photos"}}
    with pytest.raises(InputError, match="give it with --data DIR"):
        launch.execute(parse_config(photos), home=tmp_path / "home")
    photos["data"]["root"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no folder at .*nowhere"):
        launch.execute(parse_config(photos), home=tmp_path / "home")
    assert not Path(tmp_path / "home").exists()


@pytest.mark.usefixtures("clean_environment")
def test_execute__a_prefect_server_that_died_is_named_with_what_to_do(tmp_path, monkeypatch):
    def lose(*_):
        raise ConnectError("All connection attempts failed")

    gone = servers.Server("http://127.0.0.1:1", "/health")
    monkeypatch.setattr(servers, "open_prefect", lambda _home: gone)
    monkeypatch.setattr("flows.conta.conta_flow", lose)
    with pytest.raises(ContaError, match=r"server at http://127\.0\.0\.1:1 answers no more \(All"):
        launch.execute(parse_config({"name": "toy"}), home=tmp_path)


def test_prepare_new_home__a_database_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    server = servers.Server("http://127.0.0.1:1", "/health")
    with (tmp_path / "lock").open("w") as turn:
        launch._prepare_new_home(dataclasses.replace(server, turn=turn))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    launch._prepare_new_home(server)  # no new home
    assert not (tmp_path / "mlflow.db").exists()
    with (tmp_path / "lock").open("w") as turn:
        launch._prepare_new_home(dataclasses.replace(server, turn=turn))
    assert (tmp_path / "mlflow.db").exists()


def test_ending_politely__sigterm_ends_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, launch._ending_politely():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before

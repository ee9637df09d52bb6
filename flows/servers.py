"""Which Prefect server a run talks to, and the two servers of `conta ui`.

Prefect's ephemeral mode is never used: it costs 11 seconds a run, and kill -9 leaves its server
behind. In its place a server of our own is started on a free loopback port, ended with the run and
bound to the life of this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from flows import locks, runs
from flows.environment import set_defaults
from flows.unfinished import dead_starts, is_dead
from wsss_core.config import is_loopback
from wsss_core.errors import BusyError, ContaError, InputError
from wsss_core.store import write_atomically
from wsss_core.workers import start_process

HOST = "127.0.0.1"
PREFECT_PORT, MLFLOW_PORT = 4200, 5000  # the products' own
READY_S, DRAIN_S = 600.0, 10.0
SETTLE_S = 0.5  # from the last event on the wire to the recorder, which writes it as it stops

_LINKS, _UI_LOCK = "ui.json", "ui.lock"
_FOR_OTHERS = (
    "CANCELLATION_CLEANUP",
    "CLEANUP_RECONCILER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)
"""Services that look every few seconds after schedules, workers, leases and automations. A server
that lives as long as one run has none of them, and each look stops a thread of the training."""
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server, up or on its way.

    Attributes:
        url: Base address, without a slash at the end.
        health: Path that answers 200 once it is up.
        process: The child, if it is ours; somebody else's is up already.
        log: What the child said.
        turn: A lock that other starts wait for, closed when it is up; None if none has to wait.
    """

    url: str
    health: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    turn: IO[str] | None = None

    def wait_ready(self, told: threading.Event | None = None) -> None:
        """Return once it answers, or `told` that nobody waits any more.

        Raises:
            ContaError: If it ended, or needs more than ten minutes.
        """
        if self.process is None:
            return
        end = time.monotonic() + READY_S
        while not (told is not None and told.is_set()) and not is_up(self.url + self.health):
            if self.process.poll() is not None or time.monotonic() > end:
                self._yield_turn()
                raise ContaError(
                    f"the server at {self.url} did not start; it said why in {self.log}"
                )
            time.sleep(0.1)
        self._yield_turn()

    def stop(self) -> None:
        """End it if it is ours, politely first."""
        if self.process is None:
            return
        self._yield_turn()
        self.process.terminate()
        self.process.wait()  # its watcher kills what does not heed

    def _yield_turn(self) -> None:
        if self.turn is not None:
            self.turn.close()


def is_up(url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether a GET of `url` answers with success; asked directly, past any proxy."""
    try:
        with _direct.open(url, timeout=timeout_s) as answer:
            return bool(200 <= answer.status < 300)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def open_prefect(home: Path) -> Server:
    """The Prefect server for a run: the user's, that of a live `conta ui`, or one of our own.

    Prefect in this process is pointed at it. A server of our own may need some seconds more to be
    up: import what is slow, then `wait_ready`.

    Raises:
        InputError: If the user's does not answer.
    """
    server = _find_prefect(home)
    if server is None:
        server = _start_prefect(home, find_free_port(), with_pages=False)
        # a link to it would be dead in a minute; `conta ui` will show the run there
        os.environ.setdefault("PREFECT_UI_URL", f"http://{HOST}:{PREFECT_PORT}")
        _point_prefect(server)
    return server


def join_prefect(home: Path) -> Server:
    """The Prefect server for what has to outlast a run: the user's, or that of a live `conta ui`.

    Raises:
        InputError: If there is none, or the user's does not answer.
    """
    server = _find_prefect(home)
    if server is None:
        raise InputError(
            "there is no Prefect server that stays; start `conta ui` in another terminal, "
            "or set PREFECT_API_URL"
        )
    return server


def _find_prefect(home: Path) -> Server | None:
    from prefect.client.orchestration import get_client

    given = _given_api()
    if given is not None:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is not None:
            raise InputError(
                f"the Prefect server at {given} does not answer; start it, "
                "or unset PREFECT_API_URL to let conta bring its own"
            )
        return Server(given, "/health")
    links = live_ui(home)
    if links is None:
        return None
    server = Server(links["prefect"], "/api/health")
    os.environ.setdefault("CONTA_MLFLOW_PAGES", links["mlflow"])
    _point_prefect(server)
    return server


def _point_prefect(server: Server) -> None:
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = f"{server.url}/api"
    refresh_global_settings_context()


def name_servers(home: Path) -> dict[str, str]:
    """What `prefect` has to be told beside the environment of `home`, to find a server there.

    The user's address is set already, and wins. Without one it is that of a live `conta ui`, or
    leave to bring an ephemeral server: 11 seconds a command, but it reads the same database.
    """
    if _given_api() is not None:
        return {}
    links = live_ui(home)
    if links is not None:
        return {"PREFECT_API_URL": f"{links['prefect']}/api"}
    return {
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": f"{READY_S:.0f}",
    }


def _given_api() -> str | None:
    """The address of the user's Prefect server, from the environment or the active profile."""
    from prefect.settings import PREFECT_API_URL

    given = PREFECT_API_URL.value()
    return str(given) if given else None


def close_prefect(server: Server) -> None:
    """Let Prefect say what it still has to say, then end the server if it is ours."""
    if server.process is None:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    if server.process.poll() is None:  # a dead one hears nothing
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=DRAIN_S)
        time.sleep(SETTLE_S)
    server.stop()
    os.environ.pop("PREFECT_API_URL", None)


def live_ui(home: Path) -> dict[str, str] | None:
    """Addresses of the `conta ui` on this home, `prefect` and `mlflow`; None without one.

    What a dead one wrote down is not believed: another home's may listen at these ports now.
    """
    holder = locks.find_holder(home / _UI_LOCK)
    if holder is None or holder.host != socket.gethostname():
        return None
    try:
        links: dict[str, str] = json.loads((home / _LINKS).read_text())
        alive = all(
            is_up(links[name] + path)
            for name, path in (("prefect", "/api/health"), ("mlflow", "/health"))
        )
    except (OSError, ValueError, KeyError):
        return None
    return links if alive else None


def start_ui(home: Path, *, say: Callable[[str], None]) -> None:
    """Serve Prefect's and MLflow's pages of this home until Ctrl-C or SIGTERM.

    If they are served already, or about to be, says where and returns.

    Args:
        home: CONTA_HOME.
        say: Gets each line for the user.

    Raises:
        InputError: If the environment asks for pages that the network can see.
        BusyError: If another host serves this home.
    """
    refuse_open_bind()
    set_defaults(home)
    lock = home / _UI_LOCK
    first = locks.find_holder(lock)
    if first is None:
        with locks.hold(lock, "conta ui"):
            _serve(home, say)
        return
    if first.host != socket.gethostname():
        raise BusyError(f"conta ui of {home} runs in {first}; its pages can be seen there alone")
    say(f"already up, or on its way ({first})")
    end = time.monotonic() + READY_S
    while (links := live_ui(home)) is None:
        if locks.find_holder(lock) is None or time.monotonic() > end:
            raise ContaError(f"the conta ui in {first} does not answer; stop it and try again")
        time.sleep(0.5)
    _say_links(home, links, say)


def refuse_open_bind() -> None:
    """Refuse to serve pages without a password to a network.

    Raises:
        InputError: If a variable of Prefect's or MLflow's asks for more than this machine.
    """
    for name in ("PREFECT_SERVER_API_HOST", "MLFLOW_HOST"):
        host = os.environ.get(name, HOST)
        if not is_loopback(host):
            raise InputError(
                f"{name} is {host!r}, but `conta ui` asks nobody for a password, so it serves "
                f"{HOST} alone; unset {name}, or use docker/compose.yaml, which has passwords"
            )


def _serve(home: Path, say: Callable[[str], None]) -> None:
    (home / _LINKS).unlink(missing_ok=True)  # of one that was killed
    servers = [_start_prefect(home, find_free_port(PREFECT_PORT), with_pages=True)]
    try:
        with until_told() as told:
            _make_database()
            servers.append(_start_mlflow(home, find_free_port(MLFLOW_PORT)))
            for server in servers:
                server.wait_ready(told)
            if told.is_set():
                return
            links = {"prefect": servers[0].url, "mlflow": servers[1].url, "pid": str(os.getpid())}
            write_atomically(home / _LINKS, json.dumps(links, indent=1).encode())
            _say_links(home, links, say)
            say("Ctrl-C ends both")
            _settle(home, links, say)
            while not told.wait(0.5):
                for server in servers:
                    if server.process is not None and server.process.poll() is not None:
                        raise ContaError(
                            f"the server at {server.url} ended; it said why in {server.log}"
                        )
    finally:
        (home / _LINKS).unlink(missing_ok=True)
        for server in servers:
            server.stop()


def _make_database() -> None:
    """A server that is stopped while it makes a new one leaves behind what nobody can open."""
    if not Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).exists():
        from tasks.tracking import make_database

        make_database(os.environ["MLFLOW_TRACKING_URI"])


def _settle(home: Path, links: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Close what dead runs left open, for the pages would show them as running."""
    if dead_starts(home) or any(is_dead(home, run) for run in runs.list_runs(home)):
        if _given_api() is None:
            _point_prefect(Server(links["prefect"], "/api/health"))
        from flows.settle import settle_dead

        settle_dead(home, note=say)


def find_free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
            return int(listener.getsockname()[1])
    raise ContaError(f"no free port on {HOST}; close some programs and try again")


def _start_prefect(home: Path, port: int, *, with_pages: bool) -> Server:
    command = ["-m", "prefect", "--no-prompt", "server", "start"]
    environment = {
        "PREFECT_SERVER_UI_ENABLED": str(with_pages).lower(),
        # the pages ask this address, which is ours and not the one of a user's profile
        "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
        # Prefect's own "*" lets any page that a browser shows read the runs and their reports
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        # one transaction an event lags seconds behind, and what it has not seen dies with it
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "1000",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    }
    if not with_pages:
        for service in _FOR_OTHERS:
            environment[f"PREFECT_SERVER_SERVICES_{service}_ENABLED"] = "false"
        environment["PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"] = "[]"
    turn = _take_turn(home / "prefect.db")
    server = _start(home, "prefect", command, port, environment, health="/api/health")
    return replace(server, turn=turn)


def _take_turn(database: Path) -> IO[str] | None:
    """A lock for the one who makes a database; None, at once or once it is made, if it is there.

    Of two Prefect servers that make the same SQLite file one ends with "database is locked".
    """
    lock = locks.open_lock(database.with_name(f".{database.name}.lock"))
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not database.exists():
        return lock
    lock.close()
    return None


def _start_mlflow(home: Path, port: int) -> Server:
    command = ["-m", "mlflow", "server", "--workers", "1", "--no-serve-artifacts"]
    command += ["--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"]]
    command += ["--default-artifact-root", (home / "mlartifacts").as_uri()]
    return _start(home, "mlflow", command, port, {}, health="/health")


def _start(
    home: Path,
    name: str,
    command: Sequence[str],
    port: int,
    environment: Mapping[str, str],
    *,
    health: str,
) -> Server:
    log = home / "logs" / f"{name}-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = start_process(
            [sys.executable, *command, "--host", HOST, "--port", str(port)],
            env=os.environ | environment,
            **_detached(output),
        )
    return Server(f"http://{HOST}:{port}", health, process, log)


def _detached(output: IO[bytes]) -> dict[str, IO[bytes] | int]:
    return {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}


def _say_links(home: Path, links: Mapping[str, str], say: Callable[[str], None]) -> None:
    say(f"Prefect  {links['prefect']}")
    say(f"MLflow   {links['mlflow']}{charts_path(home)}")


def charts_path(home: Path) -> str:
    """The charts of the experiment that was worked on last, as a path of MLflow's pages."""
    for run in runs.list_runs(home):
        found = re.search(r"/experiments/(\d+)/", run.mlflow_url or "")
        if found:
            return f"/#/experiments/{found[1]}/runs?compareRunsMode=CHART"
    return "/#/experiments"


@contextlib.contextmanager
def until_told() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    told = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [signal.signal(number, lambda *_: told.set()) for number in numbers]
    try:
        yield told
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)

"""Faults in a real run: nothing is lost, the same command ends with the same digests.

Each test prints what it cost; docs/reliability.md has the table.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows.environment import describe_environment
from flows.locks import find_holder
from flows.runs import lock_path
from flows.servers import find_free_port
from tasks.tracking import _clean
from tests.chaos import RECIPE, Victim
from wsss_core.config import load_recipe

# three shards, so that there is a pool
SMALL = ["runtime.threads=1", "rounds=0", "data.val=[val]", "data.scenes.photos=60"]
CONTA = [sys.executable, "-m", "flows.cli"]
COMMAND = [*CONTA, "run", str(RECIPE)]
COMMAND += [word for text in SMALL for word in ("--set", text)]
PATIENCE_S = 900.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.flow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


class House(Victim):
    """A home in which a fault happens to the small run; its Prefect server is the session's."""

    grace_s = 60.0  # a busy machine needs long to let a process end

    def __init__(self, home, database):
        super().__init__(home, COMMAND)
        home.mkdir(exist_ok=True)
        shutil.copy(database, home / "mlflow.db")  # making one takes seconds

    def start(self, *settings, **environment):
        return super().start(*settings, **describe_environment(self.home) | environment)

    def finish(self, fault, expected, **environment):
        """Give the same command again; everything has to be there then, and nobody left."""
        started = time.monotonic()
        self.start_and_wait(**environment)
        self.check(expected)
        cost = {"fault": fault, "recovery_s": round(time.monotonic() - started, 1)}
        print(json.dumps(cost | {"processes_left": self.processes_left}))

    def check(self, expected):
        assert self.digests() == expected
        assert self.processes_left == 0
        assert self.record()["status"] == "finished"

    def check_stopped(self):
        """The record says so, nobody holds the run, and no half artifact has its final name."""
        assert self.record()["status"] == "stopped"
        assert find_holder(lock_path(self.home, self.record()["name"])) is None
        assert list(self.home.glob("starts/*")) == []
        assert list(self.home.glob("store/segmenter/[!.]*")) == []

    def record(self):
        (path,) = self.home.glob("runs/*/run.json")
        return json.loads(path.read_text())

    def output(self):
        return (self.home / "output.txt").read_text()

    def start_and_fail(self, code):
        """Start the command; it has to end by itself with this exit code."""
        with self.start() as child:
            assert child.wait(PATIENCE_S) == code, self.output()
        self.count_left()

    @contextmanager
    def under_way(self, stage, **environment):
        """The command, from the moment at which it makes the artifact of a stage."""
        with self.start(**environment) as child:
            try:
                wait_until(lambda: list(self.home.glob(f"store/{stage}/.tmp-*")), child)
                yield child
            finally:
                child.kill()

    def processes(self, text):
        """Ids of the processes of this home whose command line holds `text`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"CONTA_HOME={self.home}\0".encode() in (folder / "environ").read_bytes()
                if ours and text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found


def wait_until(condition, child=None):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert child is None or child.poll() is None
        time.sleep(0.01)
    return found


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def calm(tmp_path_factory, empty_mlflow, prefect_server):
    house = House(tmp_path_factory.mktemp("calm"), empty_mlflow)
    started = time.monotonic()
    house.start_and_wait()
    print(json.dumps({"undisturbed_s": round(time.monotonic() - started, 1)}))
    assert house.processes_left == 0
    return house


@pytest.fixture
def house(tmp_path, empty_mlflow, prefect_server):
    return House(tmp_path / "home", empty_mlflow)


def test_death_of_the_process(house, calm):
    with house.under_way("segmenter") as child:
        child.kill()
        child.wait()
    house.count_left()
    assert house.processes_left == 0
    house.finish("kill -9 of the process", calm.digests())


def test_death_of_a_worker(house, calm):
    with house.under_way("cams") as child:

        def workers():
            servers = house.processes("multiprocessing.forkserver")
            return [pid for pid in servers if parent_of(pid) in servers]

        for pid in wait_until(workers, child):
            os.kill(pid, signal.SIGKILL)
        assert child.wait(PATIENCE_S) == 1
    house.count_left()
    assert "a worker process died during" in house.output()
    house.finish("kill -9 of the workers", calm.digests())


def test_death_of_the_tree(house, calm):
    with house.under_way("segmenter") as child:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    house.count_left()
    house.finish("kill -9 of the tree", calm.digests())


def test_death_of_the_prefect_server(house, calm):
    own = {"PREFECT_API_URL": None}  # the run brings a server of its own
    with house.under_way("classifier", **own) as child:
        for pid in house.processes("prefect\0--no-prompt\0server"):
            os.kill(pid, signal.SIGKILL)
        code = child.wait(PATIENCE_S)
        outlived_s = time.time() - house.record()["finished_ms"] / 1000
    house.count_left()
    print(json.dumps({"outlived_s": round(outlived_s, 1), "processes_left": house.processes_left}))
    house.check(calm.digests())  # nothing was lost but what Prefect's page shows
    assert code == 1
    assert outlived_s < 180  # 30 s of it is asking; a busy machine needs the rest to exit
    assert "conta: the Prefect server at http://" in house.output().splitlines()[-1]
    assert "run the same command again" in house.output().splitlines()[-1]
    house.finish("kill -9 of the Prefect server", calm.digests(), **own)
    assert "round 0: 19 of 19 stages were there" in house.output()
    assert read_flow_runs(house.home) == ["CRASHED", "COMPLETED"]


def test_death_of_the_mlflow_server(house, calm):
    port = find_free_port()
    tracked = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with serve_mlflow(house.home, port), house.under_way("classifier", **tracked) as child:
        for pid in house.processes("mlflow"):
            if pid != child.pid:
                os.kill(pid, signal.SIGKILL)
        assert child.wait(PATIENCE_S) == 0
    house.count_left()
    assert house.output().count("MLflow failed") == 1
    house.check(calm.digests())  # the scores are in the manifests
    assert "seg_val/miou" not in read_points(house.home)
    started = time.monotonic()
    with serve_mlflow(house.home, port), house.start(**tracked) as child:
        assert child.wait(PATIENCE_S) == 0
    house.count_left()
    assert house.processes_left == 0
    print(json.dumps({"fault": "MLflow server", "sync_s": round(time.monotonic() - started, 1)}))
    made = house.record()["rounds"][0]["manifests"]
    expected = {f"seconds/{label}": manifest["seconds"] for label, manifest in made.items()}
    for manifest in made.values():
        expected |= manifest["metrics"]
    assert read_points(house.home) == {_clean(name): [(0, v)] for name, v in expected.items()}
    assert house.mlflow() == (1, 1)


@contextmanager
def serve_mlflow(home, port):
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
    command += ["--artifacts-destination", str(home / "mlartifacts")]
    settings = {
        "CONTA_HOME": str(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with subprocess.Popen(
        command,
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def answers(url):
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=5) as page:
            return page.status == 200
    except OSError:
        return False


def read_points(home):
    """(step, value) of every metric of the home's one run."""
    chosen = (
        "select key, step, value from metrics where run_uuid not in "
        "(select run_uuid from tags where key = 'mlflow.parentRunId') order by step"
    )
    found = {}
    with closing(sqlite3.connect(home / "mlflow.db")) as base:
        for name, *point in base.execute(chosen):
            found.setdefault(name, []).append(tuple(point))
    return found


def read_flow_runs(home):
    """State of each flow run in the home's own Prefect database, the earliest first."""
    with closing(sqlite3.connect(home / "prefect.db")) as base:
        rows = base.execute("select state_type from flow_run order by created")
        return [state for (state,) in rows]


@pytest.fixture
def small_disk(house, calm):
    """A disk of its own for the store, on which the segmenter is too much."""
    store = house.home / "store"
    store.mkdir(parents=True)
    before = ("scenes", "truth", "classifier", "score_classifier", "cams", "score_cams", "masks")
    pages = sum(
        -(-path.stat().st_size // 4096) + 1
        for name in (*before, "score_masks", "audit", "audit_blur")
        for path in (calm.home / "store" / name).rglob("*")
    )
    (weights,) = (calm.home / "store" / "segmenter").rglob("*.safetensors")
    size = pages * 4096 + weights.stat().st_size // 2
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(store)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted")
    yield store
    subprocess.run(["umount", str(store)], check=True)


def test_full_disk(house, calm, small_disk):
    house.start_and_fail(1)
    assert f"the disk of {small_disk} is full; free space and run the same" in house.output()
    assert [stop.name for stop in small_disk.glob("segmenter/[!.]*")] == []
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    house.finish("full disk", calm.digests())


def test_sigterm(house, calm):
    with house.under_way("segmenter") as child:
        child.terminate()
        assert child.wait(PATIENCE_S) == 143, house.output()
    house.count_left()
    house.check_stopped()
    assert read_state(house.record()["prefect_run"]) == "Crashed"
    house.finish("SIGTERM", calm.digests())


@contextmanager
def deployed_run(house):
    """A run of `conta deploy` in its segmenter; in the end the deployment gets a SIGTERM."""
    config = load_recipe(RECIPE, SMALL)
    deploy = Victim(house.home, [*CONTA, "deploy", str(RECIPE)])
    with deploy.start(**describe_environment(house.home)) as child:
        try:
            flow_run = wait_until(lambda: ask_for_run(config), child)
            wait_until(lambda: list(house.home.glob("store/segmenter/.tmp-*")), child)
            yield child, flow_run
        finally:
            child.terminate()
    house.count_left()


def test_cancel_on_prefects_page(house, calm):
    """SIGTERM comes from `conta deploy`, whose page was told to cancel."""
    with deployed_run(house) as (child, flow_run):
        started = time.monotonic()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run, Cancelling())
        wait_until(lambda: read_state(flow_run) == "Cancelled", child)
        wait_until(lambda: house.processes("") == [child.pid], child)  # no worker, no server
        print(json.dumps({"cancelled_s": round(time.monotonic() - started, 1)}))
    assert house.record()["prefect_run"] == str(flow_run)
    house.check_stopped()
    house.finish("cancel on Prefect's page", calm.digests())
    assert read_state(flow_run) == "Cancelled"


def test_sigterm_to_a_deployment(house, calm):
    """The run at work stops as if it had been told itself."""
    with deployed_run(house) as (_child, flow_run):
        pass
    house.check_stopped()
    assert read_state(flow_run) == "Crashed"
    house.finish("SIGTERM to conta deploy", calm.digests())


def ask_for_run(config):
    """Id of a flow run with these settings, once their deployment is there."""
    parameters = {"config": config.model_dump(mode="json")}
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        deployment = client.read_deployment_by_name(f"conta/{config.name}")
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id


def read_state(flow_run):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(flow_run))).state.name


def test_flipped_byte(house, calm):
    house.start_and_wait()
    mask = min(house.home.glob("store/masks/*/*.png"))
    before, content = mask.stat(), bytearray(mask.read_bytes())
    content[len(content) // 2] ^= 1
    mask.write_bytes(content)
    os.utime(mask, ns=(before.st_atime_ns, before.st_mtime_ns))
    house.finish("flipped byte", calm.digests())
    assert f"rebuilt masks: {mask.name} was changed" in house.output()


def test_second_writer(house, calm):
    """Of the same run: refused. Of another run that needs the same artifacts: it waits for them."""
    started = time.monotonic()
    with house.under_way("classifier") as child:
        with house.start() as again:
            assert again.wait(PATIENCE_S) == 2
        assert (
            f"is at work already in host {os.uname().nodename}, pid {child.pid}" in house.output()
        )
        with house.start("name=twin") as twin:
            assert child.wait(PATIENCE_S) == twin.wait(PATIENCE_S) == 0
    house.count_left()
    assert house.processes_left == 0
    assert house.digests("scenes-smoke-*") == house.digests("twin-*") == calm.digests()
    assert "waiting for " in house.output()
    print(json.dumps({"fault": "second writer", "both_s": round(time.monotonic() - started, 1)}))


def test_read_only_store(house, calm):
    store = house.home / "store"
    with house.under_way("classifier") as child, made_read_only(store):
        assert child.wait(PATIENCE_S) == 1
    house.count_left()
    assert f"{store}/" in house.output()
    assert "cannot be written; check its owner and permissions" in house.output()
    house.finish("read-only store", calm.digests())


@contextmanager
def made_read_only(folder):
    """By its mode; root does not heed that, but a file attribute of Linux."""
    lock, unlock = ["chmod", "a-w"], ["chmod", "u+w"]
    if os.geteuid() == 0:
        lock, unlock = ["chattr", "+i"], ["chattr", "-i"]
    if subprocess.run([*lock, folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system knows no attribute that root heeds")
    try:
        yield
    finally:
        subprocess.run([*unlock, folder], check=True)

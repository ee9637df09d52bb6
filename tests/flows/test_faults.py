"""Ten faults in a real run: nothing is lost, the same command ends with the same digests.

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

import pytest

from flows.environment import describe_environment
from flows.servers import find_free_port
from tests.chaos import RECIPE, Victim

# three shards, so that there is a pool
SMALL = ["runtime.threads=1", "rounds=0", "data.val=[val]", "data.scenes.photos=60"]
COMMAND = [sys.executable, "-m", "flows.cli", "run", str(RECIPE)]
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

    def finish(self, fault, expected):
        """Give the same command again; everything has to be there then, and nobody left."""
        started = time.monotonic()
        self.start_and_wait()
        self.check(expected)
        cost = {"fault": fault, "recovery_s": round(time.monotonic() - started, 1)}
        print(json.dumps(cost | {"processes_left": self.processes_left}))

    def check(self, expected):
        assert self.digests() == expected
        assert self.processes_left == 0
        assert self.record()["status"] == "finished"

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
    with house.under_way("classifier", PREFECT_API_URL=None) as child:
        for pid in house.processes("prefect\0--no-prompt\0server"):
            os.kill(pid, signal.SIGKILL)
        code = child.wait(PATIENCE_S)
    house.count_left()
    print(json.dumps({"exit_code": code, "last_line": house.output().splitlines()[-1]}))
    house.finish("death of the Prefect server", calm.digests())


def test_death_of_the_mlflow_server(house, calm):
    port = find_free_port()
    tracked = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # else it asks for minutes
    }
    with serve_mlflow(house.home, port), house.under_way("classifier", **tracked) as child:
        for pid in house.processes("mlflow"):
            if pid != child.pid:
                os.kill(pid, signal.SIGKILL)
        assert child.wait(PATIENCE_S) == 0
    house.count_left()
    assert house.output().count("MLflow failed") == 1
    house.check(calm.digests())  # the scores are in the manifests
    assert read_points(house.home, "seg_val/miou") == []
    started = time.monotonic()
    with serve_mlflow(house.home, port), house.start(**tracked) as child:
        assert child.wait(PATIENCE_S) == 0
    print(json.dumps({"fault": "MLflow server", "sync_s": round(time.monotonic() - started, 1)}))
    expected = house.record()["rounds"][0]["manifests"]["score_segmenter/val"]["metrics"]
    assert read_points(house.home, "seg_val/miou") == [(0, expected["seg_val/miou"])]


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


def read_points(home, name):
    chosen = (
        "select step, value from metrics where key = ? and run_uuid not in "
        "(select run_uuid from tags where key = 'mlflow.parentRunId') order by step"
    )
    with closing(sqlite3.connect(home / "mlflow.db")) as base:
        return base.execute(chosen, (name,)).fetchall()


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


def test_sigterm_from_a_cancel(house, calm):
    with house.under_way("segmenter") as child:
        child.terminate()
        assert child.wait(PATIENCE_S) == 143, house.output()
    house.count_left()
    assert house.record()["status"] == "stopped"
    house.finish("SIGTERM", calm.digests())


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

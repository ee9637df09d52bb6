"""`conta ui` as a person starts and stops it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.chaos import count_processes

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "flows.cli", "ui"]

pytestmark = pytest.mark.slow


def fetch(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as page:
        return page.read().decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ui__both_pages_and_no_process_left(tmp_path, number):
    home = tmp_path / "home"
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT", "MLFLOW"))}
    options = {"cwd": ROOT, "env": {**kept, "CONTA_HOME": str(home)}, "text": True}
    started = time.monotonic()
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, **options) as first:
        lines = [first.stdout.readline().rstrip() for _ in range(3)]
        print(f"ready after {time.monotonic() - started:.1f} s")
        links = json.loads((home / "ui.json").read_text())
        assert lines == [
            f"Prefect  {links['prefect']}",
            f"MLflow   {links['mlflow']}/#/experiments",
            "Ctrl-C ends both",
        ]
        assert links["pid"] == str(first.pid)
        assert all(url.startswith("http://127.0.0.1:") for url in (lines[0].split()[1],))
        assert "<title>Prefect" in fetch(links["prefect"])
        assert "<title>MLflow" in fetch(links["mlflow"])
        second = subprocess.run(COMMAND, capture_output=True, check=True, **options)
        assert second.stdout.splitlines()[1:] == lines[:2]
        first.send_signal(number)
        assert first.wait(60) == 0
    assert not (home / "ui.json").exists()
    deadline = time.monotonic() + 10
    while (left := count_processes(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == 0

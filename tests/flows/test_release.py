"""A home that the present release wrote: today's code compares, predicts from and resumes it.

The release's own code makes the home, out of git, so nothing of it has to be kept here. Where the
history is not there (a shallow clone), the test is skipped and says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import describe_environment
from tests.chaos import RECIPE

RELEASE = "0072a2a"
"""Commit of 0.1.0; a new release that can no longer read this home says so in its changelog."""

ROOT = Path(__file__).parents[2]
SMALL = ["runtime.threads=1", "data.val=[val]", "data.scenes.photos=8", "data.scenes.val_photos=4"]

pytestmark = [pytest.mark.slow, pytest.mark.flow]


def conta(code: Path, home: Path, *arguments: str) -> str:
    """What `conta` of the given code says, which has to succeed."""
    with start(code, home, *arguments) as child:
        out, err = child.communicate()
    assert child.returncode == 0, out + err
    return out


def start(code: Path, home: Path, *arguments: str) -> subprocess.Popen[str]:
    own = {"PYTHONPATH": str(code), "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=code,
        env=own | describe_environment(home),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_in_round_1(child: subprocess.Popen[str], home: Path) -> None:
    """kill -9 of the process tree once there is a second classifier."""
    with child:
        while len(list(home.glob("store/classifier/*/manifest.json"))) < 2:
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run of the release, and one that stopped in the middle of its second round."""
    code, home = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("old") / "home"
    archive = subprocess.run(
        ["git", "archive", RELEASE], cwd=ROOT, check=False, capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"commit {RELEASE} is not in this clone")
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive.stdout, check=True)
    small = [word for text in SMALL for word in ("--set", text)]
    recipe = str(code / "recipes" / RECIPE.name)
    conta(code, home, "run", recipe, *small, "--set", "name=done", "--rounds", "0")
    kill_in_round_1(start(code, home, "run", recipe, *small, "--set", "name=half"), home)
    return home


def test_release__its_runs_are_compared(home):
    rows = json.loads(conta(ROOT, home, "compare", "--json"))
    names = {row["run"].rpartition("-")[0] for row in rows}
    assert names == {"done", "half"}
    done = next(row for row in rows if row["run"].startswith("done"))
    assert {"cam/miou", "pseudo/miou", "seg_val/miou", "seconds"} < set(done["metrics"])


def test_release__its_segmenter_predicts(home, tmp_path):
    (run,) = (path.name for path in home.glob("runs/done-*"))
    photos = next(home.glob("store/scenes/*/JPEGImages"))
    conta(ROOT, home, "predict", str(photos), "--model", run, "-o", str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == len(list(photos.iterdir()))


def test_release__a_run_that_it_left_is_finished(home):
    (run,) = (path.name for path in home.glob("runs/half-*"))
    before = {path: path.stat().st_mtime_ns for path in home.glob("store/*/*/manifest.json")}
    assert run in conta(ROOT, home, "resume")
    conta(ROOT, home, "resume", run)
    record = json.loads((home / "runs" / run / "run.json").read_text())
    assert record["status"] == "finished"
    kept = [path for path, at in before.items() if path.exists() and path.stat().st_mtime_ns == at]
    assert kept == list(before)  # what the release computed is not touched

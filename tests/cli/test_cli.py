"""What a user sees: one line, the right exit code, no traceback."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import flows.doctor
from flows.runs import Run, save_run
from wsss_core.data.images import write_mask
from wsss_core.data.scenes import write_scenes
from wsss_core.errors import ContaError, DataError

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "scenes_smoke.yaml"


def test_main__usage_errors_are_2(conta):
    for arguments in (
        ["nonsense"],
        ["run"],
        ["predict", "a"],
        ["data", "scenes", "a", "--size", "x"],
    ):
        answer = conta(*arguments)
        assert answer.code == 2, arguments
        assert "Usage: conta" in answer.err
        assert "Traceback" not in answer.err


def test_main__bad_input_is_one_line_and_2(conta, tmp_path):
    cases = {
        ("run", "nowhere.yaml"): "no recipe at nowhere.yaml",
        ("run", SMOKE, "--set", "classifer.training.epochs=1"): (
            "unknown setting 'classifer' (did you mean 'classifier'?)"
        ),
        ("run", SMOKE, "--rounds", "-1"): "rounds: ",
        ("run", SMOKE, "--limit", "0"): "data.limit: ",
        ("data", "check", tmp_path / "none"): "is no folder",
        ("data", "scenes", tmp_path / "s", "--confounding", "1"): "data.scenes.confounding: ",
        ("score", tmp_path, tmp_path, "--labels", tmp_path / "none"): "none does not exist",
        ("predict", tmp_path, "--model", "none", "-o", tmp_path / "out"): "no run in",
        ("compare", "none"): "no run in",
    }
    for arguments, said in cases.items():
        answer = conta(*arguments)
        assert answer.code == 2, (arguments, answer)
        assert said in answer.err, (arguments, answer)
        (line,) = answer.err.splitlines()
        assert line.startswith("conta: ")
        assert not answer.out


def test_run__sugar_and_set(conta, monkeypatch):
    seen = {}

    def plan(config, *, home, until):
        seen.update(config=config, home=home)
        return ["round 0 classifier: miss, never made"]

    monkeypatch.setattr("flows.launch.plan", plan)
    answer = conta(
        *("run", SMOKE, "--dry-run", "--data", "a: b", "--rounds", 3, "--seed", 7, "--limit", 5),
        *("--set", "segmenter.head=deeplabv3plus", "--set", "seed=8"),
    )
    assert answer.code == 0, answer
    assert answer.out == "round 0 classifier: miss, never made\n"
    config = seen["config"]
    assert config.data.root == Path("a: b")
    assert (config.rounds, config.data.limit, config.segmenter.head) == (3, 5, "deeplabv3plus")
    assert config.seed == 8  # --set is the last word


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ContaError("the loss is nan"), 1, "conta: the loss is nan\n"),
        (DataError("a.jpg is empty"), 2, "conta: a.jpg is empty\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_main__exit_codes(conta, monkeypatch, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr("flows.environment.resolve_home", fail)
    answer = conta("doctor")
    assert (answer.code, answer.err) == (code, said)


def test_main__our_own_fault_keeps_its_traceback(conta, monkeypatch, tmp_path):
    def fail(home):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("flows.doctor.examine", fail)
    answer = conta("doctor")
    assert answer.code == 1
    (line,) = answer.err.splitlines()
    log = tmp_path / "home" / "fault.log"
    assert line.startswith("conta: RuntimeError: two lines; this is a fault of ours")
    assert str(log) in line
    assert "in fail" in log.read_text()


def test_main__closed_pipe_is_quiet():
    command = f"{sys.executable} -m flows.cli run --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, check=False, capture_output=True)  # noqa: S602
    assert done.stderr == b""


def test_main__interrupt_is_quiet(tmp_path):
    # tests that a shell started in the background ignore the signal, and so would the child
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    # `data check` waits for a reader of the pipe that it takes for the tag table
    os.mkfifo(tmp_path / "tags.csv")
    command = [sys.executable, "-m", "flows.cli", "data", "check", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, former)
    with child, (tmp_path / "tags.csv").open("w"):  # returns once the child has opened its end
        child.send_signal(signal.SIGINT)
        err = child.communicate(timeout=60)[1]
    assert child.returncode == 130
    assert b"Traceback" not in err


def test_compare__no_runs(conta):
    assert json.loads(conta("compare", "--json").out) == []
    assert "no runs in" in conta("compare").out


def test_score__hand_counted(conta, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("background\ncat\ndog\n")
    true = np.array([[0, 0, 1, 255], [0, 0, 1, 255]], np.uint8)
    ours = np.array([[0, 1, 1, 0], [0, 0, 1, 2]], np.uint8)
    write_mask(tmp_path / "truth" / "a.png", true)
    write_mask(tmp_path / "ours" / "a.png", ours)
    answer = conta("score", tmp_path / "ours", tmp_path / "truth", "--labels", labels, "--json")
    assert answer.code == 0
    report = json.loads(answer.out)
    # background 3 of 4, cat 2 of 3, dog in neither counted map
    assert report["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert report["absent"] == ["dog"]
    table = conta("score", tmp_path / "ours", tmp_path / "truth", "--labels", labels).out
    assert "cat          66.7    66.7   100.0" in table
    assert "mean         70.8" in table
    assert "1 photos; not in the mean, for they occur nowhere: dog" in table


def test_data__scenes_and_check(conta, monkeypatch, tmp_path):
    def write_few(out, config, recorder):
        return write_scenes(out, config.model_copy(update={"val_photos": 4}), recorder)

    monkeypatch.setattr("wsss_core.data.scenes.write_scenes", write_few)
    made = conta("data", "scenes", tmp_path / "scenes", "--photos", 12, "--size", 48)
    assert made.code == 0, made
    checked = conta("data", "check", tmp_path / "scenes")
    assert checked.code == 0, checked
    assert "layout voc, 8 classes" in checked.out
    next((tmp_path / "scenes").glob("JPEGImages/train*.jpg")).write_bytes(b"broken")
    broken = conta("data", "check", tmp_path / "scenes")
    assert broken.code == 2
    assert "fault: " in broken.out


def test_resume__lists_and_knows_the_finished(conta, tmp_path):
    home = tmp_path / "home"
    nothing = f"no runs in {home}; start one with: conta run recipes/scenes.yaml\n"
    assert conta("resume").out == nothing
    run = Run(
        name="toy-1", config={}, data="d", started_ms=1, status="failed", reason="loss is nan"
    )
    save_run(home, run)
    assert "toy-1  failed  before round 0" in conta("resume").out
    run.finish()
    save_run(home, run)
    assert conta("resume").out == f"every run in {home} is finished\n"
    answer = conta("resume", "toy")
    assert (answer.code, answer.out) == (
        0,
        "run toy-1 is finished; see it by: conta compare toy-1\n",
    )
    assert conta("resume", "nope").code == 2


def test_main__a_newer_store_is_one_line(conta, tmp_path):
    mark = tmp_path / "home" / "store" / "format"
    mark.parent.mkdir(parents=True)
    mark.write_text("7\n")
    commands = [
        ("run", SMOKE), ("resume",), ("compare",), ("predict", "a", "--model", "b", "-o", "c"),
        ("export", "masks", "a", "-o", "b"), ("ui",),
        ("store", "du"), ("store", "gc"),
    ]  # fmt: skip
    for arguments in commands:
        answer = conta(*arguments)
        assert answer.code == 1, arguments
        (line,) = answer.err.splitlines()
        assert "has layout 7, this version reads 1; update conta, or set CONTA_HOME" in line


def test_compare__html_is_written_or_one_line(conta, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr("tasks.tracking.keep_page", lambda ids, file: kept.append((ids, file)))
    monkeypatch.setattr("flows.environment.set_defaults", lambda home: None)
    run = Run(name="toy-1", config={}, data="d", started_ms=1, mlflow_run="m1")
    save_run(tmp_path / "home", run)
    file = tmp_path / "page.html"
    answer = conta("compare", "--html", file)
    assert answer.code == 0, answer
    assert answer.err == f"{file}\n"
    assert kept == [(["m1"], file)]
    assert "<title>Rounds of toy-1</title>" in file.read_text()
    (tmp_path / "in_the_way").touch()
    refused = conta("compare", "--html", tmp_path / "in_the_way" / "page.html")
    assert refused.code == 2
    assert "cannot be written (" in refused.err


def test_store__du_and_gc(conta, tmp_path):
    orphan = tmp_path / "home" / "store" / "cams" / "k"
    orphan.mkdir(parents=True)
    (orphan / "a").write_bytes(b"x" * 3_000_000)
    assert "store/cams       1  3.0 MB    3.0 MB" in conta("store", "du").out
    assert "3.0 MB  to free" in conta("store", "gc", "--dry-run").out
    assert orphan.exists()
    assert "3.0 MB  freed" in conta("store", "gc").out
    assert not orphan.exists()


def test_env__prints_exports_alone(conta, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "flows.servers.name_servers", lambda home: {"PREFECT_API_URL": f"at {home}"}
    )
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    answer = conta("env")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0] == f"export CONTA_HOME={tmp_path / 'home'}"
    assert f"export PREFECT_API_URL='at {tmp_path / 'home'}'" in lines
    assert all(line.startswith("export ") for line in lines)
    assert not (tmp_path / "home").exists()


def make_revision(database, revision):
    with contextlib.closing(sqlite3.connect(database)) as opened:
        opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
        opened.execute("INSERT INTO alembic_version VALUES (?)", [revision])
        opened.commit()


@pytest.mark.parametrize(
    ("file", "revision", "said"),
    [
        ("prefect.db", "0123456789ab", "was written by another version of prefect"),
        ("mlflow.db", "0123456789ab", "was written by another version of mlflow"),
        ("mlflow.db", "451aebb31d03", "`mlflow db upgrade sqlite:///{file}`"),  # its first one
        ("mlflow.db", None, "mlflow.db is no database"),
    ],
)
def test_doctor__schema_that_the_product_cannot_use(tmp_path, file, revision, said):
    database = tmp_path / file
    if revision is None:
        database.write_bytes(b"half a file" * 100)
    else:
        make_revision(database, revision)
    before = database.read_bytes()
    (finding,) = (row for row in flows.doctor.examine(tmp_path) if row.name == "schemas")
    assert not finding.ok
    assert said.format(file=database) in finding.text
    assert database.read_bytes() == before


def test_doctor__schema_of_today_and_one_that_prefect_brings_up_to_date(tmp_path):
    make_revision(tmp_path / "prefect.db", "9725c1cbee35")  # its first one
    (tmp_path / "mlflow.db").touch()
    (finding,) = (row for row in flows.doctor.examine(tmp_path) if row.name == "schemas")
    assert (finding.ok, finding.text) == (True, "prefect 9725c1cbee35")


def test_doctor__sound_and_broken(conta, monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(flows.doctor, "FREE_GB", 1e9)
    for slow in ("_look_at_prefect", "_look_at_device"):
        monkeypatch.setattr(flows.doctor, slow, lambda home: "not looked at here")
    monkeypatch.setattr(flows.doctor, "importlib", SimpleNamespace(import_module=missing))
    answer = conta("doctor")
    assert answer.code == 1
    lines = answer.out.splitlines()
    assert [line for line in lines if line.startswith("PROBLEM disk")]
    assert [line for line in lines if line.startswith("PROBLEM dense CRF")]
    assert [line for line in lines if line.startswith("ok      python")]
    assert not (tmp_path / "home").exists()

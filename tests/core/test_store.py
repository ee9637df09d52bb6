"""The store: an artifact is whole and verified, or it is not there; a key is its question."""

import ast
import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from wsss_core import store as store_module
from wsss_core.config import Config, RuntimeConfig, TrainingConfig
from wsss_core.errors import StoreError
from wsss_core.records import Manifest
from wsss_core.store import (
    FORMAT,
    Content,
    Measured,
    Store,
    code_parts,
    code_stamp,
    file_sha256,
    library_versions,
    plain,
    read_index,
    stage_key,
    write_atomically,
)


def write_two(folder):
    (folder / "b").mkdir()
    (folder / "a.png").write_bytes(b"first")
    (folder / "b" / "c.d.npz").write_bytes(b"second")
    return Measured({"loss": 0.5}, [{"epoch": 0.0}])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_publish__files_are_as_readable_as_others_made_here(store):
    def write(folder):
        (folder / "model.bin").touch(mode=0o600)  # as safetensors writes
        return Measured()

    folder = store.folder(store.publish("classifier", "k", write, question={"seed": 3}))
    (store.root / "plain").touch()
    modes = {path.stat().st_mode for path in (*folder.iterdir(), store.root / "plain")}
    assert len(modes) == 1


def test_publish__a_disk_that_knows_no_modes_keeps_the_artifact(store, monkeypatch):
    def write(folder):
        (folder / "model.bin").touch(mode=0o600)
        return Measured()

    def fail(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", fail)
    assert store.open(store.publish("classifier", "k", write))


def test_code_stamp__of_what_made_an_artifact(store):
    question = {"code": code_parts("wsss_core.stages.cams")}
    made = store.publish("cams", "k", write_two, question=question)
    assert store.code_stamp(made) == code_stamp("wsss_core.stages.cams")
    assert store.code_stamp(store.publish("cams", "old", write_two)) is None


def test_publish__then_find_and_read_index(store):
    manifest = store.publish("cams", "k1", write_two, question={"seed": 3})

    assert store.find("cams", "k1") == (manifest, None)
    assert store.peek("cams", "k1") == manifest
    assert store.open(manifest) == store.folder(manifest) == store.root / "cams" / "k1"
    assert (manifest.stage, manifest.key, manifest.count) == ("cams", "k1", 2)
    assert manifest.metrics == {"loss": 0.5}
    assert manifest.history == [{"epoch": 0.0}]
    assert manifest.versions == library_versions()
    assert read_index(store.folder(manifest)) == {"a": "a.png", "b/c.d": "b/c.d.npz"}
    assert abs(manifest.finished_ms / 1000 - time.time()) < 60
    assert store.questions("cams") == [{"seed": 3}]


def test_publish__metrics_that_are_no_numbers_are_left_out(store):
    """JSON has no NaN: a manifest that held one could not be read again."""
    bad = {"good": 0.5, "nan": float("nan"), "inf": float("inf")}
    manifest = store.publish("cams", "k1", lambda folder: Measured(bad))
    assert manifest.metrics == {"good": 0.5}
    assert store.find("cams", "k1") == (manifest, None)


def test_find__nothing_under_the_key(store):
    assert store.find("cams", "k1") == (None, None)
    assert store.peek("cams", "k1") is None
    assert store.questions("cams") == []


def flip_byte(path):
    """Change one byte and leave size and time as they were."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: flip_byte(f / "a.png"), "a.png was changed"),
        (lambda f: flip_byte(f / "b" / "c.d.npz"), "b/c.d.npz was changed"),
        (lambda f: (f / "a.png").unlink(), "a.png is missing"),
        (lambda f: (f / "a.png").write_bytes(b""), "a.png was changed"),
        (lambda f: flip_byte(f / "index.jsonl"), "index.jsonl was changed"),
        (lambda f: (f / "index.jsonl").unlink(), "index.jsonl is missing"),
        (lambda f: flip_byte(f / "manifest.json"), "manifest.json is missing or unreadable"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
        (
            lambda f: (f / "manifest.json").write_bytes(b"{\xff}"),
            "manifest.json is missing or unreadable",
        ),
    ],
)
def test_find__damage_is_named_and_publish_mends_it(store, damage, reason):
    manifest = store.publish("cams", "k1", write_two)
    damage(store.folder(manifest))

    assert store.find("cams", "k1") == (None, reason)
    with pytest.raises(StoreError, match="run the recipe again"):
        store.open(manifest)
    mended = store.publish("cams", "k1", write_two)
    assert mended.digest == manifest.digest
    assert store.find("cams", "k1") == (mended, None)


def test_open__removed_artifact_names_the_next_step(store):
    manifest = Manifest(
        stage="cams", key="k", digest="", count=0, index_sha256="", finished_ms=0, seconds=0
    )
    with pytest.raises(StoreError) as caught:
        store.open(manifest)
    assert str(caught.value) == f"{store.root}/cams/k: it was removed; run the recipe again"


def test_publish__a_hit_is_not_written_again(store):
    first = store.publish("cams", "k1", write_two)
    assert store.publish("cams", "k1", lambda _folder: pytest.fail("written twice")) == first


def test_publish__same_content_has_the_same_digest_under_any_key_and_time(store):
    first = store.publish("cams", "k1", write_two, question={"seed": 1})
    second = store.publish("masks", "k2", write_two)
    assert first.digest == second.digest
    assert first.index_sha256 == second.index_sha256

    def write_other(folder):
        write_two(folder)
        (folder / "a.png").write_bytes(b"First")
        return Measured()

    def write_renamed(folder):
        write_two(folder)
        (folder / "a.png").rename(folder / "z.png")
        return Measured()

    others = {
        store.publish("cams", f"o{i}", w).digest for i, w in enumerate((write_other, write_renamed))
    }
    assert len({first.digest, *others}) == 3


def test_publish__half_written_folder_is_never_seen(store):
    def die(folder):
        (folder / "a.png").write_bytes(b"half")
        assert store.find("cams", "k1") == (None, None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.publish("cams", "k1", die)
    assert store.find("cams", "k1") == (None, None)
    assert store.questions("cams") == []

    def write_one(folder):
        assert not list(folder.iterdir())  # what the dead writer left is gone
        (folder / "b.png").write_bytes(b"whole")
        return Measured()

    assert read_index(store.folder(store.publish("cams", "k1", write_one))) == {"b": "b.png"}


def test_publish__damaged_copy_stays_until_its_successor_is_whole(store):
    manifest = store.publish("cams", "k1", write_two)
    flip_byte(store.folder(manifest) / "a.png")

    def die(_folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.publish("cams", "k1", die)
    assert store.find("cams", "k1") == (None, "a.png was changed")


def test_publish__second_writer_waits_and_takes_the_first_ones(store):
    inside, go = threading.Event(), threading.Event()
    found = {}

    def write_slowly(folder):
        inside.set()
        assert go.wait(10)
        return write_two(folder)

    def publish(name, write):
        found[name] = store.publish("cams", "k1", write)

    first = threading.Thread(target=publish, args=("first", write_slowly))
    second = threading.Thread(
        target=publish, args=("second", lambda _folder: pytest.fail("both wrote"))
    )
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    first.join(10)
    second.join(10)
    assert found["first"] == found["second"]


_HOST = """
import contextlib, pathlib, sys, time
from wsss_core import store

root, host, locks_reach = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
store.socket.gethostname = lambda: host
if not locks_reach:
    store._locked = lambda path: contextlib.nullcontext(path.parent.mkdir(exist_ok=True))

def write(folder):
    (folder / "a.png").write_bytes(b"first")
    (root / f"{host} writes").touch()
    while not locks_reach and len(list(root.glob("* writes"))) < 2:
        time.sleep(0.01)  # until both do
    time.sleep(0.1 if host == "b" else 0.0)
    (folder / "b.png").write_bytes(b"second")
    return store.Measured()

print(store.Store(root / "store").publish("cams", "k1", write).model_dump_json())
"""


@pytest.mark.parametrize("locks_reach", [True, False])
def test_publish__two_hosts_that_make_the_same_do_no_harm(tmp_path, locks_reach):
    """Two processes at once; on some shared disks a lock does not reach the other host."""
    (tmp_path / "store").mkdir()
    command = [sys.executable, "-c", _HOST, str(tmp_path)]
    hosts = [
        subprocess.Popen([*command, host, str(locks_reach)], stdout=subprocess.PIPE, text=True)
        for host in ("a", "b")
    ]
    store, problems = Store(tmp_path / "store"), set()
    while any(host.poll() is None for host in hosts):
        problems.add(store.find("cams", "k1")[1])
    assert problems == {None}  # nobody ever sees half of it
    made = [Manifest.model_validate_json(host.communicate()[0]) for host in hosts]
    assert made[0] == made[1] == store.find("cams", "k1")[0]
    assert made[0].count == 2
    assert len(list(tmp_path.glob("* writes"))) == (1 if locks_reach else 2)
    assert list((tmp_path / "store" / "cams").glob(".tmp-*")) == []


def test_publish__a_copy_that_appears_in_the_last_moment_stands(store, monkeypatch):
    first = store.publish("cams", "k1", write_two)
    looks = iter([(None, None), (None, None), (first, None)])  # before, after writing, too late
    monkeypatch.setattr(store, "find", lambda *_: next(looks))
    monkeypatch.setattr(store_module.shutil, "rmtree", _keep(store.folder(first)))
    assert store.publish("cams", "k1", write_two) == first


def _keep(final):
    rmtree = shutil.rmtree
    return lambda path, **options: None if path == final else rmtree(path, **options)


def test_publish__other_keys_do_not_wait(store):
    def write_nested(folder):
        store.publish("cams", "k2", write_two)
        return write_two(folder)

    store.publish("cams", "k1", write_nested)
    assert store.find("cams", "k2")[0] is not None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no room", "/some/file"),
        OSError(errno.EDQUOT, "no room", "/some/file"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_publish__full_disk_says_what_to_do(store, error):
    def write(folder):
        (folder / "half").write_bytes(b"x" * 1000)
        raise error

    with pytest.raises(StoreError) as caught:
        store.publish("cams", "k1", write)
    assert not list((store.root / "cams").rglob("half"))  # the run's record needs the room
    assert str(caught.value) == (
        f"the disk of {store.root} is full; free space and run the same command again"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_publish__folder_that_cannot_be_written_is_named(store, monkeypatch, number):
    def refuse(*_args):
        raise OSError(number, "refused", "/some/folder")

    monkeypatch.setattr(store_module, "_write_index", refuse)
    with pytest.raises(StoreError) as caught:
        store.publish("cams", "k1", write_two)
    assert str(caught.value) == ("/some/folder cannot be written; check its owner and permissions")


def test_publish__other_failures_pass_through(store):
    def write(_folder):
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        store.publish("cams", "k1", write)


def test_check_format__store_of_another_version_is_refused(store):
    store.publish("cams", "k1", write_two)
    assert (store.root / "format").read_text() == f"{FORMAT}\n"
    store.check_format()
    (store.root / "format").write_text("99\n")
    with pytest.raises(StoreError, match=f"has layout 99, this version reads {FORMAT}; update"):
        store.publish("cams", "k2", write_two)
    (store.root / "format").write_text("0\n")
    with pytest.raises(StoreError, match=f"has layout 0, this version reads {FORMAT}; set"):
        store.check_format()


def test_writer__is_named_while_it_writes(store):
    def write(folder):
        assert store.writer("cams", "k1") == f"host {socket.gethostname()}, pid {os.getpid()}"
        return write_two(folder)

    assert store.writer("cams", "k1") is None
    store.publish("cams", "k1", write)
    assert store.writer("cams", "k1") is None


def test_questions__latest_first_and_broken_ones_left_out(store):
    for number in range(3):
        manifest = store.publish("cams", f"k{number}", write_two, question={"n": number})
        os.utime(store.folder(manifest) / "question.json", ns=(number, number))
    (store.root / "cams" / "k1" / "question.json").write_text("{")
    assert [question["n"] for question in store.questions("cams")] == [2, 0]


def manifest_of(digest, **changes):
    fields = {
        "stage": "s",
        "key": "k",
        "count": 1,
        "index_sha256": "",
        "finished_ms": 0,
        "seconds": 0,
    }
    return Manifest(digest=digest, **(fields | changes))


BASE = {
    "code": "c",
    "settings": TrainingConfig(),
    "seed": 1,
    "precision": "fp32",
    "inputs": {"data": manifest_of("d1"), "split": "val", "x_m": None},
}


@pytest.mark.parametrize(
    "change",
    [
        {"code": "other"},
        {"settings": TrainingConfig(epochs=6)},
        {"seed": 2},
        {"seed": None},
        {"precision": "amp"},
        {"inputs": BASE["inputs"] | {"data": manifest_of("d2")}},
        {"inputs": BASE["inputs"] | {"split": "val_do"}},
        {"inputs": BASE["inputs"] | {"x_m": manifest_of("d3")}},
        {"inputs": {"data": manifest_of("d1"), "split": "val"}},
        {"inputs": {"data": None, "split": "val", "x_m": manifest_of("d1")}},
    ],
)
def test_stage_key__changes_with_each_ingredient(change):
    key = stage_key("classifier", **BASE)
    assert len(key) == 24
    assert stage_key("classifier", **(BASE | change)) != key
    assert stage_key("segmenter", **BASE) != key


@pytest.mark.parametrize(
    "change",
    [
        {"settings": BASE["settings"].model_dump(mode="json")},
        {"inputs": dict(reversed(BASE["inputs"].items()))},
        {
            "inputs": BASE["inputs"]
            | {"data": manifest_of("d1", stage="t", key="other", seconds=9, metrics={"a": 1})}
        },
    ],
)
def test_stage_key__only_content_counts(change):
    assert stage_key("classifier", **(BASE | change)) == stage_key("classifier", **BASE)


def test_plain__settings_become_json():
    class Inner(BaseModel):
        scales: tuple[float, ...] = (1.0, 0.5)

    value = {"a": Inner(), 3: (1, Inner()), "none": None}
    expected = {"a": {"scales": [1.0, 0.5]}, "3": [1, {"scales": [1.0, 0.5]}], "none": None}
    assert plain(value) == expected
    assert json.dumps(plain(value))


def test_content__names_and_bytes_count_and_the_place_does_not(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_two(tmp_path / name)
    first = Content(tmp_path / "a").digest()
    assert plain({"folder": Content(tmp_path / "b")}) == {"folder": first}
    (tmp_path / "b" / "a.png").rename(tmp_path / "b" / "z.png")
    renamed = Content(tmp_path / "b").digest()
    flip_byte(tmp_path / "a" / "a.png")
    assert len({first, renamed, Content(tmp_path / "a").digest()}) == 3
    assert Content(tmp_path / "none").digest() not in {first, renamed}


# --- code stamps ------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small `wsss_core` on disk in the place of ours: `write(module, source)`, then `stamp()`."""
    root = tmp_path / "wsss_core"

    def find_spec(name):
        path = root.joinpath(*name.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return importlib.util.spec_from_file_location(name, file)
        return None

    class Package:
        def write(self, module, source):
            path = root.joinpath(*module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

        def stamp(self):
            store_module._read_code.cache_clear()
            code_parts.cache_clear()
            code_stamp.cache_clear()
            return code_stamp("wsss_core.stages.cams")

    monkeypatch.setattr(store_module.importlib.util, "find_spec", find_spec)
    made = Package()
    made.write("stages.cams", "from wsss_core.seeds.cam import f\nimport wsss_core.config\n")
    made.write("seeds.cam", '"""Doc."""\n\ndef f(x):\n    """More."""\n    return x + 1  # why\n')
    made.write("config", "VALUE = 1\n")
    made.write("other", "VALUE = 1\n")
    yield made
    store_module._read_code.cache_clear()
    code_parts.cache_clear()
    code_stamp.cache_clear()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("seeds.cam", '"""Other."""\n\n\ndef f(x):\n    # reason\n    return x + 1\n'),
        ("seeds.cam", "def f(x): return (x+1)\n"),
        ("seeds.cam", 'def f(x):\n    return x + 1\n\n\n"""Said below."""\n'),
        ("config", "VALUE = 2\n"),  # says what is asked, not how it is computed
        ("other", "VALUE = 2\n"),  # nobody imports it
    ],
)
def test_code_stamp__comments_docstrings_layout_and_strangers_do_not_count(package, module, source):
    before = package.stamp()
    package.write(module, source)
    assert package.stamp() == before


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("seeds.cam", "def f(x):\n    return x + 2\n"),
        ("seeds.cam", "def f(x):\n    return x + 1\n\nK = 'a string that is no docstring'\n"),
        ("stages.cams", "from wsss_core.seeds.cam import f\nf(1)\n"),
        ("stages.cams", "from wsss_core.seeds.cam import f\nfrom wsss_core import other\n"),
    ],
)
def test_code_stamp__any_code_behind_the_stage_counts(package, module, source):
    before = package.stamp()
    package.write(module, source)
    assert package.stamp() != before


def test_code_stamp__reaches_through_imports_inside_functions(package):
    package.write(
        "seeds.cam", "def f(x):\n    from wsss_core import other\n    return other.VALUE\n"
    )
    before = package.stamp()
    assert set(code_parts("wsss_core.stages.cams")) == {
        "wsss_core.stages.cams",
        "wsss_core.seeds.cam",
        "wsss_core.other",
    }
    package.write("other", "VALUE = 2\n")
    assert package.stamp() != before


def test_code_parts__of_the_real_stages_follow_the_rooms():
    """A stage depends on what it computes with, and on nothing that only says what is asked."""
    cams, masks = code_parts("wsss_core.stages.cams"), code_parts("wsss_core.stages.masks")
    assert {"wsss_core.seeds.cam", "wsss_core.causal.intervention"} <= cams.keys()
    assert "wsss_core.expansion.crf" in masks
    assert "wsss_core.expansion.crf" not in cams
    assert "wsss_core.evaluation.confusion" not in masks.keys() | cams.keys()
    for name in ("config", "errors", "records", "store", "observe"):
        assert f"wsss_core.{name}" not in cams


def test_strip_docstrings__function_of_a_docstring_alone_stays_a_function():
    tree = ast.parse('class A:\n    """Doc."""\n\n    def f(self):\n        """Doc."""\n')
    store_module._strip_docstrings(tree)
    assert ast.unparse(tree) == "class A:\n\n    def f(self):\n        pass"


# --- files ------------------------------------------------------------------------------------


def test_write_atomically__replaces_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "sub" / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_write_atomically__failure_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def refuse(_handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store_module.os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_file_sha256__known_value(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_config__runtime_is_in_no_stage_slice():
    """What is never part of a key: no slice of the settings a stage takes contains it."""
    from wsss_core.stages.cams import make_cams
    from wsss_core.stages.classifier import train_classifier
    from wsss_core.stages.masks import expand_masks
    from wsss_core.stages.segmenter import train_segmenter

    one = Config()
    other = one.model_copy(
        update={"runtime": RuntimeConfig(threads=9, workers=7), "rounds": 5, "name": "other"}
    )
    inputs = {"data": manifest_of("d")}
    for stage in (train_classifier, make_cams, expand_masks, train_segmenter):
        assert stage.key(one, **inputs) == stage.key(other, **inputs)

"""What nobody needs is found, and nothing else."""

import pytest

from wsss_core.housekeeping import (
    Roots,
    find_garbage,
    folder_bytes,
    kept_epochs,
    remove_garbage,
)
from wsss_core.store import Measured, Store, scratch_folder

NONE = frozenset()


@pytest.fixture
def home(tmp_path):
    return tmp_path


def publish(home, stage, key, size=10):
    def write(folder):
        (folder / "a.bin").write_bytes(b"x" * size)
        return Measured()

    return Store(home / "store").publish(stage, key, write)


def scratch(home, stage, key, text="{}"):
    folder = scratch_folder(home, stage, key)
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(text)


def found(home, artifacts=NONE, scratch=NONE):
    garbage = find_garbage(home, Roots(frozenset(artifacts), scratch))
    return {item.path.relative_to(home).as_posix(): item.why for item in garbage}


def test_find_garbage__artifacts_without_a_run(home):
    for key in ("a", "b"):
        publish(home, "cams", key)
    publish(home, "masks", "a")
    assert found(home, {("cams", "a"), ("masks", "b")}) == {
        "store/cams/b": "no run refers to it",
        "store/masks/a": "no run refers to it",
    }
    assert found(home, {("cams", "a"), ("cams", "b"), ("masks", "a")}) == {}


def test_find_garbage__scratch(home):
    publish(home, "segmenter", "done")
    for key in ("done", "stopped", "old"):
        scratch(home, "segmenter", key)
    kept = {("segmenter", "done")}
    done = {"scratch/segmenter/done": "its artifact is published"}
    old = {"scratch/segmenter/old": "no run stopped there"}
    assert found(home, kept, frozenset({("segmenter", "stopped")})) == done | old
    assert found(home, kept, None) == done  # not known where a run stopped


def test_find_garbage__what_is_being_written_is_not(home):
    seen = []

    def write(folder):
        seen.append(found(home))
        return Measured()

    scratch(home, "segmenter", "k")
    (home / "store" / "segmenter" / ".tmp-dead").mkdir(parents=True)
    Store(home / "store").publish("segmenter", "k", write)
    dead = {"store/segmenter/.tmp-dead": "left by a process that died"}
    assert seen == [dead]
    assert found(home, {("segmenter", "k")}) == {
        **dead,
        "scratch/segmenter/k": "its artifact is published",
    }


def test_remove_garbage__a_death_on_the_way_leaves_garbage(home, monkeypatch):
    made = publish(home, "cams", "a", size=1000)
    (item,) = find_garbage(home, Roots(NONE, NONE))
    assert item.num_bytes > 1000

    def die(_path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove_garbage(item)
    assert Store(home / "store").find("cams", "a") == (None, None)
    (rest,) = find_garbage(home, Roots(frozenset({("cams", "a")}), NONE))
    remove_garbage(rest)
    assert find_garbage(home, Roots(NONE, NONE)) == []
    assert publish(home, "cams", "a", size=1000).digest == made.digest


def test_folder_bytes__files_links_and_nothing(home):
    (home / "a" / "b").mkdir(parents=True)
    (home / "a" / "b" / "c").write_bytes(b"123")
    (home / "a" / "d").write_bytes(b"4567")
    (home / "a" / "e").symlink_to("/nowhere/at/all")
    assert folder_bytes(home / "a") == 3 + 4 + len("/nowhere/at/all")
    assert folder_bytes(home / "a" / "d") == 4
    (home / "a" / "b" / "f").hardlink_to(home / "a" / "d")
    assert folder_bytes(home / "a") == 3 + 4 + len("/nowhere/at/all")
    assert folder_bytes(home / "none") == 0


@pytest.mark.parametrize(
    ("text", "epochs"), [('{"history": [1, 2]}', 2), ("{", 0), ("[]", 0), ('{"history": 3}', 0)]
)
def test_kept_epochs__of_a_checkpoint(home, text, epochs):
    assert kept_epochs(home, "segmenter", "k") == 0
    scratch(home, "segmenter", "k", text)
    assert kept_epochs(home, "segmenter", "k") == epochs

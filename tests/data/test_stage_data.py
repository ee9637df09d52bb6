"""The data manifests name content: not a place, not a time."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import RecordingRecorder, corner_photo, make_devkit, make_folder, save_photo
from wsss_core.config import Config, DataConfig
from wsss_core.data.images import write_mask
from wsss_core.data.index import hash_file, write_index
from wsss_core.data.source import read_source
from wsss_core.errors import DataError, InputError
from wsss_core.observe import SilentRecorder
from wsss_core.stages.data import find_scored, index_data, index_truth, training_part
from wsss_core.stages.stage import Workspace
from wsss_core.store import file_sha256

PHOTOS = Config(data=DataConfig(source="photos"))
VOC = Config(data=DataConfig(source="voc"))


@pytest.fixture
def folder(tmp_path):
    rows = {"a.jpg": "cat", "b.jpg": "dog cat", "sub/c.png": "dog"}
    return make_folder(tmp_path / "photos", rows, lists={"val": ["sub/c"]})


@pytest.fixture
def work(tmp_path, folder):
    return Workspace(home=tmp_path / "home", photos_root=folder, recorder=RecordingRecorder())


def test_index_data__document(work, folder):
    data = index_data(PHOTOS, work)
    assert (data.stage, data.count) == ("dataset", 1)
    document = json.loads((work.folder(data) / "dataset.json").read_text())
    assert document["classes"] == ["cat", "dog"]
    assert document["splits"] == {"train": ["a", "b"], "val": ["sub/c"]}
    assert document["photos"][2] == {
        "id": "sub/c",
        "file": "sub/c.png",
        "sha256": file_sha256(folder / "sub/c.png"),
        "tags": [1],
    }
    assert work.dataset(data) == read_source(PHOTOS.data, folder, SilentRecorder())
    assert {"hashing photos", "opening photos"} == {what for what, _, _ in work.recorder.passes}


def test_training_part__hangs_on_no_other_photo(work, folder):
    part = training_part(index_data(PHOTOS, work), work)
    dataset = work.dataset(part)
    assert [photo.id for photo in dataset.splits["train"]] == ["a", "b"]
    assert set(dataset.splits) == {"train"}
    (folder / "val.txt").unlink()
    rows = "filename,tags\na.jpg,cat\nb.jpg,dog cat\n"
    (folder / "tags.csv").write_text(rows)
    alone = index_data(PHOTOS, work)
    assert (alone.key, alone.digest) == (part.key, part.digest)
    assert training_part(alone, work) == alone


def test_index_data__second_call_finds_the_same(work):
    first = index_data(PHOTOS, work)
    work.recorder.passes.clear()
    assert index_data(PHOTOS, work) == first
    assert {what for what, _, _ in work.recorder.passes} == {"hashing photos"}


def test_index_data__place_does_not_count(tmp_path, work, folder):
    first = index_data(PHOTOS, work)
    moved = Workspace(home=tmp_path / "home2", photos_root=tmp_path / "elsewhere")
    shutil.copytree(folder, moved.photos_root)
    second = index_data(PHOTOS, moved)
    assert (first.key, first.digest) == (second.key, second.digest)


def test_index_data__every_change_of_content_counts(work, folder):
    digests = {index_data(PHOTOS, work).digest}
    save_photo(folder / "a.jpg", corner_photo()[:, ::-1])
    digests.add(index_data(PHOTOS, work).digest)
    table = folder / "tags.csv"
    table.write_text(table.read_text().replace("a.jpg,cat", "a.jpg,dog"))
    digests.add(index_data(PHOTOS, work).digest)
    (folder / "val.txt").write_text("b\n")
    digests.add(index_data(PHOTOS, work).digest)
    limited = PHOTOS.model_copy(update={"data": DataConfig(source="photos", limit=1)})
    digests.add(index_data(limited, work).digest)
    assert len(digests) == 5


def test_index_data__order_of_rows_does_not_count(work, folder):
    first = index_data(PHOTOS, work)
    header, *rows = (folder / "tags.csv").read_text().splitlines()
    (folder / "tags.csv").write_text("\n".join([header, *reversed(rows)]))
    assert index_data(PHOTOS, work) == first


def test_index_data__damaged_artifact_is_rebuilt(work):
    first = index_data(PHOTOS, work)
    (work.folder(first) / "dataset.json").write_text("{}")
    assert index_data(PHOTOS, work).digest == first.digest
    assert work.recorder.notes == ["rebuilt dataset: dataset.json was changed"]
    assert json.loads((work.folder(first) / "dataset.json").read_text())["classes"]


def test_index_data__broken_photo_is_named_before_anything_is_stored(work, folder):
    (folder / "b.jpg").write_text("no photo")
    with pytest.raises(DataError, match=r"b\.jpg is not a picture"):
        index_data(PHOTOS, work)
    (folder / "a.jpg").write_text("no photo")
    with pytest.raises(DataError, match=r"a\.jpg is not .*first of 2 broken photos: `conta data c"):
        index_data(PHOTOS, work)
    assert not list((work.home / "store" / "dataset").glob("[!.]*"))


def test_index_data__needs_a_folder(tmp_path):
    with pytest.raises(InputError, match="give it with --data DIR"):
        index_data(PHOTOS, Workspace(home=tmp_path))


def test_index_truth__masks_of_the_photos_alone(work, folder):
    data = index_data(PHOTOS, work)
    assert index_truth(PHOTOS, work, data=data) is None
    for name, height in (("a", 6), ("sub/c", 8), ("stranger", 9)):
        write_mask(folder / "masks" / f"{name}.png", np.zeros((height, 10), np.uint8))
    truth = index_truth(PHOTOS, work, data=data)
    assert json.loads((work.folder(truth) / "truth.json").read_text()) == {
        "a": file_sha256(folder / "masks" / "a.png"),
        "sub/c": file_sha256(folder / "masks" / "sub/c.png"),
    }
    assert index_truth(PHOTOS, work, data=data) == truth
    assert index_data(PHOTOS, work) == data
    write_mask(folder / "masks" / "a.png", np.ones((6, 10), np.uint8))
    assert index_truth(PHOTOS, work, data=data).digest != truth.digest


def test_index_truth__a_mask_that_does_not_fit_is_said_before_anything_is_made(work, folder):
    data = index_data(PHOTOS, work)
    write_mask(folder / "masks" / "a.png", np.zeros((5, 5), np.uint8))
    (folder / "masks" / "b.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"a\.png is 5 x 5 px, its .*first of 2 broken masks: `conta"
    ):
        index_truth(PHOTOS, work, data=data)
    assert not list((work.home / "store" / "truth").glob("[!.]*"))


def test_index_truth__a_mask_has_to_fit_the_photo_and_the_classes_of_today(work, folder):
    write_mask(folder / "masks" / "a.png", np.full((6, 10), 2, np.uint8))
    data = index_data(PHOTOS, work)
    first = index_truth(PHOTOS, work, data=data)
    assert index_truth(PHOTOS, work, data=data) == first
    Image.new("RGB", (20, 12)).save(folder / "a.jpg")
    with pytest.raises(DataError, match=r"a\.png is 10 x 6 px, its photo 20 x 12 px"):
        index_truth(PHOTOS, work, data=index_data(PHOTOS, work))


def test_find_scored__splits_with_at_least_one_mask(work, folder):
    data = index_data(PHOTOS, work)
    write_mask(folder / "masks" / "a.png", np.zeros((6, 10), np.uint8))
    assert find_scored(work, data, index_truth(PHOTOS, work, data=data)) == {"train"}
    write_mask(folder / "masks" / "sub/c.png", np.zeros((8, 10), np.uint8))
    assert find_scored(work, data, index_truth(PHOTOS, work, data=data)) == {"train", "val"}


def test_hash_file__what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); check it and its"):
        hash_file(tmp_path)


def test_index_truth__devkit(tmp_path):
    root = make_devkit(tmp_path / "voc", {"p1": "cat", "p2": "dog"}, train=["p1"], val=["p2"])
    work = Workspace(home=tmp_path / "home", photos_root=root)
    truth = index_truth(VOC, work, data=index_data(VOC, work))
    assert list(json.loads((work.folder(truth) / "truth.json").read_text())) == ["p1", "p2"]


def test_index_truth__scenes_lie_in_the_store(tmp_path):
    work = Workspace(home=tmp_path / "home")

    def write(out):
        from wsss_core.store import Measured

        make_devkit(out, {"p1": "cat"}, train=["p1"])
        dataset = read_source(DataConfig(source="voc", val=()), out, SilentRecorder())
        write_index(out, dataset, out, SilentRecorder())
        return Measured()

    data = work.store.publish("scenes", "0" * 24, write)
    assert [photo.id for photo in work.dataset(data).splits["train"]] == ["p1"]
    truth = index_truth(Config(), work, data=data)
    assert list(json.loads((work.folder(truth) / "truth.json").read_text())) == ["p1"]

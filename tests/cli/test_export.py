"""Pseudo-masks for other toolboxes."""

import json

import numpy as np
import pytest
from PIL import Image

from wsss_core.data.images import read_mask, write_mask
from wsss_core.errors import InputError, StoreError
from wsss_core.stages.export import export_masks
from wsss_core.stages.stage import Workspace
from wsss_core.store import Measured

MASKS = {
    "b": np.array([[0, 1], [2, 255]], np.uint8),
    "trip/a": np.array([[1, 1, 1]], np.uint8),
}


@pytest.fixture
def work(tmp_path):
    return Workspace(tmp_path / "home")


@pytest.fixture
def masks(work):
    def write(out):
        for name, mask in MASKS.items():
            write_mask(out / f"{name}.png", mask)
        (out / "notes.json").write_text("{}")
        return Measured()

    return work.store.publish("masks", "mask-key", write)


@pytest.fixture
def data(work):
    def write(out):
        (out / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog"], "photos": []}))
        return Measured()

    return work.store.publish("dataset", "data-key", write)


def test_export_masks__voc_layout(tmp_path, work, masks, data):
    out = tmp_path / "out"
    assert export_masks(masks, data=data, work=work, out=out) == 2
    for name, mask in MASKS.items():
        path = out / "SegmentationClass" / f"{name}.png"
        assert np.array_equal(read_mask(path), mask)
        with Image.open(path) as picture:
            assert picture.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
    assert (out / "ImageSets" / "Segmentation" / "train.txt").read_text() == "b\ntrip/a\n"
    assert (out / "labels.txt").read_text() == "background\ncat\ndog\n"
    assert export_masks(masks, data=data, work=work, out=out) == 2  # again, in place


@pytest.mark.parametrize(
    "name", ["SegmentationClass/b.png", "labels.txt", "ImageSets/Segmentation/train.txt"]
)
def test_export_masks__never_replaces_files_of_another_origin(tmp_path, work, masks, data, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=rf"{name} may not be of `conta export masks`, for"):
        export_masks(masks, data=data, work=work, out=tmp_path / "out")
    assert path.read_text() == "mine"
    assert not (tmp_path / "out" / "SegmentationClass" / "trip").exists()


def test_export_masks__damaged_or_removed(tmp_path, work, masks, data):
    (work.folder(masks) / "b.png").write_bytes(b"")
    with pytest.raises(StoreError, match=r"b\.png was changed; run the recipe again"):
        export_masks(masks, data=data, work=work, out=tmp_path / "out")
    (work.folder(masks) / "manifest.json").unlink()
    with pytest.raises(StoreError, match="run the recipe again"):
        export_masks(masks, data=data, work=work, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_masks__out_is_a_file(tmp_path, work, masks, data):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export_masks(masks, data=data, work=work, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["tags.csv", "JPEGImages"])
def test_export_masks__never_into_a_data_set(tmp_path, work, masks, data, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="out holds photos; in there masks count as true"):
        export_masks(masks, data=data, work=work, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_store__refuses_another_layout(work, masks):
    (work.store.root / "format").write_text("99\n")
    with pytest.raises(StoreError, match="has layout 99, this version reads 1"):
        work.store.publish("masks", "other", lambda _: Measured())
    with pytest.raises(StoreError, match="layout 99"):
        work.store.check_format()

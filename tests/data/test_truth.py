"""Masks are found where each layout keeps them, and a wrong one is named."""

import numpy as np
import pytest

from tests.data.samples import corner_photo, make_devkit, save_photo
from wsss_core.data.images import write_mask
from wsss_core.data.truth import TruthMasks
from wsss_core.errors import DataError
from wsss_core.records import TaggedPhoto

MASK = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)


def photo(root, name="a", size=(2, 3)):
    save_photo(root / f"{name}.jpg", corner_photo(*size))
    return TaggedPhoto(name, root / f"{name}.jpg", (0,))


@pytest.mark.parametrize(
    "below", ["masks", "SegmentationClass", "VOCdevkit/VOC2012/SegmentationClass"]
)
def test_truth_masks__every_layout(tmp_path, below):
    if below.startswith("VOCdevkit"):
        make_devkit(tmp_path / "VOCdevkit/VOC2012", {"p1": "cat"}, train=["p1"])
    write_mask(tmp_path / below / "sub" / "a.png", MASK)
    truth = TruthMasks.of(tmp_path)
    assert truth.path("sub/a") == tmp_path / below / "sub" / "a.png"
    assert (truth.read(photo(tmp_path, "sub/a"), num_classes=2) == MASK).all()
    assert truth.path("b") is None


def test_truth_masks__no_folder(tmp_path):
    truth = TruthMasks.of(tmp_path / "gone")
    assert truth.path("a") is None
    with pytest.raises(DataError, match=r"no mask a\.png in .*SegmentationClass or .*masks"):
        truth.read(photo(tmp_path), num_classes=1)


def test_truth_masks__wrong_size_names_both(tmp_path):
    write_mask(tmp_path / "masks" / "a.png", MASK)
    with pytest.raises(DataError, match=r"a\.png is 3 x 2 px, its photo 2 x 3 px"):
        TruthMasks.of(tmp_path).read(photo(tmp_path, size=(3, 2)), num_classes=2)


def test_truth_masks__label_beyond_the_classes(tmp_path):
    write_mask(tmp_path / "masks" / "a.png", MASK)
    with pytest.raises(DataError, match=r"a\.png holds label 2; expected 0\.\.1 or 255"):
        TruthMasks.of(tmp_path).read(photo(tmp_path), num_classes=1)

"""Photos larger than `data.long_side_px`: every stage sees them smaller, what leaves is whole."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.stages.world import draw_photos, settings
from wsss_core.config import RuntimeConfig
from wsss_core.data.images import mask_at_size, photo_size, read_mask, read_photo, read_pixels
from wsss_core.data.images import write_mask as save_mask
from wsss_core.observe import SilentRecorder
from wsss_core.records import TaggedPhoto
from wsss_core.seeds.cam import read_cam
from wsss_core.stages.cams import make_cams
from wsss_core.stages.classifier import train_classifier
from wsss_core.stages.data import index_data, index_truth
from wsss_core.stages.export import export_masks
from wsss_core.stages.masks import expand_masks
from wsss_core.stages.predictions import segment_photos
from wsss_core.stages.scores import score_masks
from wsss_core.stages.segmenter import train_segmenter
from wsss_core.stages.stage import Workspace

TIMES = 3
SMALL = settings(data__long_side_px=64)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The photos of the world three times as large, with true masks of that size."""
    folder = tmp_path_factory.mktemp("large")
    root = folder / "photos"
    draw_photos(root)
    for path in sorted(root.glob("*.png")):
        with Image.open(path) as photo:
            large = photo.resize((photo.width * TIMES, photo.height * TIMES), Image.Resampling.BOX)
        large.save(path)
        red = np.array(large).astype(int) @ [1, -1, -1] > 50
        save_mask(root / "masks" / path.name, red.astype(np.uint8))
    return Workspace(
        home=folder / "home",
        photos_root=root,
        runtime=RuntimeConfig(device="cpu", threads=1, workers=1),
        recorder=SilentRecorder(),
    )


@pytest.fixture(scope="module")
def data(work):
    return index_data(SMALL, work)


def test_index__only_larger_photos_say_how_they_are_seen(work, data):
    entries = json.loads((work.folder(data) / "dataset.json").read_text())["photos"]
    by_id = {entry["id"]: entry for entry in entries}
    assert (by_id["p2"]["size"], by_id["p2"]["seen_size"]) == ([144, 192], [48, 64])
    seen = {photo.id: photo.seen_size for photo in work.dataset(data).splits["train"]}
    assert seen["p0"] == (64, 64)
    whole = index_data(settings(data__long_side_px=192), work)
    assert "seen_size" not in (work.folder(whole) / "dataset.json").read_text()
    assert whole.digest == index_data(settings(data__long_side_px=None), work).digest
    assert whole.digest == index_data(settings(), work).digest != data.digest


def test_digest__of_runs_from_before_the_setting():
    assert settings(data__long_side_px=512).digest() == settings().digest() != SMALL.digest()


def test_round__is_that_of_small_photos_and_leaves_large(work, data, tmp_path):
    truth = index_truth(SMALL, work, data=data)
    classifier = train_classifier(SMALL, work, data=data)
    cams = make_cams(SMALL, work, data=data, classifier=classifier, x_m=None)
    assert read_cam(work.folder(cams) / "p2.npz").size == (48, 64)
    masks = expand_masks(SMALL, work, data=data, cams=cams)
    segmenter = train_segmenter(SMALL, work, data=data, masks=masks)
    found = segment_photos(SMALL, work, data=data, segmenter=segmenter, split="train")
    for made in (masks, found):
        assert read_mask(work.folder(made) / "p2.png").shape == (48, 64)
    scores = score_masks(SMALL, work, data=data, masks=masks, truth=truth)
    assert 0 <= scores.metrics["pseudo/miou"] <= 1
    export_masks(masks, data=data, work=work, out=tmp_path)
    large = read_mask(tmp_path / "SegmentationClass" / "p2.png")
    assert large.shape == (144, 192)
    assert (large[1::TIMES, 1::TIMES] == read_mask(work.folder(masks) / "p2.png")).all()


def test_adopted__masks_and_cams_of_the_photos_own_size(work, data, tmp_path):
    root = work.photos_root
    config = settings(
        data__long_side_px=64, expansion={"method": "folder", "folder": str(root / "masks")}
    )
    masks = expand_masks(config, work, data=data, cams=None)
    large = read_mask(root / "masks" / "p0.png")
    assert (read_mask(work.folder(masks) / "p0.png") == large[1::TIMES, 1::TIMES]).all()
    whole = settings(data__long_side_px=None)
    everything = index_data(whole, work)
    classifier = train_classifier(whole, work, data=everything)
    cams = make_cams(whole, work, data=everything, classifier=classifier, x_m=None)
    config = settings(
        data__long_side_px=64, seeds={"method": "folder", "folder": str(work.folder(cams))}
    )
    adopted = make_cams(config, work, data=data, classifier=None)
    cam = read_cam(work.folder(adopted) / "p2.npz")
    assert (cam.size, cam.cam.shape[1:]) == ((48, 64), (12, 16))
    seen = {"method": "folder", "folder": str(work.folder(adopted))}
    again = make_cams(settings(data__long_side_px=64, seeds=seen), work, data=data, classifier=None)
    assert again.digest == adopted.digest


@pytest.mark.parametrize(("suffix", "off"), [("png", 1.0), ("jpg", 6.0)])
def test_read_pixels__upright_and_like_a_plain_resize(tmp_path, suffix, off):
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (600, 1))] * 3, axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    seen = read_pixels(TaggedPhoto("a", path, (), (80, 60)))
    assert (seen.shape, photo_size(path)) == ((80, 60, 3), (800, 600))
    plain = Image.fromarray(read_photo(path)).resize((60, 80), Image.Resampling.LANCZOS)
    assert np.abs(seen.astype(int) - np.array(plain).astype(int)).max() <= off


def test_mask_at_size__takes_the_centre_and_the_way_back_is_exact():
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    large = mask_at_size(mask, (6, 4))
    assert (large == np.kron(mask, np.ones((3, 2), np.uint8))).all()
    assert (mask_at_size(large, (2, 2)) == mask).all()

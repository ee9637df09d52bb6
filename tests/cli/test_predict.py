"""Masks of photos as people have them (no training: the segmenter's weights are random)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.cli.odd_photos import BAD, GOOD, write_odd_photos
from wsss_core.config import SegmenterConfig, SegmenterTestConfig
from wsss_core.data.images import read_mask, read_photo
from wsss_core.errors import InputError, StoreError
from wsss_core.stages.predict import Predictor, label_at_size, predict_folder
from wsss_core.stages.segmenter import DESCRIPTION, WEIGHTS, build_segmenter
from wsss_core.store import Measured, Store

CLASSES = ("cat", "dog", "horse")


class Notes:
    """Keeps the notes of a recorder."""

    def __init__(self):
        self.lines = []

    def progress(self, what, done, total):
        pass

    def scalars(self, stage, step, values):
        pass

    def note(self, message):
        self.lines.append(message)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def segmenter(home):
    settings = SegmenterConfig(pretrained=False)
    torch.manual_seed(0)
    model = build_segmenter(settings, len(CLASSES) + 1, pretrained=False)
    description = {"segmenter": settings.model_dump(mode="json"), "classes": CLASSES}

    def write(out: Path) -> Measured:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, out / WEIGHTS)
        (out / DESCRIPTION).write_text(json.dumps(description))
        return Measured()

    return Store(home / "store").publish("segmenter", "some-key", write)


@pytest.fixture
def predict(home, segmenter):
    def call(photos, out, **options):
        notes = Notes()
        folder = Store(home / "store").open(segmenter)
        test = options.pop("test", SegmenterTestConfig())
        predictor = Predictor(folder, test=test, device=torch.device("cpu"))
        done = predict_folder(photos, predictor=predictor, recorder=notes, out=out, **options)
        return done, notes.lines

    return call


def test_predict_folder__odd_photos(tmp_path, predict):
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_odd_photos(photos)
    before = {path: path.read_bytes() for path in photos.iterdir()}

    done, notes = predict(photos, out, overlay=True)

    for name, size in GOOD.items():
        mask = read_mask(out / f"{Path(name).stem}.png")
        assert mask.shape == size
        assert mask.max() <= len(CLASSES)
        with Image.open(out / "overlay" / f"{Path(name).stem}.jpg") as laid:
            assert laid.size == size[::-1]
    assert len(done.masks) == len(GOOD)
    assert len(done.failures) == len(notes) == len(BAD)
    for name in BAD:
        (line,) = [line for line in notes if name in line]
        assert "\n" not in line
    with Image.open(out / "grey.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]  # VOC: black, then maroon
    assert (out / "labels.txt").read_text() == "background\ncat\ndog\nhorse\n"
    assert before == {path: path.read_bytes() for path in photos.iterdir()}
    assert [path.name for path in out.rglob(".*")] == [".predicted"]  # nothing half-written


def test_predict_folder__one_photo_and_crf(tmp_path, predict):
    write_odd_photos(tmp_path)
    crf = SegmenterTestConfig(crf=True, flip=False, scales=(1.0, 0.5))
    done, notes = predict(tmp_path / "glass.png", tmp_path / "out", test=crf)
    assert [path.name for path in done.masks] == ["glass.png"]
    assert not notes
    done, _ = predict(tmp_path / "dot.png", tmp_path / "out", test=crf)
    assert read_mask(done.masks[0]).shape == (1, 1)


def test_predict_folder__subfolders_and_equal_names(tmp_path, predict):
    photos = tmp_path / "photos"
    (photos / "trip").mkdir(parents=True)
    (photos / ".thumbnails").mkdir()
    picture = Image.new("RGB", (20, 30), "green")
    for name in ("cat.jpg", "cat.png", "trip/cat.JPG", ".thumbnails/cat.png"):
        picture.save(photos / name)
    for _ in range(2):  # the second time the masks lie below the photos
        done, _ = predict(photos, photos / "masks")
        names = [path.relative_to(photos / "masks").as_posix() for path in done.masks]
        assert names == ["cat.jpg.png", "cat.png.png", "trip/cat.png"]


def test_predict_folder__what_was_made_before_is_no_photo(tmp_path, predict):
    photos = tmp_path / "photos"
    for name in ("a.jpg", "masks/a.png", "masks/of_mine.jpg", "set/b.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(photos / name)
    for folder in (photos, photos / "set"):
        (folder / "labels.txt").write_text("of a data set")
    for out in ("one", "two", "one"):
        done, _ = predict(photos, photos / out, overlay=True)
        assert len(done.masks) == 3
    with pytest.raises(InputError, match="no photo in"):
        predict(photos / "one", tmp_path / "masks of masks")


def test_predict_folder__photos_beside_a_mask_that_was_put_there(tmp_path, predict):
    for name in ("new.jpg", "pets/a.jpg", "pets/more/b.jpg", "pets/overlay/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(tmp_path / name)
    predict(tmp_path / "new.jpg", tmp_path / "pets")
    done, _ = predict(tmp_path / "pets", tmp_path / "masks of pets")
    assert [path.name for path in done.masks] == ["a.png", "b.png"]


def test_predict_folder__large_photo(tmp_path, predict):
    Image.new("RGB", (1600, 900), "blue").save(tmp_path / "large.jpg")
    done, _ = predict(tmp_path / "large.jpg", tmp_path / "out")
    assert read_mask(done.masks[0]).shape == (900, 1600)


def test_predict_folder__never_overwrites_photos(tmp_path, predict):
    write_odd_photos(tmp_path)
    with pytest.raises(InputError, match="holds the photos themselves"):
        predict(tmp_path, tmp_path / "sub" / "..")
    with pytest.raises(InputError, match="holds the photos themselves"):
        predict(tmp_path, tmp_path.parent)
    with pytest.raises(InputError, match="holds the photos themselves"):
        predict(tmp_path / "grey.png", tmp_path)
    read_photo(tmp_path / "grey.png")


def test_predict_folder__never_overwrites_masks_of_another_origin(tmp_path, predict):
    for name in ("pets/a.jpg", "pets/masks/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(tmp_path / name)
    before = (tmp_path / "pets/masks/a.png").read_bytes()
    with pytest.raises(InputError, match=r"masks/a\.png may not be of `conta predict`, for"):
        predict(tmp_path / "pets", tmp_path / "pets/masks")
    assert (tmp_path / "pets/masks/a.png").read_bytes() == before


def test_predict_folder__never_overwrites_a_class_list_or_comes_among_photos(tmp_path, predict):
    for name in ("one/a.jpg", "pets/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(tmp_path / name)
    (tmp_path / "pets/labels.txt").write_text("background\ncat\n")
    with pytest.raises(InputError, match=r"pets/labels\.txt may not be of `conta predict`"):
        predict(tmp_path / "one", tmp_path / "pets")
    (tmp_path / "pets/tags.csv").write_text("filename,tags\nb.jpg,cat\n")
    with pytest.raises(InputError, match="pets holds photos; in there masks count as true"):
        predict(tmp_path / "one", tmp_path / "pets")
    assert (tmp_path / "pets/labels.txt").read_text() == "background\ncat\n"
    assert not (tmp_path / "pets/a.png").exists()


def test_predict_folder__nothing_to_do(tmp_path, predict):
    with pytest.raises(InputError, match="does not exist"):
        predict(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no photo in .*\.jpg"):
        predict(tmp_path / "empty", tmp_path / "out")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a file"):
        predict(tmp_path / "a.png", tmp_path / "a.png")


def test_predict_folder__out_cannot_be_written(tmp_path, predict):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".predicted").touch()  # it is the home of former masks
    (tmp_path / "out" / "a.png").mkdir()  # where the mask should go
    with pytest.raises(StoreError, match=r"a\.png"):
        predict(tmp_path / "a.png", tmp_path / "out")


def test_label_at_size__equals_argmax_of_the_whole():
    probabilities = torch.rand(5, 7, 11, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(probabilities[None], (23, 31), mode="bilinear")[0]
    found = label_at_size(probabilities.numpy(), (23, 31))
    assert np.array_equal(found, full.argmax(0).numpy())
    same = label_at_size(probabilities.numpy(), (7, 11))
    assert np.array_equal(same, probabilities.argmax(0).numpy())


def test_predict_folder__damaged_segmenter(tmp_path, home, segmenter, predict):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    weights = Store(home / "store").folder(segmenter) / WEIGHTS
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(StoreError, match=r"segmenter\.safetensors was changed"):
            predict(tmp_path / "a.png", tmp_path / "out")
    finally:
        weights.write_bytes(sound)

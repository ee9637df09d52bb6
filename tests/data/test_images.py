"""Photos of every kind become upright RGB; every broken file becomes one clear line."""

import contextlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.samples import corner_photo, save_bomb, save_photo
from wsss_core.data.images import photo_size, read_mask, read_photo, voc_palette, write_mask
from wsss_core.errors import DataError


def read_fault(read, path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError) as caught:
            read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "corner", "sideways"),
    [
        (1, "upper left", False),
        (2, "upper right", False),
        (3, "lower right", False),
        (4, "lower left", False),
        (5, "upper left", True),
        (6, "upper right", True),
        (7, "lower right", True),
        (8, "lower left", True),
    ],
)
def test_read_photo__every_exif_orientation(tmp_path, suffix, orientation, corner, sideways):
    path = tmp_path / f"a.{suffix}"
    save_photo(path, corner_photo(24, 40), orientation=orientation)
    photo = read_photo(path)
    assert photo.shape == ((40, 24, 3) if sideways else (24, 40, 3))
    assert photo_size(path) == photo.shape[:2]
    red = photo[..., 0].astype(int)
    vertical, horizontal = corner.split()
    rows = red.sum(axis=1) if vertical == "upper" else red.sum(axis=1)[::-1]
    columns = red.sum(axis=0) if horizontal == "left" else red.sum(axis=0)[::-1]
    assert rows[: len(rows) // 2].sum() > 4 * rows[len(rows) // 2 :].sum()
    assert columns[: len(columns) // 2].sum() > 4 * columns[len(columns) // 2 :].sum()


def test_read_photo__broken_exif_still_shows_the_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(corner_photo()).save(path, exif=b"Exif\0\0garbage")
    assert (read_photo(path) == corner_photo()).all()
    assert photo_size(path) == (6, 10)


def test_read_photo__rgb_png_is_exact_writable_and_contiguous(tmp_path):
    save_photo(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    assert photo.dtype == np.uint8
    assert (photo == corner_photo()).all()
    assert photo.flags.writeable
    assert photo.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "PA"])
def test_read_photo__modes_without_three_channels(tmp_path, mode):
    grey = np.where(np.arange(60).reshape(6, 10) < 30, 0, 255).astype(np.uint8)
    suffix = "tif" if mode == "PA" else "png"
    Image.fromarray(grey).convert(mode).save(tmp_path / f"a.{suffix}")
    photo = read_photo(tmp_path / f"a.{suffix}")
    assert (photo == grey[..., None]).all()


def test_read_photo__16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    # 65535 / 255 = 257 sixteen-bit steps a grey level, to the nearest.
    assert read_photo(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_read_photo__32_bit_values_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(path)
    assert "32-bit grey values" in read_fault(read_photo, path)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(np.float32, "floating-point grey values"), (np.int32, "32-bit grey values")],
)
def test_read_photo__no_photo_is_silently_black(tmp_path, kind, fault):
    Image.fromarray(np.array([[0, 1], [128, 255]], kind)).save(tmp_path / "a.tif")
    assert fault in read_fault(read_photo, tmp_path / "a.tif")


def test_read_photo__transparent_pixels_lie_on_white(tmp_path):
    layer = np.zeros((1, 3, 4), np.uint8)
    layer[0, :, 3] = [0, 51, 255]  # black, seen by 0, 20 and 100 %
    Image.fromarray(layer).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png")[0, :, 0].tolist() == [255, 204, 0]


def test_read_photo__cmyk_keeps_its_colours(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((16, 16, 3), [200, 60, 30], np.uint8)).convert("CMYK").save(path)
    assert np.abs(read_photo(path).astype(int) - [200, 60, 30]).max() <= 4


def test_read_photo__one_pixel(tmp_path):
    save_photo(tmp_path / "a.png", np.full((1, 1, 3), 7, np.uint8))
    assert read_photo(tmp_path / "a.png").tolist() == [[[7, 7, 7]]]


def test_read_photo__first_frame_of_several(tmp_path):
    black, white = (Image.new("L", (4, 3), grey) for grey in (0, 255))
    black.save(tmp_path / "a.gif", save_all=True, append_images=[white])
    assert read_photo(tmp_path / "a.gif").max() == 0
    black.save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=[white])
    assert read_photo(tmp_path / "b.jpg").max() == 0


@pytest.mark.parametrize("side", [60_000, 11_000])  # PIL refuses the first, and only warns of this
def test_read_photo__decompression_bomb(tmp_path, side):
    save_bomb(tmp_path / "a.png", side)
    for read in (read_photo, photo_size, read_mask):
        assert "more than 89 megapixels" in read_fault(read, tmp_path / "a.png")


def test_read_photo__truncated(tmp_path):
    path = tmp_path / "a.jpg"
    save_photo(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-700])
    assert "is cut off" in read_fault(read_photo, path)


@pytest.mark.parametrize(
    ("content", "says"), [(b"hello, no photo\n", "is not a picture"), (b"", "is empty")]
)
def test_read_photo__no_picture(tmp_path, content, says):
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_photo, photo_size, read_mask):
        assert says in read_fault(read, tmp_path / "a.jpg")


def test_read_photo__missing_file_and_folder(tmp_path):
    assert "does not exist" in read_fault(read_photo, tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    assert "cannot be opened" in read_fault(read_photo, tmp_path / "b.jpg")


def test_read_photo__postscript_is_not_run(tmp_path):
    Image.fromarray(corner_photo()).save(tmp_path / "a.eps")
    assert "is not a picture" in read_fault(read_photo, tmp_path / "a.eps")


def test_read_photo__a_damaged_file_that_asks_for_all_memory(tmp_path, monkeypatch):
    """As a JPEG 2000 with broken tile sizes does."""

    def load(self):
        raise MemoryError

    save_photo(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert "a.png" in read_fault(read_photo, tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "ppm", "jp2"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_read_photo__damaged_bytes_raise_nothing_else(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.getbasetemp()
    sound, broken = folder / f"sound.{suffix}", folder / f"broken.{suffix}"
    if not sound.exists():
        save_photo(sound, **({} if suffix in ("bmp", "gif", "ppm") else {"orientation": 6}))
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (read_photo, photo_size, read_mask):
        with contextlib.suppress(DataError):
            read(broken)


def test_voc_palette__published_colours():
    colours = np.array(voc_palette()).reshape(256, 3)
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15].tolist() == [192, 128, 128]  # person
    assert colours[20].tolist() == [0, 64, 128]  # tvmonitor
    assert colours[255].tolist() == [224, 224, 192]  # void
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    top=st.integers(1, 256),
)
def test_write_mask__read_back(tmp_path_factory, seed, height, width, top):
    path = tmp_path_factory.getbasetemp() / "mask.png"
    mask = np.random.default_rng(seed).integers(0, top, (height, width)).astype(np.uint8)
    before = mask.copy()
    write_mask(path, mask)
    assert (read_mask(path) == mask).all()
    assert (mask == before).all()


def test_write_mask__same_bytes_and_voc_colours(tmp_path):
    mask = np.array([[0, 1], [20, 255]], np.uint8)
    write_mask(tmp_path / "a.png", mask)
    write_mask(tmp_path / "deep" / "er" / "b.png", mask)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "deep" / "er" / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array(picture.convert("RGB"))[1, 1].tolist() == [224, 224, 192]


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 3), np.uint8), np.zeros(4, np.uint8)]
)
def test_write_mask__wrong_array(tmp_path, mask):
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        write_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())


def test_read_mask__grey_and_few_colours(tmp_path):
    labels = np.array([[0, 1, 2, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png").tolist() == labels.tolist()
    small = Image.fromarray(labels[:, :3].copy())
    small.putpalette([9, 9, 9, 0, 0, 0, 7, 7, 7])
    small.save(tmp_path / "small.png", bits=2)
    assert read_mask(tmp_path / "small.png").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a.png", Image.new("RGB", (3, 2))),
        ("a.png", Image.new("RGBA", (3, 2))),
        ("a.png", Image.fromarray(np.zeros((2, 3), np.uint16))),
        ("a.jpg", Image.new("L", (3, 2))),
    ],
)
def test_read_mask__pixels_are_no_labels(tmp_path, name, picture):
    picture.save(tmp_path / name)
    assert "a mask must be a" in read_fault(read_mask, tmp_path / name)

"""Class activation maps against loops in numpy, and the files they are kept in."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.oracles import cam as oracle
from wsss_core.data.transforms import normalise, resize_photo
from wsss_core.errors import DataError
from wsss_core.seeds.cam import (
    Cam,
    label_map,
    normalise_cam,
    read_cam,
    seed_size,
    sum_scales,
    upsample_cam,
    write_cam,
)
from wsss_core.stages.cams import class_activation_maps
from wsss_core.stages.classifier import ContextClassifier


class FakeClassifier(ContextClassifier):
    """Signed maps of three classes at stride 16, from local means and, if given, the context."""

    def __init__(self):
        nn.Module.__init__(self)
        self.mix = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [-1.0, 0.7, 0.1], [0.3, 0.3, -1]]))

    def class_maps(self, photos, x_m, affine):
        pooled = F.avg_pool2d(photos, 16)
        maps = torch.einsum("kc,bchw->bkhw", self.mix, pooled)
        if x_m is not None:
            grid = F.affine_grid(affine, [len(photos), 1, *maps.shape[-2:]], align_corners=False)
            maps = maps + F.grid_sample(x_m[:, None], grid, align_corners=False)
        return maps


def draw_photos(seed, count, size):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def expected_maps(photo, scales, size):
    """The oracle on the fake classifier's own maps of every view."""
    model, views = FakeClassifier(), []
    for scale in scales:
        target = tuple(max(16, round(side * scale / 16) * 16) for side in size)
        resized = normalise(resize_photo(photo, target))[None]
        with torch.no_grad():
            pair = [model.class_maps(v, None, None)[0].numpy() for v in (resized, resized.flip(-1))]
        views.append(pair)
    return oracle.activation_maps(views, size)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5, 2.0)])
@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
def test_class_activation_maps__equal_the_oracle(scales, size):
    photos = draw_photos(3, 2, size)
    found = class_activation_maps(FakeClassifier(), photos, None, scales=scales)
    assert found.shape == (2, 3, *seed_size(size))
    for maps, photo in zip(found, photos, strict=True):
        expected = expected_maps(photo, scales, size)
        assert maps.numpy() == pytest.approx(expected, abs=1e-4)
        assert normalise_cam(maps).numpy() == pytest.approx(oracle.normalise(expected), abs=1e-4)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.booleans())
def test_class_activation_maps__mirrored_photo_has_mirrored_maps(seed, with_context):
    """With the flip among the views, and the context mirrored along. 32 px: flips keep the grid."""
    photos = draw_photos(seed, 1, (32, 64))
    x_m = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed))
    contexts = (x_m, x_m.flip(-1)) if with_context else (None, None)
    model = FakeClassifier()
    plain = class_activation_maps(model, photos, contexts[0], scales=(1.0, 0.5))
    mirror = np.ascontiguousarray(photos[:, :, ::-1])
    mirrored = class_activation_maps(model, mirror, contexts[1], scales=(1.0, 0.5))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-5)


def test_class_activation_maps__context_is_mirrored_with_the_photo():
    """A context on the left alone must not appear on the right through the flipped view."""
    photos = np.full((1, 32, 32, 3), 124, np.uint8)
    x_m = torch.zeros(1, 8, 8)
    x_m[:, :, :4] = 10.0
    maps = class_activation_maps(FakeClassifier(), photos, x_m, scales=(1.0,))[0, 0]
    assert maps[:, :2].min() > 10
    assert maps[:, -2:].max() < 1


def test_class_activation_maps__photos_and_model_are_left_alone():
    photos, model = draw_photos(0, 2, (32, 32)), FakeClassifier()
    before = photos.copy()
    class_activation_maps(model, photos, None, scales=(1.0,))
    assert np.array_equal(photos, before)
    assert model.training


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_sum_scales__upsamples_as_the_oracle(height, width, photo_height, photo_width):
    maps = np.random.default_rng(height).normal(size=(1, 2, height, width)).astype(np.float32)
    size = (photo_height, photo_width)
    found = sum_scales(lambda scale: torch.from_numpy(maps) * scale, (1.0, 0.5), size)[0]
    expected = [1.5 * oracle.resize_bilinear(plane, seed_size(size)) for plane in maps[0]]
    assert found.numpy() == pytest.approx(np.stack(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4, 8), (1, 2)), ((5, 9), (2, 3)), ((1, 1), (1, 1)), ((320, 213), (80, 54))],
)
def test_seed_size__rounds_up(size, expected):
    assert seed_size(size) == expected


def test_normalise_cam__each_class_by_its_own_maximum():
    maps = torch.tensor([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = normalise_cam(maps)
    assert found[0].numpy() == pytest.approx(np.array([[0, 0.5], [1, 0.25]]), abs=1e-5)
    assert not found[1].any()  # a class that never fires stays 0, not NaN
    assert maps.max() == 4


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (7, 10)])
def test_upsample_cam__equals_the_oracle_and_is_cut_to_the_photo(size):
    cam = np.random.default_rng(0).random((2, *seed_size(size)))
    found = upsample_cam(cam.astype(np.float16), size)
    assert found.shape == (2, *size)
    assert found.dtype == np.float32
    expected = oracle.full_size(cam.astype(np.float16).astype(float), size)
    assert found == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(
    st.integers(0, 3).flatmap(
        lambda k: st.tuples(
            st.permutations(range(5)).map(lambda order: sorted(order[:k])),
            st.lists(
                st.sampled_from([0.0, 0.1, 0.15, 0.2, 0.2, 1.0]), min_size=k * 6, max_size=k * 6
            ),
        )
    )
)
def test_label_map__equals_the_oracle_ties_included(drawn):
    classes, values = np.array(drawn[0], np.int64), np.array(drawn[1])
    scores = values.reshape(len(classes), 2, 3)
    found = label_map(scores, classes, threshold=0.15)
    assert found.dtype == np.uint8
    assert np.array_equal(found, oracle.labels(scores, classes, 0.15))


def test_label_map__tie_with_the_background_is_background_else_the_first_class():
    scores = np.array([[[0.15, 0.1501, 0.5]], [[0.15, 0.0, 0.5]]])
    assert label_map(scores, np.array([2, 7]), threshold=0.15).tolist() == [[0, 3, 3]]


def test_label_map__photo_without_a_class_is_background():
    assert not label_map(np.zeros((0, 3, 2)), np.zeros(0, np.int64), threshold=0.15).any()


def a_cam():
    cam = np.random.default_rng(1).random((2, 3, 4)).astype(np.float32)
    return Cam(np.array([1, 4]), cam, (11, 14))


def test_write_cam__read_back_at_half_precision(tmp_path):
    path = tmp_path / "sub" / "photo.npz"
    write_cam(path, a_cam())
    found = read_cam(path)
    assert found.classes.tolist() == [1, 4]
    assert found.size == (11, 14)
    assert found.cam.dtype == np.float32
    assert np.array_equal(found.cam, a_cam().cam.astype(np.float16).astype(np.float32))


def test_write_cam__photo_without_a_class(tmp_path):
    path = tmp_path / "photo.npz"
    write_cam(path, Cam(np.zeros(0, np.int64), np.zeros((0, 3, 4)), (11, 14)))
    assert read_cam(path).cam.shape == (0, 3, 4)


def test_write_cam__same_bytes_every_time_and_no_pickle(tmp_path):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    write_cam(first, a_cam())
    write_cam(second, a_cam())
    assert first.read_bytes() == second.read_bytes()
    with np.load(first, allow_pickle=False) as data:
        kinds = {name: data[name].dtype for name in data.files}
    assert kinds == {"classes": np.int64, "cam": np.float16, "size": np.int64}


def test_read_cam__missing_file_says_what_is_needed(tmp_path):
    path = tmp_path / "none.npz"
    with pytest.raises(DataError) as caught:
        read_cam(path)
    assert str(caught.value) == f"no CAM at {path}; every photo of the list needs one"


def save(path, **changes):
    arrays = {"classes": np.array([1, 4]), "cam": np.zeros((2, 3, 4)), "size": np.array([11, 14])}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    "change",
    [
        {"cam": None},
        {"size": np.array(11)},
        {"size": np.array([11, 14, 3])},
        {"classes": np.array(4)},
        {"classes": np.array(["cat", "dog"])},
        {"cam": np.array([{}], dtype=object)},
    ],
)
def test_read_cam__other_arrays_are_no_cam(tmp_path, change):
    path = tmp_path / "photo.npz"
    save(path, **change)
    with pytest.raises(DataError, match=r"is no CAM file .*; expected arrays classes, cam, size"):
        read_cam(path)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "flipped", "npy"])
def test_read_cam__broken_file_is_answered_in_one_line(tmp_path, kind):
    path = tmp_path / "photo.npz"
    write_cam(path, a_cam())
    content = path.read_bytes()
    match kind:
        case "text":
            path.write_text("no picture")
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            start = content.index(b"cam.npy") + 160
            path.write_bytes(content[:start] + bytes([content[start] ^ 255]) + content[start + 1 :])
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))
    with pytest.raises(DataError) as caught:
        read_cam(path)
    assert str(caught.value).startswith(f"{path} is no CAM file (")
    assert "\n" not in str(caught.value)


def test_read_cam__shape_that_contradicts_size_and_classes(tmp_path):
    path = tmp_path / "photo.npz"
    save(path, cam=np.zeros((2, 3, 5)))
    with pytest.raises(DataError) as caught:
        read_cam(path)
    assert str(caught.value) == f"{path}: cam has shape (2, 3, 5); expected (2, 3, 4)"


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.0), (0.0, 2.0), (0.0, np.nan)])
def test_read_cam__values_outside_0_to_1(tmp_path, low, high):
    path = tmp_path / "photo.npz"
    cam = np.zeros((2, 3, 4))
    cam[0, 0, :2] = low, high
    save(path, cam=cam)
    with pytest.raises(
        DataError, match=re.escape(f"{path}: cam spans ") + ".*expected values in 0..1"
    ):
        read_cam(path)

"""IRNet's expansion: one maximum for all classes, batches, photos without a class."""

import dataclasses

import numpy as np
import pytest
import torch

from wsss_core.config import parse_config
from wsss_core.errors import InputError
from wsss_core.expansion import irn
from wsss_core.expansion.method import Seeded, labels_of


def settings(**changes):
    return irn.choose_settings(parse_config({"expansion": {"irn": changes}}))


def seed(cam, boundary, *, size=None, classes=None):
    """A photo of these seeds (k,h,w) and boundaries (h,w)."""
    cam = np.asarray(cam, np.float32)
    height, width = size or (4 * cam.shape[1], 4 * cam.shape[2])
    return Seeded(
        photo=np.zeros((height, width, 3), np.uint8),
        classes=np.arange(len(cam)) if classes is None else np.array(classes),
        cam=cam,
        scores=np.zeros((len(cam), height, width), np.float32),  # not looked at
        boundary=torch.as_tensor(boundary, dtype=torch.float32),
    )


def draw(num_classes, number):
    random = np.random.default_rng(number)
    cam = random.random((num_classes, 6, 9)).astype(np.float32) ** 4
    return seed(cam, random.uniform(0, 0.3, (6, 9)), size=(22, 35))


def test_choose_settings__of_irns_code_and_no_threshold_of_the_seeds():
    found = irn.choose_settings(parse_config({"seeds": {"threshold": 0.9}}))
    walk = {"radius": 5, "beta": 10, "log2_steps": 8, "threshold": 0.25}
    assert found == {"scales": (1.0,), **walk, "refine": None, "refine_seeds": None}


def test_expand__one_maximum_for_all_classes():
    """Seeds of 0.8 and 0.24 without a boundary stay as they are: 1 and 0.3 of the maximum."""
    cam = np.stack([np.full((5, 7), 0.8), np.full((5, 7), 0.24)])
    (found,) = irn.expand([seed(cam, np.zeros((5, 7)))], settings())
    assert found.scores.shape == (3, 20, 28)
    assert found.scores.dtype == np.float32
    for plane, value in zip(found.scores, (0.25, 1.0, 0.3), strict=True):
        assert plane == pytest.approx(np.full((20, 28), value), rel=1e-4)
    assert not found.failed


def test_expand__seeds_fill_their_side_of_a_wall():
    boundary = np.zeros((8, 8))
    boundary[:, 4] = 1
    cam = np.zeros((1, 8, 8))
    cam[0, 3:5, 1:3] = 1
    (found,) = irn.expand([seed(cam, boundary, classes=[6])], settings())
    labels = labels_of(found.scores, np.array([6]))
    assert (labels[:, :14] == 7).all()
    assert (labels[:, 20:] == 0).all()


def test_expand__photos_of_a_batch_are_as_alone():
    batch = [draw(1, 0), draw(3, 1), draw(0, 2), draw(2, 3)]
    for photo, found in zip(batch, irn.expand(batch, settings()), strict=True):
        (alone,) = irn.expand([photo], settings())
        assert found.scores.shape == (len(photo.classes) + 1, 22, 35)
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)


def test_expand__nothing_seeded_is_background():
    empty = seed(np.zeros((2, 4, 4)), np.zeros((4, 4)))
    for photo in (empty, draw(0, 0)):
        (found,) = irn.expand([photo], settings())
        assert not labels_of(found.scores, photo.classes).any()


def test_expand__steps_and_power_are_settings():
    photo = draw(2, 4)
    scores = [
        irn.expand([photo], settings(**changes))[0].scores
        for changes in ({}, {"log2_steps": 2}, {"beta": 1}, {"radius": 2}, {"threshold": 0.5})
    ]
    for other in scores[1:]:
        assert np.abs(other - scores[0]).max() > 0.01


def test_expand__refine_moves_the_edge_to_where_the_colours_change(monkeypatch):
    photo = np.zeros((32, 32, 3), np.uint8)
    photo[:, 18:] = 200  # the walk's cells end at 16 or 20
    cam = np.zeros((1, 8, 8), np.float32)
    cam[0, :, :4] = 1
    boundary = np.zeros((8, 8), np.float32)
    boundary[:, 4] = 1
    seeded = dataclasses.replace(seed(cam, boundary, classes=[3]), photo=photo)
    (rough,) = irn.expand([seeded], settings(threshold=0.5))
    (fine,) = irn.expand([seeded], settings(threshold=0.5, refine=True))
    truth = np.where(np.arange(32) < 18, 4, 0)[None].repeat(32, axis=0)
    assert (labels_of(rough.scores, np.array([3])) != truth).any()
    assert (labels_of(fine.scores, np.array([3])) == truth).all()

    def fail(*_args):
        raise RuntimeError("no CRF")

    monkeypatch.setattr(irn, "refine", fail)
    (kept,) = irn.expand([seeded], settings(threshold=0.5, refine=True))
    assert kept.failed
    np.testing.assert_array_equal(kept.scores, rough.scores)


def test_expand__refined_seeds_start_where_crf_and_cam_agree(monkeypatch):
    """A CRF that halves the lower part of the photo, of a size that no cell divides."""
    cam = np.full((1, 3, 4), 0.8, np.float32)
    photo = seed(cam, np.full((3, 4), 0.5), classes=[2], size=(10, 14))
    photo = dataclasses.replace(photo, scores=np.full((1, 10, 14), 0.8, np.float32))
    marginals = np.stack([np.full((10, 14), 0.5), np.full((10, 14), 0.5)]).astype(np.float32)
    marginals[1, :4] = 1
    asked = []

    def halve(_photo, unary, _crf):
        asked.append(unary)
        return marginals

    monkeypatch.setattr(irn, "refine", halve)
    changes = {"refine_seeds": True, "beta": 100, "threshold": 0.1}  # nothing gets out of its cell
    (found,) = irn.expand([photo], settings(**changes))
    assert asked[0][1].min() == pytest.approx(0.7)  # 0.8 is above seeds.threshold
    assert not found.failed
    assert found.scores[1, 0] == pytest.approx(1.0)
    assert found.scores[1, 9] == pytest.approx(0.5)

    def fail(*_args):
        raise RuntimeError("no CRF")

    monkeypatch.setattr(irn, "refine", fail)
    (kept,) = irn.expand([photo], settings(**changes))
    assert kept.failed
    assert kept.scores[1] == pytest.approx(1.0)
    bare = seed(np.zeros((0, 3, 4), np.float32), np.zeros((3, 4)), classes=[], size=(10, 14))
    assert not irn.expand([bare], settings(**changes))[0].failed


def test_expand__without_a_boundary_network():
    photo = draw(1, 0)
    bare = Seeded(photo.photo, photo.classes, photo.cam, photo.scores)
    with pytest.raises(InputError, match="train a boundary network first"):
        irn.expand([bare], settings())

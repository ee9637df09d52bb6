"""From CAMs to pseudo-masks by IRNet: confident labels, boundary network, walk; eight photos."""

import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.stages.world import Listener, draw_photo, make_home, settings
from wsss_core.data.images import read_mask, read_photo
from wsss_core.data.transforms import crop_labels, crop_photo, draw_crop, resize_photo
from wsss_core.errors import DataError, DivergedError, InputError
from wsss_core.expansion.crf import refine
from wsss_core.expansion.random_walk import propagate
from wsss_core.records import IGNORE_INDEX, Manifest
from wsss_core.seeding import derive_seed
from wsss_core.seeds.cam import Cam, read_cam, seed_size, write_cam
from wsss_core.stages import boundary as boundary_stage
from wsss_core.stages import masks as masks_stage
from wsss_core.stages import resume
from wsss_core.stages.boundary import (
    boundary_maps,
    build_boundary_net,
    load_boundary_net,
    shrink_labels,
    train_boundary,
)
from wsss_core.stages.boundary_labels import label_boundaries
from wsss_core.stages.cams import make_cams
from wsss_core.stages.masks import METHODS, expand_masks
from wsss_core.stages.shards import split_shards
from wsss_core.stages.stage import Workspace
from wsss_core.store import read_index

BACKBONE = "mobilenetv3_small_100"  # small and quickly built


def irn_settings(folder, *, epochs=1, **changes):
    """Method irn on the CAMs of a folder, as small as it gets."""
    training = {"epochs": epochs, "batch_size": 4, "long_side_px": [64, 80], "crop_px": 64}
    boundary = {"backbone": BACKBONE, "pretrained": False, "radius": 4, "training": training}
    irn = {"boundary": boundary} | changes
    return settings(
        seeds={"method": "folder", "folder": str(folder)},
        expansion={"method": "irn", "irn": irn, "crf": {"iterations": 2}},
    )


def draw_cams(photos, folder):
    """Seeds on what each photo shows, stronger to the right, and a corner that is unsure."""
    for photo in photos:
        pixels = read_photo(photo.path).astype(int)
        planes = [pixels[..., 0] - pixels[..., 2], pixels[..., 2] - pixels[..., 0]]  # red, blue
        size = pixels.shape[:2]
        cells = [(planes[tag] > 60).astype(np.float32)[2::4, 2::4] for tag in photo.tags]
        cam = np.stack(cells) * np.linspace(0.5, 1, seed_size(size)[1], dtype=np.float32)
        cam[:, -4:, -8:] = np.maximum(cam[:, -4:, -8:], 0.15)  # unsure
        write_cam(folder / f"{photo.id}.npz", Cam(np.array(photo.tags), cam, size))


@dataclass(frozen=True)
class Made:
    """What was made of the drawn CAMs."""

    work: Workspace
    data: Manifest
    config: object
    cams: Manifest
    labels: Manifest
    boundary: Manifest
    masks: Manifest

    @property
    def photos(self):
        return self.work.dataset(self.data).splits["train"]

    def file(self, manifest, name):
        return self.work.folder(manifest) / name

    def with_listener(self):
        return Workspace(self.work.home, self.work.photos_root, self.work.runtime, Listener())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("irn")
    work, data = make_home(folder)
    draw_cams(work.dataset(data).splits["train"], folder / "cams")
    config = irn_settings(folder / "cams")
    cams = make_cams(config, work, data=data, classifier=None)
    labels = label_boundaries(config, work, data=data, cams=cams)
    boundary = train_boundary(config, work, data=data, labels=labels)
    masks = expand_masks(config, work, data=data, cams=cams, boundary=boundary)
    return Made(work, data, config, cams, labels, boundary, masks)


def test_labels__photos_sizes_and_confident_labels(made):
    unsure = []
    for photo in made.photos:
        labels = read_mask(made.file(made.labels, f"{photo.id}.png"))
        assert labels.shape == read_photo(photo.path).shape[:2]
        assert set(np.unique(labels)) <= {0, IGNORE_INDEX, *(tag + 1 for tag in photo.tags)}
        unsure.append(labels == IGNORE_INDEX)
    share = sum(map(np.sum, unsure)) / sum(map(np.size, unsure))
    assert 0 < share < 0.5
    assert made.labels.metrics == {
        "boundary_labels/fallbacks": 0,
        "boundary_labels/unsure": pytest.approx(share),
    }


def test_labels__photo_the_crf_fails_on_teaches_nothing(made, monkeypatch):
    calls = []

    def fail_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no lattice")
        return refine(*args)

    monkeypatch.setattr("wsss_core.expansion.boundary_labels.refine", fail_once)
    config, work = irn_settings("cams", foreground=0.35), made.with_listener()
    labels = label_boundaries(config, work, data=made.data, cams=made.cams)
    assert labels.metrics["boundary_labels/fallbacks"] == 1
    assert work.recorder.notes == ["the CRF failed on 1 photos; they teach no boundary"]
    first, second = (read_mask(made.file(labels, f"{photo.id}.png")) for photo in made.photos[:2])
    assert (first == IGNORE_INDEX).all()
    assert not (second == IGNORE_INDEX).all()


def test_labels__a_photo_that_is_gone_is_named(made, monkeypatch):
    def read(photo):
        raise DataError(f"{photo.path} does not exist")

    monkeypatch.setattr("wsss_core.stages.boundary_labels.read_pixels", read)
    with pytest.raises(DataError, match=r"p0\.png does not exist"):
        label_boundaries(
            irn_settings("cams", foreground=0.36), made.work, data=made.data, cams=made.cams
        )


def test_boundary__trunk_stays_and_branches_move(made):
    trained = load_file(made.file(made.boundary, "boundary.safetensors"))
    settings = made.config.expansion.irn.boundary
    seed = derive_seed(made.config.seed, "boundary")
    fresh = build_boundary_net(settings, pretrained=False, seed=seed).state_dict()
    assert trained.keys() == fresh.keys()
    for name, tensor in fresh.items():
        assert torch.equal(trained[name], tensor) == name.startswith("backbone."), name
    assert made.boundary.metrics["boundary/loss"] == made.boundary.history[0]["loss"]
    assert made.boundary.metrics["boundary/skipped"] == 0


def test_boundary__loads_in_evaluation_mode(made):
    net = load_boundary_net(made.work.folder(made.boundary))
    assert not any(module.training for module in net.modules())
    description = json.loads(made.file(made.boundary, "boundary.json").read_text())
    assert description["boundary"]["backbone"] == BACKBONE


class KilledError(BaseException):
    """Stands for kill -9."""


class Killer(Listener):
    """Dies in the second batch of an epoch."""

    def progress(self, what, done, total):
        if what == "expansion.irn.boundary epoch 2/2" and done == 1:
            raise KilledError


def test_boundary__killed_and_resumed_ends_with_the_same_bytes(made, tmp_path):
    config, inputs = irn_settings("cams", epochs=2), {"data": made.data, "labels": made.labels}
    (tmp_path / "store").symlink_to(made.work.home / "store")
    killed = Workspace(tmp_path, made.work.photos_root, made.work.runtime, Killer())
    with pytest.raises(KilledError):
        train_boundary(config, killed, **inputs)
    resumed = Workspace(tmp_path, made.work.photos_root, made.work.runtime, Listener())
    after = train_boundary(config, resumed, **inputs)
    assert resumed.recorder.notes == ["expansion.irn.boundary goes on after epoch 1 of 2"]
    weights = made.file(after, "boundary.safetensors").read_bytes()

    made.work.folder(after).rename(tmp_path / "former")
    straight = train_boundary(config, made.work, **inputs)
    assert made.file(straight, "boundary.safetensors").read_bytes() == weights
    assert straight.digest == after.digest


def test_boundary__view_is_photo_and_quarter_labels_of_one_crop(made):
    settings, photo = made.config.expansion.irn.boundary, made.photos[2]
    labels = made.work.folder(made.labels)
    view = boundary_stage._view(photo, 5, labels=labels, settings=settings, seed=9)
    pixels = read_photo(photo.path)
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=settings.training.long_side_px,
        crop_px=settings.training.crop_px,
        seed=9,
        epoch=5,
        photo_id=photo.id,
    )
    full = crop_labels(read_mask(labels / f"{photo.id}.png"), crop)
    assert torch.equal(view["photo"], crop_photo(pixels, crop))
    assert torch.equal(view["labels"], full[2::4, 2::4].to(torch.uint8))


def test_shrink_labels__every_cell_also_of_sides_that_4_does_not_divide():
    labels = torch.arange(9 * 14).reshape(9, 14)
    assert torch.equal(shrink_labels(labels[:8, :12]), labels[2:8:4, 2:12:4].to(torch.uint8))
    assert shrink_labels(labels).shape == (3, 4)


def test_boundary__batch_without_a_pair_is_skipped():
    batch = {"photo": torch.zeros(1, 8, 8), "labels": torch.full((1, 8, 8), IGNORE_INDEX)}
    assert boundary_stage._loss(torch.nn.Identity(), batch, radius=5) is None


def test_boundary__diverged_names_its_setting(made, monkeypatch):
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(boundary_stage, "affinity_loss", lambda *_, **__: nan)
    with pytest.raises(DivergedError, match=r"lower expansion\.irn\.boundary\.training\."):
        train_boundary(
            irn_settings("cams", epochs=3), made.work, data=made.data, labels=made.labels
        )


@pytest.fixture(scope="module")
def net(made):
    return load_boundary_net(made.work.folder(made.boundary))


@pytest.mark.parametrize("size", [(64, 64), (50, 67), (7, 9), (20, 530)])
def test_boundary_maps__whole_photo_of_any_size(net, size):
    photos = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    found = boundary_maps(net, photos)
    assert found.shape == (2, *seed_size(size))
    assert found.min() >= 0
    assert found.max() <= 1
    assert boundary_maps(net, photos[1:])[0].numpy() == pytest.approx(found[1].numpy(), abs=1e-4)


def test_boundary_maps__mirrored_photo_has_the_mirrored_map(net):
    photo = draw_photo("disc square", 0)[None, :, :48]
    plain = boundary_maps(net, photo)
    mirrored = boundary_maps(net, np.ascontiguousarray(photo[:, :, ::-1]))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-5)
    assert plain.std() > 1e-3


@pytest.mark.parametrize("scales", [(1.4,), (0.7,), (1.0, 1.4), (1.0, 1.0)])
def test_boundary_maps__mean_of_the_scales(net, scales):
    photos = np.random.default_rng(1).integers(0, 256, (2, 50, 67, 3), dtype=np.uint8)
    alone = [boundary_maps(net, photos, scales=[scale]) for scale in scales]
    found = boundary_maps(net, photos, scales=scales)
    assert found.shape == (2, *seed_size((50, 67)))
    assert found.numpy() == pytest.approx(sum(alone).numpy() / len(scales), abs=1e-6)
    changed = not torch.allclose(found, boundary_maps(net, photos), atol=1e-4)
    assert changed == (set(scales) != {1.0})


def test_boundary_maps__a_larger_scale_is_the_larger_photo(net):
    """Of the enlarged photo, brought back to the cells of the first."""
    photo = draw_photo("disc square", 0)[:48, :64]
    large = resize_photo(photo, (96, 128)).permute(1, 2, 0).numpy()
    expected = F.avg_pool2d(boundary_maps(net, large[None]), 2)  # half-way between four cells
    assert boundary_maps(net, photo[None], scales=[2.0]).numpy() == pytest.approx(
        expected.numpy(), abs=1e-5
    )


def test_masks__are_the_walk_of_the_stored_seeds(made, net):
    """Recomputed photo by photo, from the files alone."""
    assert set(read_index(made.work.folder(made.masks))) == {photo.id for photo in made.photos}
    seen = set()
    for photo in made.photos:
        pixels, cam = read_photo(photo.path), read_cam(made.file(made.cams, f"{photo.id}.npz"))
        walked = propagate(torch.from_numpy(cam.cam), boundary_maps(net, pixels[None])[0])
        full = torch.nn.functional.interpolate(walked[None], scale_factor=4, mode="bilinear")[0]
        scores = full[:, : pixels.shape[0], : pixels.shape[1]].numpy()
        scores = scores / scores.max()
        expected = np.where(scores.max(axis=0) > 0.25, cam.classes[scores.argmax(axis=0)] + 1, 0)
        mask = read_mask(made.file(made.masks, f"{photo.id}.png"))
        assert np.mean(mask == expected) > 0.995
        seen |= set(np.unique(mask))
    assert seen == {0, 1, 2}
    assert made.masks.metrics == {"expansion/fallbacks": 0}


def test_masks__killed_goes_on_with_its_shards(made, monkeypatch):
    monkeypatch.setattr(resume, "split_shards", functools.partial(split_shards, size=3))
    config, work, calls = irn_settings("cams", threshold=0.3), made.with_listener(), []
    walk, inputs = METHODS["irn"].expand, {"cams": made.cams, "boundary": made.boundary}

    def die_late(seeded, settings):
        calls.append(len(seeded))
        if len(calls) == 4:
            raise KilledError
        return walk(seeded, settings)

    monkeypatch.setattr(masks_stage.irn, "expand", die_late)
    with pytest.raises(KilledError):
        expand_masks(config, work, data=made.data, **inputs)
    assert calls == [2, 1, 2, 1]  # photos 2 and 5 are lower than the others
    masks = expand_masks(config, work, data=made.data, **inputs)
    assert calls[4:] == [2, 1, 2]
    assert work.recorder.notes == ["masks goes on after 1 of 3 shards"]
    assert masks.count == 8


def test_masks__damaged_in_place_are_made_again(made):
    path = made.file(made.masks, f"{made.photos[0].id}.png")
    sound = path.read_bytes()
    path.write_bytes(b"damaged")
    work = made.with_listener()
    again = expand_masks(made.config, work, data=made.data, cams=made.cams, boundary=made.boundary)
    assert again.digest == made.masks.digest
    assert path.read_bytes() == sound
    assert work.recorder.notes[0] == f"rebuilt masks: {path.name} was changed"


def test_masks__without_what_they_need(made):
    with pytest.raises(InputError, match="train a boundary network first"):
        expand_masks(irn_settings("cams", beta=9), made.work, data=made.data, cams=made.cams)
    with pytest.raises(InputError, match="no CAMs to label boundaries with"):
        label_boundaries(irn_settings("cams"), made.work, data=made.data, cams=None)


def test_labels__cams_that_are_not_there(made):
    other = made.cams.model_copy(update={"key": "none"})
    with pytest.raises(DataError, match="no CAM at"):
        label_boundaries(
            irn_settings("cams", foreground=0.4), made.work, data=made.data, cams=other
        )


IRN = {"method": "irn"}


@pytest.mark.parametrize(
    ("stage", "change", "counts"),
    [
        (expand_masks, {"seeds": {"threshold": 0.3}}, False),
        (expand_masks, {"expansion": IRN | {"crf": {"iterations": 1}}}, False),
        (expand_masks, {"expansion": IRN | {"irn": {"foreground": 0.4}}}, False),
        (expand_masks, {"expansion": IRN | {"irn": {"threshold": 0.3}}}, True),
        (expand_masks, {"expansion": IRN | {"irn": {"beta": 3}}}, True),
        (expand_masks, {"expansion": {"method": "none"}}, True),
        (expand_masks, {"runtime": {"workers": 9}}, False),
        (label_boundaries, {"expansion": IRN | {"irn": {"foreground": 0.4}}}, True),
        (label_boundaries, {"expansion": IRN | {"crf": {"iterations": 1}}}, True),
        (label_boundaries, {"expansion": IRN | {"irn": {"threshold": 0.3}}}, False),
        (train_boundary, {"expansion": IRN | {"irn": {"boundary": {"radius": 5}}}}, True),
        (train_boundary, {"expansion": IRN | {"irn": {"radius": 4}}}, False),
        (train_boundary, {"seed": 1}, True),
        (label_boundaries, {"seed": 1}, False),
    ],
)
def test_key__what_counts(made, stage, change, counts):
    base = settings(expansion=IRN)
    other = settings(**({"expansion": IRN} | change))
    inputs = {"data": made.data, "labels": made.labels}
    assert (stage.key(base, **inputs) != stage.key(other, **inputs)) == counts


def test_key__crf_masks_know_nothing_of_irn(made):
    one = settings(expansion={"method": "crf"})
    other = settings(expansion={"method": "crf", "irn": {"threshold": 0.3}})
    assert expand_masks.key(one, data=made.data) == expand_masks.key(other, data=made.data)

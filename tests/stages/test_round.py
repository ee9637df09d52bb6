"""A whole round and the start of the next one, on eight photos, stage by stage."""

import json
import threading
import typing
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.stages.world import Listener, make_home, settings
from wsss_core.causal.confounders import ConfounderSet
from wsss_core.causal.intervention import shuffle_cells
from wsss_core.config import ExpansionConfig
from wsss_core.data.images import read_mask, read_photo, write_mask
from wsss_core.data.transforms import crop_labels, crop_photo, draw_crop
from wsss_core.errors import DataError, InputError
from wsss_core.evaluation.panels import CELL_PX, GAP_PX, LINE_PX
from wsss_core.expansion import crf
from wsss_core.records import IGNORE_INDEX, Manifest
from wsss_core.seeding import derive_seed
from wsss_core.seeds.cam import label_map, read_cam, seed_size, upsample_cam, write_cam
from wsss_core.stages import cams as cams_stage
from wsss_core.stages import classifier as classifier_stage
from wsss_core.stages import confounders as confounders_stage
from wsss_core.stages import predictions as predictions_stage
from wsss_core.stages import segmenter as segmenter_stage
from wsss_core.stages.cams import make_cams
from wsss_core.stages.classifier import load_classifier, train_classifier
from wsss_core.stages.confounders import update_confounders
from wsss_core.stages.context_panels import MAP_PX, draw_context
from wsss_core.stages.masks import METHODS, expand_masks
from wsss_core.stages.predictions import (
    refine_prediction,
    segment_photo,
    segment_photos,
    segment_photos_of_size,
)
from wsss_core.stages.segmenter import load_segmenter, train_segmenter
from wsss_core.stages.stage import Workspace
from wsss_core.stages.training import Pasting, draw_picture, read_picture
from wsss_core.store import read_index

CONTEXTS = ["seg_mask", "shuffled_photo", "shuffled_cells", "uniform_alpha", "conta"]


@dataclass(frozen=True)
class Round:
    """The manifests of round 0."""

    work: Workspace
    data: Manifest
    classifier: Manifest
    cams: Manifest
    masks: Manifest
    segmenter: Manifest
    predictions: Manifest
    val_predictions: Manifest
    confounders: Manifest

    @property
    def photos(self):
        return self.work.dataset(self.data).splits["train"]

    def file(self, manifest, name):
        return self.work.folder(manifest) / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config, (work, data) = settings(), make_home(tmp_path_factory.mktemp("round"))
    classifier = train_classifier(config, work, data=data)
    cams = make_cams(config, work, data=data, classifier=classifier, x_m=None)
    masks = expand_masks(config, work, data=data, cams=cams)
    segmenter = train_segmenter(config, work, data=data, masks=masks)
    predictions, val_predictions = (
        segment_photos(config, work, data=data, segmenter=segmenter, split=split)
        for split in ("train", "val")
    )
    confounders = update_confounders(
        config, work, data=data, predictions=predictions, masks=masks, former=None
    )
    return Round(
        work, data, classifier, cams, masks, segmenter, predictions, val_predictions, confounders
    )


def test_round__every_photo_has_its_files(made):
    ids = {photo.id for photo in made.photos}
    assert len(ids) == 8
    for manifest in (made.cams, made.masks):
        assert set(read_index(made.work.folder(manifest))) == ids
    assert set(read_index(made.work.folder(made.predictions))) == ids | {"x_m"}
    assert set(read_index(made.work.folder(made.val_predictions))) == {"v0", "v1", "x_m"}
    assert set(read_index(made.work.folder(made.classifier))) == {"classifier"}
    assert made.classifier.count == 2  # weights and description
    (note,) = made.work.recorder.notes  # of random weights' masks; nothing else was worth a line
    assert "alpha cannot matter" in note


def test_round__asked_again_is_all_hits(made, monkeypatch):
    def refuse(*_args, **_options):
        pytest.fail("trained again")

    for module in (classifier_stage, segmenter_stage):
        monkeypatch.setattr(module, "train", refuse)
    config, work, data = settings(runtime={"threads": 7}), made.work, made.data
    assert train_classifier(config, work, data=data) == made.classifier
    assert train_segmenter(config, work, data=data, masks=made.masks) == made.segmenter
    assert make_cams(config, work, data=data, classifier=made.classifier, x_m=None) == made.cams
    found = update_confounders(
        config, work, data=data, predictions=made.predictions, masks=made.masks, former=None
    )
    assert found == made.confounders


def test_round__other_home_other_place_same_bytes(made, tmp_path):
    work, data = make_home(tmp_path)
    assert data.digest == made.data.digest
    again = train_classifier(settings(), work, data=data)
    assert (again.key, again.digest) == (made.classifier.key, made.classifier.digest)
    cams = make_cams(settings(), work, data=data, classifier=again, x_m=None)
    assert (cams.key, cams.digest) == (made.cams.key, made.cams.digest)


def test_stage__damaged_artifact_is_rebuilt_and_said(tmp_path):
    work, data = make_home(tmp_path)
    first = train_classifier(settings(), work, data=data)
    path = work.folder(first) / "classifier.json"
    path.write_text(path.read_text() + " ")
    again = train_classifier(settings(), work, data=data)
    assert again.digest == first.digest
    assert "rebuilt classifier: classifier.json was changed" in work.recorder.notes


def test_classifier__one_record_an_epoch_and_a_loss(made):
    assert [record["epoch"] for record in made.classifier.history] == [0]
    assert made.classifier.metrics["classifier/loss"] == made.classifier.history[0]["loss"]
    assert made.classifier.metrics["classifier/skipped"] == 0


def test_classifier__frozen_blocks_stay_and_the_others_move(made):
    """One step from random weights, drawn again here."""
    model = load_classifier(made.work.folder(made.classifier))
    description = json.loads(made.file(made.classifier, "classifier.json").read_text())
    config = settings()
    fresh = classifier_stage.build_classifier(
        config.classifier,
        config.causal,
        2,
        confounders=None,
        x_m_rms=1.0,
        seed=description["seed"],
        pretrained=False,
    )
    assert description["seed"] == derive_seed(config.seed, "classifier")
    before = fresh.classifier.backbone.state_dict()
    for name, tensor in model.classifier.backbone.state_dict().items():
        block = int(name.split(".")[1]) + 1
        is_weight = name.endswith("weight") and tensor.dim() == 4  # BatchNorm is frozen everywhere
        assert torch.equal(tensor, before[name]) == (block <= 2 or not is_weight), name
    # one step at ten times 0.01, clipped to a norm of 10: the head moves by 1 at most
    moved = (model.classifier.head.weight - fresh.classifier.head.weight).norm()
    assert 0 < moved <= 1.001


def test_cams__hold_the_tags_at_stride_4_up_to_one(made):
    for photo in made.photos:
        cam = read_cam(made.file(made.cams, f"{photo.id}.npz"))
        size = read_photo(photo.path).shape[:2]
        assert tuple(cam.classes) == photo.tags
        assert cam.size == size
        assert cam.cam.shape == (len(photo.tags), *seed_size(size))
        assert cam.cam.min() >= 0
        for plane in cam.cam:
            assert plane.max() == pytest.approx(1, abs=2e-3) or not plane.any()


def test_masks__have_the_photos_sizes_and_tagged_labels(made):
    for photo in made.photos:
        mask = read_mask(made.file(made.masks, f"{photo.id}.png"))
        assert mask.shape == read_photo(photo.path).shape[:2]
        assert set(np.unique(mask)) <= {0, *(tag + 1 for tag in photo.tags)}
    assert made.masks.metrics == {"expansion/fallbacks": 0}


def seed_labels(made, photo, threshold):
    cam = read_cam(made.file(made.cams, f"{photo.id}.npz"))
    return label_map(upsample_cam(cam.cam, cam.size), cam.classes, threshold=threshold)


def median_score(made):
    """A threshold that parts the pixels of the round's seeds."""
    cams = [read_cam(made.file(made.cams, f"{photo.id}.npz")).cam for photo in made.photos]
    return float(np.median(np.concatenate([cam.ravel() for cam in cams])))


def test_masks__method_none_is_the_labelled_seed(made):
    threshold = median_score(made)
    config = settings(expansion={"method": "none"}, seeds__threshold=threshold)
    masks = expand_masks(config, made.work, data=made.data, cams=made.cams)
    found = [read_mask(made.file(masks, f"{photo.id}.png")) for photo in made.photos]
    assert 0.1 < np.mean([np.mean(mask == 0) for mask in found]) < 0.9
    for mask, photo in zip(found, made.photos, strict=True):
        assert np.array_equal(mask, seed_labels(made, photo, threshold))


def test_masks__photo_the_crf_fails_on_falls_back_to_its_seed_and_is_counted(made, monkeypatch):
    calls = []

    def fail_twice(photo, *args):
        calls.append(1)
        if len(calls) <= 2:
            raise RuntimeError("no lattice")
        return refine(photo, *args)

    refine = crf.refine
    monkeypatch.setattr(crf, "refine", fail_twice)
    threshold = median_score(made)
    config = settings(seeds__threshold=threshold)
    work = Workspace(made.work.home, made.work.photos_root, made.work.runtime, Listener())
    masks = expand_masks(config, work, data=made.data, cams=made.cams)
    assert masks.metrics == {"expansion/fallbacks": 2}
    assert work.recorder.notes == ["the CRF failed on 2 photos; their masks are their seeds"]
    for photo in made.photos[:2]:
        mask = read_mask(made.file(masks, f"{photo.id}.png"))
        assert np.array_equal(mask, seed_labels(made, photo, threshold))


def test_methods__are_those_that_the_settings_know():
    named = typing.get_args(ExpansionConfig.model_fields["method"].annotation)
    assert {*METHODS, "folder"} == {*named}


def test_masks__unary_is_a_setting(made):
    digests = {
        expand_masks(
            settings(expansion__unary=unary), made.work, data=made.data, cams=made.cams
        ).digest
        for unary in ("soft", "hard")
    }
    assert len(digests) == 2


def test_segmenter__batch_without_a_labelled_pixel_is_skipped():
    batch = {"labels": torch.full((2, 4, 4), IGNORE_INDEX)}  # no photo: it is not looked at
    assert segmenter_stage._loss(torch.nn.Identity(), batch, class_balanced=False) is None


def test_segmenter__is_trained_and_loads(made):
    model, classes = load_segmenter(made.work.folder(made.segmenter))
    assert classes == ("disc", "square")
    assert not model.training
    assert made.segmenter.metrics["segmenter/loss"] == made.segmenter.history[0]["loss"]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 2, 2)


@pytest.fixture(scope="module")
def segmenter(made):
    return load_segmenter(made.work.folder(made.segmenter))[0]


def test_predictions__x_m_and_mask_are_of_the_same_probabilities(made, segmenter):
    """X_m = 1 - p_background on 8 x 8 cells: block means, for 8 divides every side."""
    x_m = load_file(made.file(made.predictions, "x_m.safetensors"))["x_m"]
    assert x_m.shape == (8, 8, 8)
    for row, photo in zip(x_m, made.photos, strict=True):
        pixels = read_photo(photo.path)
        probabilities = segment_photo(segmenter, pixels, scales=(1.0,), flip=True)
        height, width = pixels.shape[:2]
        foreground = (1 - probabilities[0]).reshape(8, height // 8, 8, width // 8)
        assert row.numpy() == pytest.approx(foreground.mean(axis=(1, 3)), abs=1e-4)
        mask = read_mask(made.file(made.predictions, f"{photo.id}.png"))
        assert np.mean(mask == probabilities.argmax(axis=0)) > 0.999


@pytest.fixture(scope="module")
def lopsided():
    """A segmenter at stride 16 that sees left and right differently, with clear answers."""
    model = torch.nn.Conv2d(3, 3, 16, stride=16)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.weight.copy_(0.3 * torch.randn(model.weight.shape, generator=generator))
        model.bias.zero_()
    return model


def test_segment_photos_of_size__probabilities_of_every_photo_alone(lopsided):
    photos = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    found = segment_photos_of_size(lopsided, photos, scales=(1.0, 0.5), flip=True)
    assert found.shape == (3, 3, 40, 56)
    assert found.sum(axis=1) == pytest.approx(np.ones((3, 40, 56)), abs=1e-5)
    assert found.std() > 0.1
    alone = segment_photo(lopsided, photos[1], scales=(1.0, 0.5), flip=True)
    assert found[1] == pytest.approx(alone, abs=1e-5)
    parts = [segment_photo(lopsided, photos[1], scales=(s,), flip=True) for s in (1.0, 0.5)]
    assert alone == pytest.approx(np.mean(parts, axis=0), abs=1e-5)


def test_segment_photos_of_size__mirrored_photo_has_the_mirrored_answer(lopsided):
    photo = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    mirror = np.ascontiguousarray(photo[:, ::-1])
    for flip in (True, False):
        plain, mirrored = (
            segment_photo(lopsided, p, scales=(1.0,), flip=flip) for p in (photo, mirror)
        )
        assert (np.abs(mirrored[:, :, ::-1] - plain).max() < 1e-5) == flip


def test_refine_prediction__only_winners_enter_the_crf():
    random = np.random.default_rng(0)
    photo = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    probabilities = np.full((4, 12, 12), 0.1, np.float32)
    probabilities[0, :6], probabilities[2, 6:] = 0.7, 0.7
    found = refine_prediction(photo, probabilities, settings().segmenter_test.crf_params)
    assert set(np.unique(found.argmax(axis=0))) <= {0, 2}
    assert not found[[1, 3]].any()
    assert found.sum(axis=0) == pytest.approx(np.ones((12, 12)), abs=1e-5)


def test_refine_prediction__empty_scene_is_left_alone():
    probabilities = np.zeros((3, 4, 4), np.float32)
    probabilities[0] = 1
    photo = np.zeros((4, 4, 3), np.uint8)
    crf = settings().segmenter_test.crf_params
    assert refine_prediction(photo, probabilities, crf) is probabilities


def test_test_segmenter__has_no_x_m_and_takes_the_crf(made):
    config = settings(segmenter_test={"scales": [1.0, 1.5], "crf": True})
    inputs = {"data": made.data, "segmenter": made.segmenter, "split": "val"}
    stage = predictions_stage.test_segmenter  # imported by name, pytest would take it for a test
    tested = stage(config, made.work, **inputs)
    assert set(read_index(made.work.folder(tested))) == {"v0", "v1"}
    assert stage(settings(), made.work, **inputs).key != tested.key


def test_confounders__are_the_mean_masks_of_the_photos_tagged(made):
    found = ConfounderSet.load(made.file(made.confounders, "confounders.safetensors"))
    for label, c in enumerate(found.c, start=1):
        tagged = [photo for photo in made.photos if label - 1 in photo.tags]
        masks = [read_mask(made.file(made.predictions, f"{photo.id}.png")) for photo in tagged]
        shares = [
            (mask == label).reshape(8, mask.shape[0] // 8, 8, mask.shape[1] // 8).mean(axis=(1, 3))
            for mask in masks
        ]
        if any(share.any() for share in shares):
            assert c == pytest.approx(np.mean(shares, axis=0), abs=1e-6)
        assert found.counts[label - 1] == sum(share.any() for share in shares)
    assert found.prior.tolist() == [0.5, 0.5]
    assert made.confounders.metrics["confounders/unseen"] == (found.counts == 0).sum()


def next_classifier(made, context, **changes):
    config = settings(causal__context=context, **changes)
    confounders = update_confounders(
        config,
        made.work,
        data=made.data,
        predictions=made.predictions,
        masks=made.masks,
        former=None,
    )
    return train_classifier(
        config, made.work, data=made.data, confounders=confounders, x_m=made.predictions
    )


@pytest.mark.parametrize("context", CONTEXTS)
def test_classifier__every_arm_starts_from_round_0_bit_for_bit(made, context):
    """One batch, so the epoch's loss is that of the first step, with the slice still zero."""
    manifest = next_classifier(made, context)
    assert manifest.history[0]["loss"] == made.classifier.history[0]["loss"]
    assert manifest.metrics["context/m_spread"] >= 0
    assert manifest.metrics["context/rms_ratio"] > 0  # measured after that step
    assert manifest.digest != made.classifier.digest

    weights = load_file(made.file(manifest, "classifier.safetensors"))
    slices = [t for n, t in weights.items() if n.startswith("classifier.slices")]
    assert len(slices) == 1
    assert bool(slices[0].any())  # one step, and w_m has moved though block 5's BN is frozen


@pytest.mark.parametrize("context", CONTEXTS)
def test_load_classifier__has_the_context_it_was_trained_with(made, context):
    manifest = next_classifier(made, context)
    model = load_classifier(made.work.folder(manifest))
    description = json.loads(made.file(manifest, "classifier.json").read_text())
    if context == "seg_mask":
        x_m = load_file(made.file(made.predictions, "x_m.safetensors"))["x_m"]
        assert model.intervention.gain == pytest.approx(1 / float(x_m.square().mean().sqrt()))
        return
    expected = ConfounderSet.load(made.file(made.confounders, "confounders.safetensors"))
    if context == "shuffled_cells":
        expected = shuffle_cells(expected, seed=derive_seed(description["seed"], "context"))
    assert np.array_equal(model.intervention.c.numpy(), expected.c.reshape(2, -1))


@pytest.mark.parametrize(
    ("context", "files"), [("conta", {"context", "confounders"}), ("seg_mask", {"context"})]
)
def test_draw_context__shows_what_the_classifier_was_given(made, context, files):
    classifier = next_classifier(made, context)
    drawn = draw_context(
        settings(), made.work, data=made.data, classifier=classifier, x_m=made.predictions
    )
    assert set(read_index(made.work.folder(drawn))) == files
    page = read_photo(made.file(drawn, "context.png"))
    assert page.shape[1] == 3 * (CELL_PX + GAP_PX) + GAP_PX  # photo, X_m, M
    if context == "conta":
        c = ConfounderSet.load(made.file(made.confounders, "confounders.safetensors")).c
        sheet = read_photo(made.file(drawn, "confounders.png"))
        top, left = GAP_PX + 2 * LINE_PX, GAP_PX
        drawn_c = sheet[top : top + MAP_PX, left : left + MAP_PX, 0]
        cell = MAP_PX // c.shape[1]
        expected = np.round(255 * c[0] / c.max())
        assert np.array_equal(drawn_c[cell // 2 :: cell, cell // 2 :: cell], expected)


def test_confounders__that_differ_are_not_flagged(tmp_path, monkeypatch):
    (work, data), config = make_home(tmp_path), settings(expansion={"method": "none"})
    classifier = train_classifier(config, work, data=data)
    cams = make_cams(config, work, data=data, classifier=classifier, x_m=None)
    masks = expand_masks(config, work, data=data, cams=cams)
    monkeypatch.setattr(confounders_stage, "COSINE_THRESHOLD", 1.0)
    update_confounders(config, work, data=data, predictions=masks, masks=masks, former=None)
    assert not work.recorder.notes


def test_classifier__context_none_is_the_plain_one(made):
    manifest = next_classifier(made, "none")
    assert manifest.history[0]["loss"] == made.classifier.history[0]["loss"]
    weights = made.file(manifest, "classifier.safetensors").read_bytes()
    assert weights == made.file(made.classifier, "classifier.safetensors").read_bytes()


def test_classifier__exact_starts_from_round_0_and_says_how_far_nwgm_is(made):
    exact = next_classifier(made, "conta", causal__adjustment="exact")
    nwgm = next_classifier(made, "conta")
    expected = made.classifier.history[0]["loss"]
    assert exact.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert exact.digest != nwgm.digest
    assert load_classifier(made.work.folder(exact)).exact
    assert not load_classifier(made.work.folder(nwgm)).exact
    for manifest in (exact, nwgm):
        gaps = {name for name in manifest.metrics if name.startswith("adjustment/")}
        assert gaps == {f"adjustment/{part}" for part in ("mean_gap", "inside_gap", "logit_spread")}
        assert manifest.metrics["adjustment/logit_spread"] > 0  # the slice has made one step
    assert not any(name.startswith("adjustment/") for name in made.classifier.metrics)
    x_m = {"x_m": made.predictions}
    cams = make_cams(settings(), made.work, data=made.data, classifier=exact, **x_m)
    assert cams.digest != made.cams.digest


def test_classifier__drawn_confounders_are_a_photo_s_own(made):
    exact = {"causal__adjustment": "exact"}
    drawn = next_classifier(made, "conta", causal__exact_samples=1, **exact)
    assert drawn.digest != next_classifier(made, "conta", **exact).digest
    photo, calls = made.photos[2], []

    def draw(**which):
        calls.append(which)
        return torch.tensor([1])

    view = classifier_stage._view(
        (2, photo),
        5,
        settings=settings().classifier,
        seed=9,
        num_classes=2,
        contexts=torch.zeros(8, 4, 4),
        draw=draw,
    )
    assert calls == [{"epoch": 5, "photo_id": photo.id}]
    assert view["draw"].tolist() == [1]


def test_round__slice_frozen_at_zero_is_none_bit_for_bit(made, monkeypatch):
    build = classifier_stage.build_classifier

    def build_frozen(*args, **options):
        model = build(*args, **options)
        model.classifier.slices.requires_grad_(False)
        return model

    # four steps: from the second on a slice that learns has changed the trunk too
    tree = settings().classifier.model_dump(mode="json")
    longer = {"classifier": tree | {"training": tree["training"] | {"epochs": 2, "batch_size": 4}}}
    learning = next_classifier(made, "conta", **longer)
    monkeypatch.setattr(classifier_stage, "build_classifier", build_frozen)
    # scale `paper`: the store has not seen this classifier
    frozen = next_classifier(made, "conta", **longer, causal__scale="paper")
    plain = train_classifier(settings(**longer), made.work, data=made.data)

    weights, learned, expected = (
        load_file(made.file(classifier, "classifier.safetensors"))
        for classifier in (frozen, learning, plain)
    )
    own = {"classifier.slices.0.conv.weight", "intervention.w1", "intervention.w2"}
    assert set(weights) - set(expected) == own
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(learned[name], tensor) for name, tensor in expected.items())

    def go_on(classifier, x_m):
        inputs = {"data": made.data, "classifier": classifier, "x_m": x_m}
        cams = make_cams(settings(), made.work, **inputs)
        return cams, expand_masks(settings(), made.work, data=made.data, cams=cams)

    cams, masks = go_on(frozen, made.predictions)
    plain_cams, plain_masks = go_on(plain, None)
    assert cams.key != plain_cams.key
    assert cams.digest == plain_cams.digest  # what follows is asked under the same keys
    assert masks == plain_masks
    assert go_on(learning, made.predictions)[0].digest != cams.digest


def test_context_ratio__same_whatever_was_done_before_and_in_however_many_parts(made, monkeypatch):
    """A training that was finished before this start has set no mode, nor seen a batch."""
    exact = settings(causal__adjustment="exact")
    confounders = ConfounderSet.load(made.work.folder(made.confounders) / "confounders.safetensors")
    model = classifier_stage.build_classifier(
        exact.classifier,
        exact.causal,
        2,
        confounders=confounders,
        x_m_rms=1.0,
        seed=0,
        pretrained=False,
    )
    for part in model.classifier.context_slices():
        torch.nn.init.constant_(part.conv.weight, 0.5)
    affine = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]).repeat(4, 1, 1)
    batch = {"photo": torch.randn(4, 3, 64, 64), "x_m": torch.rand(4, 8, 8), "affine": affine}
    model.eval()
    first = classifier_stage.context_ratio(model, batch)
    assert first > 0
    model.train()
    assert classifier_stage.context_ratio(model, batch) == first
    monkeypatch.setattr(classifier_stage, "PASS_CELLS", 1)
    assert classifier_stage.context_ratio(model, batch) == pytest.approx(first, rel=1e-5)


def test_round__slice_that_starts_at_random_is_seen_and_changes_nothing_else(made, monkeypatch):
    """Head, trunk, W1 and W2 start as with a zero slice; what the context adds does not vanish."""
    starts = []
    build = classifier_stage.build_classifier

    def build_and_keep(*args, **options):
        model = build(*args, **options)
        starts.append({name: t.clone() for name, t in model.state_dict().items()})
        return model

    monkeypatch.setattr(classifier_stage, "build_classifier", build_and_keep)
    own = {"causal__attention_std": 0.05}  # no other test finds these classifiers in the store
    zero = next_classifier(made, "conta", **own)
    drawn = next_classifier(made, "conta", **own, causal__slice_init="random")
    differs = [name for name, t in starts[0].items() if not torch.equal(t, starts[1][name])]
    assert differs == ["classifier.slices.0.conv.weight"]
    assert drawn.key != zero.key
    assert drawn.metrics["context/rms_ratio"] > 10 * zero.metrics["context/rms_ratio"]

    loud = next_classifier(made, "conta", **own, causal__amplitude=30.0)
    assert all(torch.equal(t, starts[2][name]) for name, t in starts[0].items())
    # from a zero slice the gradient grows with M, and what the slice adds with both
    assert loud.metrics["context/rms_ratio"] > 100 * zero.metrics["context/rms_ratio"]
    shown = [load_classifier(made.work.folder(one)).intervention for one in (zero, loud)]
    assert shown[1].gain == pytest.approx(30 * shown[0].gain)


def test_key__round_0_has_one_for_every_arm(made):
    arms = [{"context": context} for context in ("none", *CONTEXTS)]
    arms += [{"adjustment": "exact"}, {"adjustment": "exact", "exact_samples": 2}]
    arms += [{"slice_init": "random"}, {"attention_std": 0.1}, {"amplitude": 30.0}]
    inputs = {"data": made.data, "confounders": None, "x_m": None, "start": None}
    keys = {train_classifier.key(settings(causal=arm), **inputs) for arm in arms}
    assert len(keys) == 1
    inputs = {"data": made.data, "predictions": made.predictions, "masks": made.masks}
    keys = {update_confounders.key(settings(causal=arm), former=None, **inputs) for arm in arms}
    assert len(keys) == len(arms)


def test_cams__of_the_next_round_see_the_context(made):
    classifier = next_classifier(made, "conta")
    cams = make_cams(
        settings(), made.work, data=made.data, classifier=classifier, x_m=made.predictions
    )
    without = make_cams(settings(), made.work, data=made.data, classifier=classifier, x_m=None)
    assert cams.count == 8
    assert cams.digest != without.digest


def test_classifier__view_is_crop_tags_and_context_of_one_photo(made):
    config, contexts = settings().classifier, torch.arange(8.0).view(8, 1, 1).expand(8, 4, 4)
    photo = made.photos[2]
    view = classifier_stage._view(
        (2, photo), 5, settings=config, seed=9, num_classes=3, contexts=contexts
    )
    pixels = read_photo(photo.path)
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=config.training.long_side_px,
        crop_px=config.training.crop_px,
        seed=9,
        epoch=5,
        photo_id=photo.id,
    )
    assert torch.equal(view["photo"], crop_photo(pixels, crop))
    assert torch.equal(view["affine"], crop.affine())
    assert torch.equal(view["x_m"], contexts[2])
    assert view["tags"].tolist() == [1, 1, 0]


def test_classifier__pasted_shows_half_of_the_objects_before_another_context(made, tmp_path):
    """Every view is the photo's own, or one of a picture that `paste` makes of two of the list."""
    work = made.work
    pasted, own_photo = (
        train_classifier(settings(), work, data=made.data, pasted=made.masks, context=context)
        for context in ("pasted", "pasted_own")
    )
    assert len({pasted.key, own_photo.key, made.classifier.key}) == 3
    names = set(load_file(made.file(pasted, "classifier.safetensors")))
    assert names == set(load_file(made.file(made.classifier, "classifier.safetensors")))
    inputs = {"data": made.data, "classifier": pasted, "x_m": None}
    assert make_cams(settings(), work, **inputs).count == 8

    config, own, other = settings().classifier, 0, 0
    half = Pasting("pasted", made.photos, tmp_path, 0.5)
    for photo in made.photos:
        mask = np.zeros(read_photo(photo.path).shape[:2], np.uint8)
        mask[2:12, 3:13] = photo.tags[0] + 1
        write_mask(tmp_path / f"{photo.id}.png", mask)
    for epoch in range(10):
        for item in enumerate(made.photos):
            plain, view, again = (
                classifier_stage._view(
                    item,
                    epoch,
                    settings=config,
                    seed=9,
                    num_classes=3,
                    contexts=None,
                    pasting=pasting,
                )
                for pasting in (None, half, half)
            )
            assert torch.equal(view["photo"], again["photo"])
            same = torch.equal(view["photo"], plain["photo"])
            assert not same or torch.equal(view["tags"], plain["tags"])
            own, other = own + same, other + (not same)
    assert own > 20
    assert other > 20


def test_segmenter__pasted_shows_objects_with_their_labels(made, tmp_path):
    """Every photo has another context, whose labels follow; a crop may show none of the object."""
    work, config = made.work, settings().segmenter
    pasted = train_segmenter(settings(), work, data=made.data, masks=made.masks, context="pasted")
    assert pasted.key != made.segmenter.key
    for photo in made.photos:
        mask = np.zeros(read_photo(photo.path).shape[:2], np.uint8)
        mask[2:12, 3:13] = photo.tags[0] + 1
        write_mask(tmp_path / f"{photo.id}.png", mask)
    changed = 0
    for epoch in range(10):
        for photo in made.photos:
            plain, view = (
                segmenter_stage._view(
                    photo,
                    epoch,
                    masks=tmp_path,
                    settings=config,
                    seed=9,
                    pasting=pasting,
                )
                for pasting in (None, Pasting("pasted", made.photos, tmp_path, 1.0))
            )
            if torch.equal(plain["photo"], view["photo"]):
                assert torch.equal(plain["labels"], view["labels"])
            else:
                changed += 1
                assert photo.tags[0] + 1 in view["labels"] or 255 in view["labels"]
    assert changed > 60  # of 80; half of them would be 40


def test_cams__every_thread_has_a_classifier_of_its_own(made):
    """A model holds its batch's context while it looks; Prefect's stages may run in threads."""
    folder, models = made.work.folder(made.classifier), {}

    def look(name):
        models[name] = [cams_stage._load(folder, "cpu") for _ in range(2)]

    threads = [threading.Thread(target=look, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert models["a"][0] is models["a"][1]
    assert models["a"][0] is not models["b"][0]


def test_pasting__half_of_the_classifiers_photos_and_the_share_of_the_segmenters(made, monkeypatch):
    """What decisions/0009 chose; whatever the share, a photo would be a photo."""
    shares = []

    def stop(*_, share, **__):
        shares.append(share)
        raise RuntimeError("enough")

    for module in (classifier_stage, segmenter_stage):
        monkeypatch.setattr(module, "plan_pasting", stop)
    config, work, inputs = settings(seed=77), made.work, {"data": made.data, "context": "pasted"}
    with pytest.raises(RuntimeError, match="enough"):
        train_classifier(config, work, pasted=made.masks, **inputs)
    for share in ("1.0", "0.25", "0.0"):
        with pytest.raises(RuntimeError, match="enough"):
            train_segmenter(config, work, masks=made.masks, share=share, **inputs)
    assert shares == [0.5, 1.0, 0.25, 0.0]


def test_pasted_bare__takes_the_objects_out_of_half_of_the_contexts(made, tmp_path):
    """Then the object that is pasted is the only one there, and its tag the only tag."""
    alone, contexts = 0, Pasting("pasted_bare", made.photos, tmp_path, 1.0)
    for photo in made.photos:
        mask = np.zeros(read_photo(photo.path).shape[:2], np.uint8)
        mask[2:12, 3:13] = photo.tags[0] + 1
        write_mask(tmp_path / f"{photo.id}.png", mask)
    drawn = [(photo, epoch) for photo in made.photos for epoch in range(30)]
    for photo, epoch in drawn:
        picture = draw_picture(photo, epoch, pasting=contexts, seed=9)
        again = draw_picture(photo, epoch, pasting=contexts, seed=9)
        assert np.array_equal(picture.photo, again.photo)
        alone += picture.tags == (photo.tags[0],)
    assert 0.3 < alone / len(drawn) < 0.7


def test_pasted_own__puts_the_object_elsewhere_in_its_own_photo(made, tmp_path):
    """Tags and pixels are the photo's own, but for a second copy of the object; never another's."""
    moved, own = 0, Pasting("pasted_own", made.photos, tmp_path, 1.0)
    for number, photo in enumerate(made.photos):
        mask = np.zeros(read_photo(photo.path).shape[:2], np.uint8)
        mask[2:12, 3:13] = photo.tags[0] + 1
        write_mask(tmp_path / f"{photo.id}.png", mask)
        plain = read_picture(photo, tmp_path)
        picture = draw_picture(photo, number, pasting=own, seed=9)
        assert picture.tags == plain.tags
        assert np.array_equal(picture.photo[picture.mask == 0], plain.photo[picture.mask == 0])
        assert (picture.mask[mask > 0] == photo.tags[0] + 1).all()
        moved += bool((picture.mask != plain.mask).any())
    assert moved > len(made.photos) // 2


def test_segmenter__view_is_photo_and_mask_of_one_crop(made):
    config, photo = settings().segmenter, made.photos[2]
    masks = made.work.folder(made.masks)
    view = segmenter_stage._view(photo, 5, masks=masks, settings=config, seed=9)
    pixels, labels = read_photo(photo.path), read_mask(masks / f"{photo.id}.png")
    crop = draw_crop(
        pixels.shape[:2],
        long_side_px=config.training.long_side_px,
        crop_px=config.training.crop_px,
        seed=9,
        epoch=5,
        photo_id=photo.id,
    )
    assert torch.equal(view["photo"], crop_photo(pixels, crop))
    assert torch.equal(view["labels"], crop_labels(labels, crop))


@pytest.mark.parametrize("start", ["classifier", "segmenter"])
def test_classifier__start_is_the_former_rounds_weights(made, start):
    """At a vanishing rate what comes out is what went in."""
    manifest = getattr(made, start)
    training = settings().classifier.training.model_dump() | {"learning_rate": 1e-20}
    config = settings(classifier={"pretrained": False, "training": training})
    classifier = train_classifier(config, made.work, data=made.data, start=manifest)
    found = load_file(made.file(classifier, "classifier.safetensors"))
    weights = load_file(made.file(manifest, f"{start}.safetensors"))
    prefix = "" if start == "classifier" else "classifier."
    trunk = {n: t for n, t in weights.items() if "backbone." in n}
    assert len(trunk) > 200
    for name, tensor in trunk.items():
        assert torch.equal(found[prefix + name], tensor), name
    same_head = torch.equal(
        found["classifier.head.weight"],
        load_file(made.file(made.classifier, "classifier.safetensors"))["classifier.head.weight"],
    )
    assert same_head == (start == "classifier")


# --- anybody's seeds and masks ----------------------------------------------------------------


def adopt_cams(made, folder):
    config = settings(seeds={"method": "folder", "folder": str(folder)})
    return make_cams(config, made.work, data=made.data, classifier=None, x_m=None)


def copy_cams(made, folder, change=lambda cam: cam):
    """The round's CAMs in a folder of somebody's; `change` is done to the first photo's."""
    for number, photo in enumerate(made.photos):
        cam = read_cam(made.file(made.cams, f"{photo.id}.npz"))
        write_cam(folder / f"{photo.id}.npz", change(cam) if number == 0 else cam)


def test_cams__folder_takes_anybodys(made, tmp_path):
    copy_cams(made, tmp_path)
    assert adopt_cams(made, tmp_path).digest == made.cams.digest


def test_cams__folder_without_a_photo(made, tmp_path):
    copy_cams(made, tmp_path)
    (tmp_path / "p3.npz").unlink()
    with pytest.raises(DataError, match=r"no CAM at .*p3\.npz; every photo of the list needs one"):
        adopt_cams(made, tmp_path)


def test_cams__folder_with_a_cam_of_another_photo(made, tmp_path):
    copy_cams(made, tmp_path, lambda cam: type(cam)(np.array([1]), cam.cam, cam.size))
    with pytest.raises(DataError, match=r"holds classes \[1\]; expected the photo's tags.*\[0\]"):
        adopt_cams(made, tmp_path)
    copy_cams(made, tmp_path, lambda cam: type(cam)(cam.classes, cam.cam[:, :12], (48, 64)))
    with pytest.raises(DataError, match=r"is for a photo of \(48, 64\), its photo is \(64, 64\)"):
        adopt_cams(made, tmp_path)


def adopt_masks(made, folder):
    config = settings(expansion={"method": "folder", "folder": str(folder)})
    return expand_masks(config, made.work, data=made.data, cams=None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((64, 64), 9, np.uint8), r"holds label 9; expected 0\.\.2 or 255"),
        (np.zeros((64, 60), np.uint8), "is 60 x 64 px, its photo 64 x 64 px; make the mask"),
    ],
)
def test_masks__folder_is_checked(made, tmp_path, mask, message):
    for photo in made.photos:
        write_mask(
            tmp_path / f"{photo.id}.png", read_mask(made.file(made.masks, f"{photo.id}.png"))
        )
    assert adopt_masks(made, tmp_path).digest == made.masks.digest
    other = tmp_path / "other"
    for photo in made.photos:
        write_mask(other / f"{photo.id}.png", mask)
    with pytest.raises(DataError, match=message):
        adopt_masks(made, other)


def test_key__folders_count_by_content_and_not_by_place(made, tmp_path):
    copy_cams(made, tmp_path / "a")
    copy_cams(made, tmp_path / "b")
    first = adopt_cams(made, tmp_path / "a")
    assert adopt_cams(made, tmp_path / "b").key == first.key

    photo = made.photos[0].id
    cam = read_cam(tmp_path / "b" / f"{photo}.npz")
    write_cam(tmp_path / "b" / f"{photo}.npz", type(cam)(cam.classes, cam.cam / 2, cam.size))
    changed = adopt_cams(made, tmp_path / "b")
    assert changed.key != first.key
    assert changed.digest != first.digest


def test_key__threshold_is_the_masks_business(made):
    one, other = settings(seeds__threshold=0.2), settings(seeds__threshold=0.3)
    inputs = {"data": made.data}
    assert make_cams.key(one, **inputs) == make_cams.key(other, **inputs)
    assert expand_masks.key(one, **inputs) != expand_masks.key(other, **inputs)


def test_cams__neither_classifier_nor_folder(made):
    with pytest.raises(InputError, match="no classifier to make CAMs with"):
        make_cams(settings(), made.work, data=made.data, classifier=None)
    with pytest.raises(InputError, match="no CAMs to expand"):
        expand_masks(settings(), made.work, data=made.data, cams=None)


# --- workspace and keys -----------------------------------------------------------------------


def test_data_root__folder_not_given(made):
    with pytest.raises(InputError, match="give it with --data DIR"):
        Workspace(made.work.home).data_root(made.data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device__cuda_where_there_is_none(made):
    config = settings(runtime={"device": "cuda:1"})
    work = Workspace(made.work.home, runtime=config.runtime)
    with pytest.raises(InputError) as caught:
        work.device()
    assert str(caught.value) == (
        "runtime.device is 'cuda:1', but no CUDA device is seen here; set it to cpu or auto"
    )
    assert Workspace(made.work.home).device() == torch.device("cpu")


def test_key__seed_counts_for_stages_that_draw_alone(made):
    data = {"data": made.data}
    for stage, seeded in ((train_classifier, True), (train_segmenter, True), (make_cams, False)):
        keys = {stage.key(settings(seed=seed), **data) for seed in (0, 1)}
        assert len(keys) == (2 if seeded else 1)


def test_key__start_of_later_rounds_is_an_input_not_a_setting(made):
    """Round 0 is the same run for every `init`."""
    keys = {
        train_classifier.key(settings(classifier__init=init), data=made.data)
        for init in ("imagenet", "previous", "segmenter")
    }
    assert len(keys) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_key__amp_is_fp32_where_there_is_no_cuda(made):
    keys = {
        train_classifier.key(settings(runtime={"precision": p}), data=made.data)
        for p in ("fp32", "amp")
    }
    assert len(keys) == 1


def test_question__says_what_the_key_is_made_of(made):
    question = train_classifier.question(settings(), data=made.data, start=None)
    assert question["inputs"] == {"data": made.data.digest, "start": None}
    assert question["settings"]["training"]["epochs"] == 1
    assert "wsss_core.models.classifier" in question["code"]
    assert question["seed"] == derive_seed(0, "classifier")
    stored = made.work.store.questions("confounders")
    assert stored
    assert stored[-1]["settings"]["context_size"] == 8

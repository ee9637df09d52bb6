"""What `auto` becomes: eight photos, random weights, and the numbers are found again by hand."""

import functools
import json

import numpy as np
import pytest

from tests.stages.test_irn import irn_settings
from tests.stages.world import make_home, settings
from wsss_core.config import parse_config
from wsss_core.data.images import read_photo
from wsss_core.errors import SettingsError
from wsss_core.evaluation.evidence import Evidence, gather_evidence
from wsss_core.expansion import irn
from wsss_core.expansion.boundary_labels import choose_settings
from wsss_core.expansion.method import Seeded
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages import calibrate
from wsss_core.stages.boundary import boundary_maps, load_boundary_net, train_boundary
from wsss_core.stages.boundary_labels import label_boundaries
from wsss_core.stages.calibrate import (
    BETAS,
    adopt_seeds,
    adopt_walk,
    calibrate_seeds,
    calibrate_walk,
    is_open,
)
from wsss_core.stages.cams import make_cams
from wsss_core.stages.classifier import load_classifier, train_classifier
from wsss_core.stages.tag_scores import tag_probabilities

THRESHOLDS = calibrate.THRESHOLDS[::3]
"""Those that are tried here; each costs two looks at every photo, in the stage and by hand."""


@pytest.fixture(autouse=True)
def few_thresholds(monkeypatch):
    monkeypatch.setattr(calibrate, "THRESHOLDS", THRESHOLDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config, (work, data) = settings(), make_home(tmp_path_factory.mktemp("calibrate"))
    classifier = train_classifier(config, work, data=data)
    cams = make_cams(config, work, data=data, classifier=classifier, x_m=None)
    return work, {"data": data, "classifier": classifier, "cams": cams}


def test_calibrate_seeds__is_the_most_evidence_over_all_photos(made):
    work, inputs = made
    config = settings(seeds={"scales": [1.0, 0.5], "threshold": "auto"})
    found = calibrate_seeds(config, work, **inputs, x_m=None)
    document = json.loads((work.folder(found) / "calibration.json").read_text())
    model = load_classifier(work.folder(inputs["classifier"]))
    rows = []
    for photo in work.dataset(inputs["data"]).splits["train"]:
        cam = read_cam(work.folder(inputs["cams"]) / f"{photo.id}.npz")
        rows.append(
            gather_evidence(
                read_photo(photo.path),
                upsample_cam(cam.cam, cam.size),
                cam.classes,
                lambda views: tag_probabilities(model, views, None),
                thresholds=THRESHOLDS,
            )
        )
    kept, removed, area = np.concatenate(rows).mean(axis=0)
    assert document["curves"][0]["area"] == pytest.approx(area, abs=1e-4)
    assert document["curves"][0]["kept"] == pytest.approx(kept, abs=1e-3)
    peak = THRESHOLDS[int((kept - removed + 1 - 2 * area).argmax())]
    half_a_step = (THRESHOLDS[1] - THRESHOLDS[0]) / 2  # as far as the parabola may go
    assert document["chosen"]["threshold"] == pytest.approx(peak, abs=half_a_step)

    adopted = adopt_seeds(config, found)
    assert adopted.seeds.threshold == document["chosen"]["threshold"]
    assert adopted.seeds.scales == config.seeds.scales
    assert adopted.expansion == config.expansion


def test_calibrate_walk__tries_every_walk_and_adopts_the_best(made, tmp_path, monkeypatch):
    work, inputs = made
    tree = irn_settings(tmp_path).model_dump(mode="json")
    tree["seeds"] = {"scales": [1.0, 0.5]}
    tree["expansion"]["irn"] |= {"beta": "auto", "log2_steps": 2, "threshold": "auto"}
    config = parse_config(tree)
    assert is_open(config.expansion.irn)
    labels = label_boundaries(config, work, data=inputs["data"], cams=inputs["cams"])
    boundary = train_boundary(config, work, data=inputs["data"], labels=labels)
    monkeypatch.setattr(calibrate, "WALK_PHOTOS", 3)
    found = calibrate_walk(config, work, **inputs, boundary=boundary, x_m=None)
    document = json.loads((work.folder(found) / "calibration.json").read_text())
    curves = document["curves"]
    assert [(curve["beta"], curve["log2_steps"]) for curve in curves] == [(b, 2) for b in BETAS]
    names = ("kept", "removed", "area")
    tried = [Evidence(np.array(THRESHOLDS), *(np.array(c[name]) for name in names)) for c in curves]
    winner = int(np.argmax([evidence.best()[1] for evidence in tried]))
    assert document["chosen"]["beta"] == BETAS[winner]

    walk = adopt_walk(config, found).expansion.irn
    assert (walk.beta, walk.log2_steps) == (BETAS[winner], 2)
    assert walk.threshold == document["chosen"]["threshold"]
    assert not is_open(walk)


def test_calibrate_walk__judges_the_walk_that_runs(made, tmp_path):
    work, inputs = made
    tree = irn_settings(tmp_path).model_dump(mode="json")
    tree["seeds"] = {"scales": [1.0, 0.5]}
    walk = {"beta": 10, "log2_steps": 2, "threshold": "auto", "refine_seeds": True, "refine": True}
    tree["expansion"]["irn"] |= walk
    config = parse_config(tree)
    labels = label_boundaries(config, work, data=inputs["data"], cams=inputs["cams"])
    boundary = train_boundary(config, work, data=inputs["data"], labels=labels)
    found = calibrate_walk(config, work, **inputs, boundary=boundary, x_m=None)
    (curve,) = json.loads((work.folder(found) / "calibration.json").read_text())["curves"]

    net = load_boundary_net(work.folder(boundary))
    model = load_classifier(work.folder(inputs["classifier"]))
    runs = {**irn.choose_settings(config), "refine": None, "threshold": 0.5}
    assert runs["refine_seeds"] is not None
    rows = []
    for photo in work.dataset(inputs["data"]).splits["train"]:
        pixels = read_photo(photo.path)
        cam = read_cam(work.folder(inputs["cams"]) / f"{photo.id}.npz")
        edges = boundary_maps(net, pixels[None], scales=runs["scales"])[0]
        seeded = Seeded(pixels, cam.classes, cam.cam, upsample_cam(cam.cam, cam.size), edges)
        planes = irn.expand([seeded], runs)[0].scores[1:]
        judge = functools.partial(tag_probabilities, model, x_m=None)
        rows.append(gather_evidence(pixels, planes, cam.classes, judge, thresholds=THRESHOLDS))
    kept, removed, area = np.concatenate(rows).mean(axis=0)
    assert curve["area"] == pytest.approx(area, abs=1e-4)
    assert curve["kept"] == pytest.approx(kept, abs=1e-3)
    assert curve["removed"] == pytest.approx(removed, abs=1e-3)


def test_boundary_labels__auto_is_around_the_seeds_threshold():
    tree = {"seeds": {"threshold": 0.25}, "expansion": {"irn": {"foreground": "auto"}}}
    chosen = choose_settings(parse_config(tree))
    assert (chosen["foreground"], chosen["background"]) == (0.35, 0.05)
    tree["expansion"]["irn"]["background"] = "auto"
    assert choose_settings(parse_config(tree))["background"] == 0.15


@pytest.mark.parametrize(
    "tree",
    [
        {"seeds": {"method": "folder", "folder": "x", "threshold": "auto"}},
        {
            "seeds": {"method": "folder", "folder": "x"},
            "expansion": {"irn": {"threshold": "auto"}},
        },
    ],
)
def test_config__auto_without_a_classifier_to_ask(tree):
    with pytest.raises(SettingsError, match="asks the classifier"):
        parse_config(tree)


def test_adopt__a_calibration_that_is_still_to_come_changes_nothing(made):
    _, inputs = made
    config = settings(seeds={"threshold": "auto"})
    assert adopt_seeds(config, inputs["cams"]) == config
    assert adopt_walk(config, inputs["cams"]) == config

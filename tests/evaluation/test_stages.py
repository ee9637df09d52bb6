"""The score and panel stages on a home of two photos, with artifacts written by hand."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.oracles import scores as oracle
from wsss_core.config import parse_config
from wsss_core.data.images import read_mask, write_mask
from wsss_core.errors import DataError, SettingsError
from wsss_core.seeds.cam import Cam, label_map, read_cam, upsample_cam, write_cam
from wsss_core.stages.audit import PHOTO_COUNTS, audit_masks, audit_segmenter
from wsss_core.stages.data import index_truth
from wsss_core.stages.panels import draw_panels
from wsss_core.stages.scenes import make_scenes
from wsss_core.stages.scores import (
    check_tags,
    describe_test,
    score_cams,
    score_folder,
    score_masks,
    score_segmenter,
)
from wsss_core.stages.stage import Workspace
from wsss_core.store import Measured

CLASSES = ("cat", "dog", "cow")
IDS = ("a", "b", "c")
TAGS = {"a": (0,), "b": (0, 2), "c": ()}
SIZE = (10, 14)


@pytest.fixture
def home(tmp_path):
    """Photos a, b, c; a and b have truth. Artifacts `data`, `truth`, `cams`, `masks`, `last`."""
    rng = np.random.default_rng(5)
    root = tmp_path / "voc"
    (root / "JPEGImages").mkdir(parents=True)
    for name in IDS:
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    truths = {name: rng.choice(np.uint8([0, 0, 1, 3, 255]), SIZE) for name in "ab"}
    for name, mask in truths.items():
        write_mask(root / "SegmentationClass" / f"{name}.png", mask)
    work = Workspace(home=tmp_path / "home", photos_root=root)
    masks = {name: rng.choice(np.uint8([0, 0, 1, 3]), SIZE) for name in IDS}
    return Home(work, rng, truths=truths, masks=masks)


class Home:
    def __init__(self, work, rng, *, truths, masks):
        self.work, self.truths, self.masks_by_id = work, truths, masks
        self.data = self.publish("dataset", {"dataset.json": dataset_json()})
        index = {name: hashlib.sha256(mask.tobytes()).hexdigest() for name, mask in truths.items()}
        self.truth = self.publish("truth", {"truth.json": index})
        self.masks = self.publish("masks", {f"{k}.png": v for k, v in masks.items()})
        flipped = {f"{k}.png": v[::-1].copy() for k, v in masks.items()}
        self.predictions = self.publish("predictions", flipped)
        cams = {}
        for name in IDS:
            grid = rng.random((len(TAGS[name]), 3, 4)).astype(np.float16)
            cams[f"{name}.npz"] = Cam(np.array(TAGS[name], np.int64), grid, SIZE)
        self.cams = self.publish("cams", cams)

    def publish(self, stage, files):
        def write(out):
            for file, content in files.items():
                if isinstance(content, dict):
                    (out / file).write_text(json.dumps(content))
                elif isinstance(content, Cam):
                    write_cam(out / file, content)
                else:
                    write_mask(out / file, content)
            return Measured()

        key = hashlib.sha256(repr((stage, sorted(files), str(files))).encode()).hexdigest()[:24]
        return self.work.store.publish(stage, key, write)

    def document(self, manifest, file="report.json"):
        return json.loads((self.work.folder(manifest) / file).read_text())


def dataset_json():
    photos = [
        {"id": name, "file": f"JPEGImages/{name}.jpg", "sha256": "", "tags": TAGS[name]}
        for name in IDS
    ]
    splits = {"train": list(IDS), "val": ["c"], "void": ["b"]}
    return {"classes": CLASSES, "photos": photos, "splits": splits}


def settings(**data):
    return parse_config({"data": {"source": "voc", **data}, "seeds": {"threshold": 0.437}})


def test_score_masks__equals_slow_oracle(home):
    done = score_masks(settings(), home.work, data=home.data, truth=home.truth, masks=home.masks)
    pairs = [(home.masks_by_id[name], home.truths[name]) for name in "ab"]
    assert done.metrics["pseudo/miou"] == pytest.approx(oracle.mean_iou(pairs, 4))
    report = home.document(done)
    assert (report["photos"], report["unscored"], report["split"]) == (2, 1, "train")
    assert report["absent"] == ["dog"]
    assert report["supervision"] == "tags"
    assert "pseudo/iou/dog" not in done.metrics


def test_score_masks__core_mean_and_twin(home):
    config = settings(core_classes=["cow"]).model_copy(update={"supervision": "truth"})
    done = score_masks(config, home.work, data=home.data, truth=home.truth, masks=home.masks)
    expected = (done.metrics["pseudo/iou/background"] + done.metrics["pseudo/iou/cow"]) / 2
    assert done.metrics["pseudo/miou_core"] == pytest.approx(expected)
    assert home.document(done)["supervision"] == "uses truth"


def test_score_masks__unknown_core_class(home):
    with pytest.raises(SettingsError, match=r"data\.core_classes: 'horse'"):
        score_masks(
            settings(core_classes=["horse"]),
            home.work,
            data=home.data,
            truth=home.truth,
            masks=home.masks,
        )


def test_score_masks__photo_without_mask(home):
    empty = home.publish("masks", {"a.png": home.masks_by_id["a"]})
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        score_masks(settings(), home.work, data=home.data, truth=home.truth, masks=empty)


def test_score_cams__equals_label_map_and_oracle(home):
    done = score_cams(settings(), home.work, data=home.data, truth=home.truth, cams=home.cams)
    by_threshold = {}
    for threshold in (0.2, 0.437, 0.6):
        pairs = []
        for name in "ab":
            cam = read_cam(home.work.folder(home.cams) / f"{name}.npz")
            scores = upsample_cam(cam.cam, cam.size)
            labels = label_map(scores, cam.classes, threshold=threshold)
            slow = oracle.label_map(scores, cam.classes.tolist(), np.float32(threshold))
            assert (labels == slow).all()
            pairs.append((labels, home.truths[name]))
        by_threshold[threshold] = oracle.mean_iou(pairs, 4)
    assert done.metrics["cam/miou"] == pytest.approx(by_threshold[0.437])
    curve = home.document(done, "curve.json")
    assert curve["miou"][curve["thresholds"].index(0.2)] == pytest.approx(by_threshold[0.2])
    assert curve["miou"][curve["thresholds"].index(0.6)] == pytest.approx(by_threshold[0.6])
    assert done.metrics["cam/miou_oracle"] == max(curve["miou"]) >= done.metrics["cam/miou"]
    assert done.metrics["cam/threshold_oracle"] in curve["thresholds"]
    assert home.document(done)["settings"] == "threshold 0.437"


def test_score_segmenter__names_split_and_test_settings(home):
    inputs = {"data": home.data, "truth": home.truth, "split": "void"}
    config = settings()
    done = score_segmenter(config, home.work, predictions=home.predictions, **inputs)
    flipped = [(home.masks_by_id["b"][::-1], home.truths["b"])]
    assert done.metrics["seg_void/miou"] == pytest.approx(oracle.mean_iou(flipped, 4))
    assert home.document(done)["settings"] == "scale 1, flip, no CRF"
    test = config.segmenter_test.model_copy(update={"scales": (0.5, 1.0), "crf": True})
    assert describe_test(test) == "scales 0.5 1, flip, CRF"


def test_score_segmenter__split_without_truth(home):
    inputs = {"data": home.data, "predictions": home.predictions}
    with pytest.raises(DataError, match="no photo of split 'val' has a true mask"):
        score_segmenter(settings(), home.work, truth=home.truth, split="val", **inputs)
    with pytest.raises(DataError, match="no photo of split 'void' has a true mask"):
        score_segmenter(settings(), home.work, truth=None, split="void", **inputs)
    with pytest.raises(DataError, match="no split 'test' in this data; it has train, val, void"):
        score_segmenter(settings(), home.work, truth=home.truth, split="test", **inputs)


def test_check_tags__needs_no_truth(home):
    first = check_tags(settings(), home.work, data=home.data, predictions=home.masks)
    # every mask holds cat and cow; tags are cat | cat, cow | none
    assert first.metrics["tag_agreement/recall"] == 1
    assert first.metrics["tag_agreement/precision"] == 3 / 6
    assert first.metrics["tag_agreement"] == pytest.approx(2 / 3)
    assert "stability" not in first.metrics
    again = check_tags(
        settings(), home.work, data=home.data, predictions=home.predictions, before=home.masks
    )
    pairs = [(mask[::-1], mask) for mask in home.masks_by_id.values()]
    assert again.metrics["stability"] == pytest.approx(oracle.mean_iou(pairs, 4))
    same = check_tags(
        settings(), home.work, data=home.data, predictions=home.masks, before=home.masks
    )
    assert same.metrics["stability"] == 1


@pytest.mark.parametrize("with_truth", [True, False])
def test_draw_panels__worst_first(home, with_truth):
    done = draw_panels(
        settings(),
        home.work,
        data=home.data,
        truth=home.truth if with_truth else None,
        cams=home.cams,
        masks=home.masks,
        predictions=home.predictions,
    )
    with Image.open(home.work.folder(done) / "panel.png") as page:
        assert page.width <= 1600
    worst = home.document(done, "worst.json")
    if with_truth:
        assert worst["measure"] == "miou"
        values = [entry["segmenter"] for entry in worst["photos"]]
        assert values == sorted(values)
        assert {entry["id"] for entry in worst["photos"]} == {"a", "b"}
        assert set(worst["photos"][0]) == {"id", "tags", "segmenter", "pseudo"}
    else:
        assert worst["measure"] == "tag_agreement"
        assert [entry["id"] for entry in worst["photos"]] == ["c", "a", "b"]
        assert worst["photos"][1] == {"id": "a", "tags": ["cat"], "segmenter": pytest.approx(2 / 3)}


def test_draw_panels__without_cams(home):
    inputs = {"data": home.data, "masks": home.masks, "predictions": home.predictions}
    done = draw_panels(settings(), home.work, **inputs)
    assert home.document(done, "worst.json")["measure"] == "tag_agreement"


def test_audit__counts_what_the_masks_hold(home):
    inputs = {"data": home.data, "truth": home.truth}
    done = audit_masks(settings(), home.work, cams=home.cams, masks=home.masks, **inputs)
    document = home.document(done, "audit.json")
    assert (document["photos"], document["split"]) == (2, "train")
    # b alone shows cat and cow; a is tagged cat
    assert document["pairs"] == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    mask, true = home.masks_by_id["b"], home.truths["b"]
    cat, cow = ((mask == label) & (true != 255) for label in (1, 3))
    leak = (cat & (true == 3)).sum() / cat.sum()
    assert document["leaks"]["pseudo"][0][2] == pytest.approx(leak)
    expected = ((cat & (true == 3)).sum() + (cow & (true == 1)).sum()) / (cat.sum() + cow.sum())
    assert done.metrics["audit/leak_pseudo"] == pytest.approx(expected)
    cam = read_cam(home.work.folder(home.cams) / "b.npz")
    scores = upsample_cam(cam.cam, cam.size)
    counted = np.where(true == 255, 0, scores)
    on = counted[0][true == 3].sum() + counted[1][true == 1].sum()
    assert done.metrics["audit/leak_cam"] == pytest.approx(on / counted.sum(), rel=1e-5)
    # a shows the cat alone
    pairs = {name: (home.masks_by_id[name], home.truths[name]) for name in "ab"}
    alone, company = (oracle.iou_by_class([pairs[name]], 4)[1] for name in "ab")
    assert done.metrics["audit/gap_pseudo"] == pytest.approx(alone - company)
    with Image.open(home.work.folder(done) / "audit.png") as page:
        assert page.width <= 1600


def test_audit__photo_counts_give_the_score_again(home):
    inputs = {"data": home.data, "truth": home.truth}
    done = audit_masks(settings(), home.work, cams=None, masks=home.masks, **inputs)
    assert set(done.metrics) == {"audit/leak_pseudo", "audit/gap_pseudo"}
    counts = load_file(home.work.folder(done) / PHOTO_COUNTS)["counts"]
    assert counts.shape == (2, 3, 4)
    hits, true, guess = counts.sum(axis=0)
    union = true + guess - hits
    scored = score_masks(settings(), home.work, masks=home.masks, **inputs)
    expected = (hits / np.maximum(union, 1))[union > 0].mean()
    assert scored.metrics["pseudo/miou"] == pytest.approx(expected)


def test_audit_segmenter__names_its_split(home):
    inputs = {"data": home.data, "truth": home.truth, "predictions": home.predictions}
    done = audit_segmenter(settings(), home.work, split="void", **inputs)
    assert set(done.metrics) == {"audit_void/leak_seg"}
    assert (home.work.folder(done) / "audit_void.png").is_file()
    with pytest.raises(DataError, match="no photo of split 'val' has a true mask"):
        audit_segmenter(settings(), home.work, split="val", **inputs)


def test_audit__scenes_know_stuff_and_part(tmp_path):
    config = parse_config(
        {"data": {"scenes": {"photos": 12, "val_photos": 4, "size_px": 48, "confounding": 0.5}}}
    )
    work = Workspace(home=tmp_path)
    data = make_scenes(config, work)
    truth = index_truth(config, work, data=data)
    root, photos = work.data_root(data), work.dataset(data).splits["train"]
    scenes = json.loads((root / "scenes.json").read_text())["scenes"]
    pixels = {photo.id: read_mask(root / "Roles" / f"{photo.id}.png") for photo in photos}

    def write(out):
        """The object is found without its part, and takes all of the stuff."""
        for photo in photos:
            roles = pixels[photo.id]
            mask = np.isin(roles, [1, 4]) * (scenes[photo.id]["object"] + 1)
            write_mask(out / f"{photo.id}.png", mask.astype(np.uint8))
        return Measured()

    masks = work.store.publish("masks", "m", write)
    done = audit_masks(config, work, data=data, truth=truth, cams=None, masks=masks)
    assert done.metrics["audit/part_pseudo"] == 0
    assert done.metrics["audit/object_pseudo"] == 1
    for name, wanted in (("stuff", True), ("stuff_untied", False)):
        chosen = [
            pixels[p.id]
            for p in photos
            if (scenes[p.id]["stuff"] == scenes[p.id]["object"]) == wanted
        ]
        share = sum((r == 4).sum() for r in chosen) / sum(np.isin(r, [1, 4]).sum() for r in chosen)
        assert done.metrics[f"audit/{name}_pseudo"] == pytest.approx(share)


class Notes:
    def __init__(self):
        self.lines = []

    def progress(self, what, done, total): ...

    def scalars(self, stage, step, values): ...

    def note(self, message):
        self.lines.append(message)


def folders(tmp_path):
    (tmp_path / "labels.txt").write_text("background\ncat\ndog\n")
    mask, true = np.uint8([[0, 1, 1]]), np.uint8([[0, 1, 255]])
    write_mask(tmp_path / "masks" / "x" / "1.png", mask)
    write_mask(tmp_path / "masks" / "2.png", mask)
    write_mask(tmp_path / "truth" / "x" / "1.png", true)
    write_mask(tmp_path / "truth" / "3.png", true)
    return tmp_path / "masks", tmp_path / "truth", tmp_path / "labels.txt"


def test_score_folder__only_names_in_both(tmp_path):
    masks, truth, labels = folders(tmp_path)
    notes = Notes()
    report = score_folder(masks, truth, labels, recorder=notes)
    assert (report.miou, report.photos, report.unscored) == (1, 1, 1)
    assert report.absent == ("dog",)
    assert [line.rpartition(": ")[2] for line in notes.lines] == ["2", "3"]


def test_score_folder__no_common_name(tmp_path):
    masks, _, labels = folders(tmp_path)
    write_mask(tmp_path / "else" / "9.png", np.zeros((1, 3), np.uint8))
    with pytest.raises(DataError, match="masks are matched by file name"):
        score_folder(masks, tmp_path / "else", labels)
    with pytest.raises(DataError, match="nowhere is no folder"):
        score_folder(masks, tmp_path / "nowhere", labels)


def test_score_folder__other_size_and_stray_label(tmp_path):
    masks, truth, labels = folders(tmp_path)
    write_mask(truth / "2.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"^2: the mask is 3x1 px, its truth 2x2 px"):
        score_folder(masks, truth, labels)
    write_mask(truth / "2.png", np.uint8([[0, 7, 0]]))
    with pytest.raises(DataError, match=r"^2: the truth holds label 7"):
        score_folder(masks, truth, labels)
    assert read_mask(truth / "2.png")[0, 1] == 7

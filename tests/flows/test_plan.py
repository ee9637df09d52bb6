from __future__ import annotations

from pathlib import Path

import pytest

from flows import cost
from flows.plan import (
    Planned,
    check_data,
    check_settings,
    explain_miss,
    fetch_weights,
    plan_run,
)
from wsss_core.config import Config, parse_config
from wsss_core.errors import ContaError, InputError
from wsss_core.records import Dataset, TaggedPhoto

PHOTOS = (TaggedPhoto("a", Path("a.png"), (0,)),)

QUESTION = {
    "settings": {"training": {"epochs": 5}, "head": "v2"},
    "code": {"wsss_core.a": "1", "wsss_core.b": "1"},
    "seed": 3,
    "precision": "fp32",
    "inputs": {"masks": "x", "former": None},
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"training": {"epochs": 9}, "head": "v2"}}, "training.epochs: 9 -> 5"),
        ({"code": {"wsss_core.a": "1", "wsss_core.b": "2"}}, "module wsss_core.b changed"),
        ({"inputs": {"masks": "y", "former": None}}, "input masks changed"),
        ({"seed": None}, "seed: null -> 3"),
        ({"precision": "amp"}, 'precision: "amp" -> "fp32"'),
    ],
)
def test_explain_miss__names_what_changed(change, reason):
    assert explain_miss(QUESTION, [{**QUESTION, **change}]) == reason


def test_explain_miss__compares_with_the_nearest():
    far = {**QUESTION, "seed": 4, "precision": "amp"}
    assert explain_miss(QUESTION, [far, {**QUESTION, "seed": 5}]) == "seed: 5 -> 3"
    assert explain_miss(QUESTION, []) == "never made"


def test_plan_run__until_leaves_out_what_a_run_does_not_come_to(tmp_path):
    config = parse_config({"data": {"scenes": {"photos": 8, "val_photos": 4, "size_px": 64}}})
    stages = [row.stage.partition("/")[0] for row in plan_run(config, tmp_path, "cams")]
    # what looks at the CAMs belongs to them; the masks do not
    assert stages == ["scenes", "classifier", "score_classifier", "cams", "score_cams"]
    last = plan_run(config, tmp_path, "test")[-1]
    assert (last.round, last.stage) == (0, "audit_segmenter/val")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"classifier": {"backbone": "resnet51"}}, "unknown backbone 'resnet51'; use lite0, "),
        ({"segmenter": {"backbone": "resnet51"}}, "unknown backbone 'resnet51'; use lite0, "),
        (
            {"expansion": {"method": "irn", "irn": {"boundary": {"backbone": "resnet51"}}}},
            "unknown backbone 'resnet51'; use lite0, ",
        ),
        ({"segmenter": {"backbone": "convnext_nano"}}, "this timm model has 4 taps; a backbone"),
        (
            {"segmenter": {"backbone": "swin_tiny_patch4_window7_224"}},
            "backbone 'swin_tiny_patch4_window7_224' cannot give features at stride 16",
        ),
        ({"data": {"core_classes": ["kat"]}}, "data.core_classes: 'kat' is not a class of this"),
        ({"data": {"val": ["val", "val_doo"]}}, "data.val: scenes have no list 'val_doo'; they"),
        (
            {"causal": {"context": "shuffled_photo"}},
            "causal.context 'shuffled_photo' needs an",
        ),
    ],
)
def test_check__before_anything_is_computed(tree, message):
    def check(config):
        check_settings(config)
        check_data(config, Dataset(("cat", "dog"), {"train": PHOTOS * 2, "val": PHOTOS}))

    check(Config())
    check(parse_config({"segmenter": {"backbone": "resnet50"}}))
    check(parse_config({"causal": {"context": "shuffled_photo"}, "rounds": 0}))
    with pytest.raises(ContaError) as caught:
        check(parse_config(tree))
    assert str(caught.value).startswith(message)


def test_plan_run__unknown_backbone_though_nothing_was_ever_made(tmp_path):
    with pytest.raises(InputError, match="unknown backbone 'resnet51'"):
        plan_run(parse_config({"segmenter": {"backbone": "resnet51"}}), tmp_path)


def test_plan_run__a_list_that_scenes_have_not_though_none_were_drawn(tmp_path):
    with pytest.raises(
        ContaError, match=r"^data\.val: scenes have no list 'nope'; .* val, val_do,"
    ):
        plan_run(parse_config({"data": {"val": ["val", "nope"]}}), tmp_path)


def test_fetch_weights__of_what_is_to_be_computed(tmp_path, monkeypatch):
    """A segmenter may be built hours after the classifier."""
    config = parse_config({"segmenter": {"backbone": "resnet50"}})
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"no weights")
    monkeypatch.setenv("CONTA_WEIGHTS", str(tmp_path))
    fetch_weights(config, {"classifier", "cams", "boundary"})
    with pytest.raises(InputError, match=r"resnet50-.* is not torchvision's file"):
        fetch_weights(config, {"masks", "segmenter"})
    bare = config.segmenter.model_copy(update={"pretrained": False})
    fetch_weights(config.model_copy(update={"segmenter": bare}), {"segmenter"})


def test_planned__is_a_line():
    assert str(Planned(None, "scenes", True)).split() == ["data", "scenes", "hit"]
    assert str(Planned(2, "test/val", False, "follows masks")).endswith("miss: follows masks")


def test_estimate_cost__counts_misses_alone():
    rows = [Planned(0, "classifier", True), Planned(0, "segmenter", False)]
    one = cost.estimate_cost(rows, Config(), photos={"train": 100}, side_px=320)
    two = cost.estimate_cost(rows, Config(), photos={"train": 200}, side_px=320)
    # 100 photos, 20 epochs, 47 ms at 224 px
    assert one.seconds == pytest.approx(100 * 20 * 0.047 * 320**2 / 224**2)
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert two.num_bytes == one.num_bytes > 15e6


def test_estimate_cost__irn_labels_with_two_crf_passes_and_masks_with_none():
    irn = parse_config({"expansion": {"method": "irn"}})

    def seconds(stage, config):
        rows = [Planned(0, stage, False)]
        return cost.estimate_cost(rows, config, photos={"train": 10}, side_px=320).seconds

    assert seconds("boundary_labels", irn) == 2 * seconds("masks", Config())
    assert seconds("masks", irn) < seconds("masks", Config())
    # 10 photos, 3 epochs, 47 ms at 224 px
    assert seconds("boundary", irn) == pytest.approx(10 * 3 * 0.047 * 512**2 / 224**2)


def test_check_cost__refuses_more_than_the_disk_has(tmp_path, monkeypatch):
    from PIL import Image

    from wsss_core.records import Manifest
    from wsss_core.stages.stage import Workspace

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    photo = TaggedPhoto("a", tmp_path / "a.png", (0,))
    monkeypatch.setattr(Workspace, "dataset", lambda *_: Dataset(("cat",), {"train": (photo,)}))
    data = Manifest(
        stage="scenes", key="k", digest="d", count=1, index_sha256="", finished_ms=0, seconds=0
    )
    work, rows = Workspace(tmp_path), [Planned(0, "segmenter", False, "never made")]
    assert cost.check_cost([Planned(0, "segmenter", True)], Config(), work, data) is None
    assert "1 of 1 stages to compute" in cost.check_cost(rows, Config(), work, data)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs about 0\.1 GB, but .* 0\.0 GB free"):
        cost.check_cost(rows, Config(), work, data)

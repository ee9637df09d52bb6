"""A segmenter that leaves its home: as a folder for the registry, as pt2, as ONNX."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.stages.networks import CLASSES, write_segmenter
from wsss_core.config import SegmenterTestConfig
from wsss_core.data.images import read_mask
from wsss_core.errors import DataError, InputError, StoreError, TooLargeError
from wsss_core.observe import SilentRecorder
from wsss_core.stages import onnx as onnx_stage
from wsss_core.stages import package as package_stage
from wsss_core.stages.onnx import export_onnx, read_seen
from wsss_core.stages.package import open_package, write_package
from wsss_core.stages.portable import PhotoSegmenter
from wsss_core.stages.predict import Predictor
from wsss_core.stages.segmenter import load_segmenter

CPU = torch.device("cpu")
TEST = SegmenterTestConfig(flip=False, scales=(1.0, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("segmenter")
    write_segmenter(made)
    return made


@pytest.fixture(scope="module")
def packed(tmp_path_factory, folder):
    made = tmp_path_factory.mktemp("package")
    write_package(folder, made, test=TEST, recorder=SilentRecorder())
    return made


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 110, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_write_package__holds_no_pickle(packed):
    names = {path.name for path in packed.iterdir()}
    assert names == {
        "segmenter.safetensors", "segmenter.json", "segmenter.pt2", "test.json", "labels.txt",
        "sha256.json",
    }  # fmt: skip
    with zipfile.ZipFile(packed / "segmenter.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not name.endswith((".pkl", ".pth")), name
            assert not zipfile.is_zipfile(io.BytesIO(content)), name  # what torch.save makes
            if name.endswith("_config.json"):
                entries = json.loads(content)["config"].values()
                assert not any(entry["use_pickle"] for entry in entries), name


def test_write_package__the_program_says_what_the_segmenter_says(packed, folder):
    program = torch.export.load(packed / "segmenter.pt2").module()
    network = PhotoSegmenter(load_segmenter(folder)[0]).eval()
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 3, 96, 160), (3, 3, 48, 32)):
        photos = 255.0 * torch.rand(shape, generator=generator)
        with torch.no_grad():
            asked, told = network(photos), program(photos)
        assert told.shape == (shape[0], len(CLASSES) + 1, *shape[2:])
        assert torch.allclose(told, asked, atol=1e-5)
        assert torch.allclose(told.sum(1), torch.ones(()))


def test_open_package__asks_as_the_run_did(packed, folder, photo):
    theirs = open_package(packed, device=CPU)
    ours = Predictor(folder, test=TEST, device=CPU)
    assert theirs.labels == ours.labels == ("background", *CLASSES)
    content = photo.read_bytes()
    masks = [one.segment_file(content, limit_px=10_000) for one in (theirs, ours)]
    assert masks[0] == masks[1]
    other = Predictor(folder, test=SegmenterTestConfig(), device=CPU)
    assert other.segment_file(content, limit_px=10_000) != masks[0]


def test_open_package__damaged(packed):
    for name in ("segmenter.safetensors", "test.json"):
        sound = (packed / name).read_bytes()
        (packed / name).write_bytes(sound[:-1] + b"?")
        with pytest.raises(StoreError, match="promote"):
            open_package(packed, device=CPU)
        (packed / name).unlink()
        with pytest.raises(StoreError, match=rf"not whole \(.*{name}"):
            open_package(packed, device=CPU)
        (packed / name).write_bytes(sound)


def test_write_package__a_backbone_that_cannot_be_traced(tmp_path, folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("decides\nby its data")

    monkeypatch.setattr(package_stage, "write_pt2", fail)
    notes = []
    recorder = SilentRecorder()
    monkeypatch.setattr(recorder, "note", notes.append, raising=False)
    write_package(folder, tmp_path, test=TEST, recorder=recorder)
    assert notes == [
        "no segmenter.pt2, for torch.export cannot follow this backbone (decides by its data)"
    ]
    assert not (tmp_path / "segmenter.pt2").exists()
    open_package(tmp_path, device=CPU)


def test_segment_file__the_mask_that_predict_writes(folder, photo, tmp_path):
    predictor = Predictor(folder, test=TEST, device=CPU)
    (tmp_path / "mask.png").write_bytes(
        predictor.segment_file(photo.read_bytes(), limit_px=70 * 110)
    )
    with Image.open(photo) as picture:
        asked = predictor.segment(np.array(picture))
    found = read_mask(tmp_path / "mask.png")
    assert found.shape == (70, 110)
    assert np.array_equal(found, asked)
    assert len(np.unique(found)) > 1


def test_segment_file__one_line_without_a_path(folder, photo, monkeypatch):
    predictor = Predictor(folder, test=TEST, device=CPU)
    content = photo.read_bytes()
    for broken in (b"", b"no photo", content[: len(content) // 2]):
        with pytest.raises(DataError, match=r"^the photo [^/\n]*$") as refused:
            predictor.segment_file(broken, limit_px=70 * 110)
        assert not isinstance(refused.value, TooLargeError)
    with pytest.raises(TooLargeError, match=r"^the photo has 0\.0 megapixels, 0\.007699 are"):
        predictor.segment_file(content, limit_px=70 * 110 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TooLargeError, match="the photo has more than"):
        predictor.segment_file(content, limit_px=70 * 110)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
def test_export_onnx__equals_torch_on_a_photo(tmp_path, photo, head):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx
    import onnxruntime

    write_segmenter(tmp_path, head=head)
    file = tmp_path / "new" / "segmenter.onnx"
    parity = export_onnx(tmp_path, file, photo=photo)
    assert parity.difference < 1e-4
    assert parity.size == (64, 112)
    assert [path.name for path in file.parent.iterdir()] == ["segmenter.onnx"]
    known = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(known["labels"]) == ["background", *CLASSES]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batch = read_seen(photo, limit_px=48).repeat(3, 1, 1, 1)
    (told,) = session.run(["probabilities"], {"photos": batch.numpy()})
    with torch.no_grad():
        asked = PhotoSegmenter(load_segmenter(tmp_path)[0]).eval()(batch)
    assert told.shape == (3, 4, 32, 48)
    assert np.allclose(told, asked.numpy(), atol=1e-4)


def test_export_onnx__without_the_extra_or_the_place(tmp_path, folder, photo, monkeypatch):
    monkeypatch.setattr(onnx_stage, "_EXTRA", ())
    with pytest.raises(InputError, match="is a folder; name a file"):
        export_onnx(folder, tmp_path, photo=photo)
    monkeypatch.setattr(onnx_stage, "_EXTRA", ("no_such_runtime",))
    with pytest.raises(InputError, match=r"ONNX needs the package no_such_runtime .*make setup"):
        export_onnx(folder, tmp_path / "a.onnx", photo=photo)
    assert list(tmp_path.iterdir()) == []

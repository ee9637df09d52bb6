"""A trained segmenter as an ONNX file, compared with torch on a real photo before it is kept."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float32
from torch import Tensor

from wsss_core.data.images import read_photo
from wsss_core.data.transforms import resize_photo, scaled_size
from wsss_core.errors import ContaError, InputError, StoreError
from wsss_core.stages.portable import MULTIPLE_PX, PhotoSegmenter, trace
from wsss_core.stages.predict import trained_long_side_px
from wsss_core.stages.segmenter import load_segmenter

TOLERANCE = 1e-3
"""Largest difference of a probability that is rounding: 32-bit sums in another order."""
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Parity:
    """How the file compares with torch on one photo.

    Attributes:
        difference: Largest difference of a probability.
        changed: Share of pixels whose best class differs; in [0, 1].
        size: Height and width at which the photo was seen.
    """

    difference: float
    changed: float
    size: tuple[int, int]


def export_onnx(segmenter: Path, out: Path, *, photo: Path) -> Parity:
    """Write the file, if what onnxruntime makes of the photo is what torch makes of it.

    It holds a `PhotoSegmenter`: input `photos`, float32 (b,3,h,w), RGB of 0..255, sides multiples
    of 16; output `probabilities`, float32 (b,k,h,w). Its metadata name the labels.

    Args:
        segmenter: Folder of a trained segmenter.
        out: The file.
        photo: A photo such as it was trained on.

    Raises:
        InputError: If the extra `onnx` is not installed, or `out` is a folder.
        DataError: If the photo cannot be read.
        ContaError: If the backbone cannot be exported, or the two differ.
        StoreError: If `out` cannot be written.
    """
    _check_extra()
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file, such as {out / 'segmenter.onnx'}")
    model, classes = load_segmenter(segmenter)
    portable = PhotoSegmenter(model).eval()
    seen = read_seen(photo, limit_px=trained_long_side_px(segmenter))
    scratch = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(portable, scratch, labels=("background", *classes))
        parity = _compare(portable, scratch, seen)
        if parity.difference > TOLERANCE:
            raise ContaError(
                f"onnxruntime differs from torch by {parity.difference:.2g} on {photo}, more than "
                f"{TOLERANCE:g}; nothing was written, please report it"
            )
        scratch.replace(out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written ({error.strerror or error})") from error
    finally:
        scratch.unlink(missing_ok=True)
    return parity


def read_seen(photo: Path, *, limit_px: int) -> Float32[Tensor, "1 3 h w"]:
    """A photo as a `PhotoSegmenter` takes it, its long side at most `limit_px`."""
    pixels = read_photo(photo)
    size = (pixels.shape[0], pixels.shape[1])
    target = scaled_size(size, min(1.0, limit_px / max(size)), multiple=MULTIPLE_PX)
    return resize_photo(pixels, target).float()[None]


def _check_extra() -> None:
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"ONNX needs the package {name} ({error}); run `make setup`, which brings it, or "
                "install conta with its extra `onnx`"
            ) from None


def _write(portable: PhotoSegmenter, path: Path, *, labels: tuple[str, ...]) -> None:
    try:
        exported = torch.onnx.export(
            trace(portable),
            dynamo=True,
            input_names=["photos"],
            output_names=["probabilities"],
            verbose=False,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ContaError(f"this backbone cannot be exported ({reason}); use another one") from error
    program = cast("torch.onnx.ONNXProgram", exported)  # None is for the other exporter
    program.model.metadata_props["labels"] = json.dumps(labels)
    program.save(path)


def _compare(portable: PhotoSegmenter, path: Path, seen: Float32[Tensor, "1 3 h w"]) -> Parity:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"photos": seen.numpy()})[0])
    with torch.inference_mode():
        ours = portable(seen)
    return Parity(
        float((ours - theirs).abs().max()),
        float((ours.argmax(1) != theirs.argmax(1)).float().mean()),
        (seen.shape[2], seen.shape[3]),
    )

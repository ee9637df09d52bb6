"""A trained segmenter as one folder that needs nothing of the home it was trained in.

`segmenter.safetensors` and `segmenter.json` as the stage wrote them, `test.json` (scales, flip,
CRF), `labels.txt`, `segmenter.pt2` for programs that have no conta, and the hashes of all of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from wsss_core.config import SegmenterTestConfig
from wsss_core.errors import StoreError
from wsss_core.observe import Recorder
from wsss_core.stages.portable import PhotoSegmenter, write_pt2
from wsss_core.stages.predict import Predictor
from wsss_core.stages.segmenter import DESCRIPTION, WEIGHTS, load_segmenter
from wsss_core.store import file_sha256

PROGRAM, TEST, LABELS = "segmenter.pt2", "test.json", "labels.txt"
_HASHES = "sha256.json"


def write_package(
    segmenter: Path, out: Path, *, test: SegmenterTestConfig, recorder: Recorder
) -> None:
    """Fill an empty folder; the hashes are written last.

    A backbone that `torch.export` cannot follow costs the pt2 and a line.

    Args:
        segmenter: Folder of a trained segmenter.
        out: Where to.
        test: How it is asked.
        recorder: Hears of what could not be written.
    """
    model, classes = load_segmenter(segmenter)
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(segmenter / name, out / name)
    (out / TEST).write_text(test.model_dump_json(indent=1))
    (out / LABELS).write_text("\n".join(["background", *classes]) + "\n")
    try:
        write_pt2(PhotoSegmenter(model).eval(), out / PROGRAM)
    except Exception as error:  # noqa: BLE001 - the tracer raises whatever it meets
        (out / PROGRAM).unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:160]
        recorder.note(f"no {PROGRAM}, for torch.export cannot follow this backbone ({reason})")
    hashes = {path.name: file_sha256(path) for path in sorted(out.iterdir())}
    (out / _HASHES).write_text(json.dumps(hashes, indent=1))


def open_package(folder: Path, *, device: torch.device) -> Predictor:
    """The segmenter of a folder, after every file was hashed again.

    Raises:
        StoreError: If a file is missing or was changed.
    """
    try:
        hashes = json.loads((folder / _HASHES).read_text())
        changed = [name for name, known in hashes.items() if file_sha256(folder / name) != known]
        test = SegmenterTestConfig.model_validate_json((folder / TEST).read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"the model in {folder} is not whole ({reason}); promote it again"
        ) from None
    if changed:
        raise StoreError(f"{folder / changed[0]} was changed; promote the model again")
    return Predictor(folder, test=test, device=device)

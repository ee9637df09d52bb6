"""Scenes: small pictures from a known causal graph, with truth masks and the role of each pixel.

`graph` draws what is in a scene, `shapes` says what things look like, `layout` finds them a place,
`draw` paints; here they become files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from wsss_core.config import ScenesConfig
from wsss_core.data.images import write_mask
from wsss_core.data.index import write_index
from wsss_core.data.scenes.draw import ROLES, draw_scene
from wsss_core.data.scenes.graph import (
    CANVASES,
    CLASSES,
    CUT_EDGES,
    STUFFS,
    Scene,
    sample_scene,
)
from wsss_core.errors import InputError
from wsss_core.observe import Recorder
from wsss_core.records import Dataset, TaggedPhoto

GENERATOR_VERSION = 1
"""Raised with every change that moves a pixel: studies of different versions do not compare."""


def write_scenes(out: Path, config: ScenesConfig, recorder: Recorder) -> Dataset:
    """Write all six splits in VOC layout; the same settings give the same bytes.

    Files: `JPEGImages/<id>.jpg` (quality 95), `SegmentationClass/<id>.png`, `Roles/<id>.png`
    (indices of `ROLES`), `ImageSets/Segmentation/<split>.txt`, `labels.txt`, `image_tags.csv`,
    `dataset.json`, and `scenes.json` with every variable of every scene. An id is
    `<split>_<number>`; scenes of one number are paired across the val splits.

    Args:
        out: A folder that is empty or does not exist.
        config: How many, how large, how confounded, from which seed.
        recorder: Hears of the progress.

    Raises:
        InputError: If the folder holds something, which would mix with the scenes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name a new one for the scenes")
    scenes = {
        split: [
            sample_scene(split, index=index, confounding=config.confounding, seed=config.seed)
            for index in range(config.photos if split == "train" else config.val_photos)
        ]
        for split in CUT_EDGES
    }
    total, done = sum(map(len, scenes.values())), 0
    splits: dict[str, tuple[TaggedPhoto, ...]] = {}
    for split, drawn in scenes.items():
        photos = []
        for scene in drawn:
            photos.append(_write_scene(out, scene, split=split, size_px=config.size_px))
            done += 1
            recorder.progress("drawing scenes", done, total)
        splits[split] = tuple(photos)
    dataset = Dataset(CLASSES, splits)
    write_index(out, dataset, out, recorder)
    _write_lists(out, dataset)
    _write_variables(out, config, scenes)
    return dataset


def _name(split: str, scene: Scene) -> str:
    return f"{split}_{scene.index:05d}"


def _write_scene(out: Path, scene: Scene, *, split: str, size_px: int) -> TaggedPhoto:
    name = _name(split, scene)
    path = out / "JPEGImages" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_scene(scene, size_px=size_px)
    Image.fromarray(drawn.photo).save(path, quality=95, subsampling=0)
    write_mask(out / "SegmentationClass" / f"{name}.png", drawn.truth)
    write_mask(out / "Roles" / f"{name}.png", drawn.roles)
    return TaggedPhoto(name, path, scene.tags)


def _write_lists(out: Path, dataset: Dataset) -> None:
    _write_lines(out / "labels.txt", ["background", *dataset.classes])
    rows = [
        f"{photo.path.name},{' '.join(dataset.classes[tag] for tag in photo.tags)}"
        for photos in dataset.splits.values()
        for photo in photos
    ]
    _write_lines(out / "image_tags.csv", ["filename,tags", *rows])
    for split, photos in dataset.splits.items():
        _write_lines(
            out / "ImageSets" / "Segmentation" / f"{split}.txt", [photo.id for photo in photos]
        )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_variables(out: Path, config: ScenesConfig, scenes: dict[str, list[Scene]]) -> None:
    document = {
        "generator": GENERATOR_VERSION,
        "settings": config.model_dump(mode="json"),
        "canvases": CANVASES,
        "classes": CLASSES,
        "stuffs": STUFFS,
        "roles": ROLES,
        "cut_edges": {split: sorted(edges) for split, edges in CUT_EDGES.items()},
        "scenes": {
            _name(split, scene): asdict(scene) for split, drawn in scenes.items() for scene in drawn
        },
    }
    (out / "scenes.json").write_text(json.dumps(document))

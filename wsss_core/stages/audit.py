"""Stages `audit`, `audit_segmenter`: on whose pixels each class's CAM and masks lie.

Each holds `audit.json` (an `evaluation.audit.Audit`), a picture of it, and the class counts of
each photo, from which a study draws its bootstrap. They need pixel truth, feed no later stage and
are imported by none: a change in how they count changes no other key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from safetensors.numpy import load_file, save_file

from wsss_core.data.images import read_mask
from wsss_core.errors import DataError
from wsss_core.evaluation.audit import (
    Audit,
    Counts,
    Gaps,
    Leaks,
    Shares,
    build_audit,
    class_counts,
    draw_audit,
    mass_by_label,
)
from wsss_core.evaluation.confusion import confusion_matrix
from wsss_core.records import Manifest, TaggedPhoto
from wsss_core.seeds.cam import read_cam, upsample_cam
from wsss_core.stages.scores import open_truth
from wsss_core.stages.stage import Job, Stage
from wsss_core.store import Measured

AUDIT, PHOTO_COUNTS = "audit.json", "photo_counts.safetensors"


@dataclass(frozen=True)
class SceneRoles:
    """What the generator knows of its scenes.

    Attributes:
        folder: Of the role maps.
        roles: Names behind their labels.
        scenes: The variables of each scene by photo.
    """

    folder: Path
    roles: tuple[str, ...]
    scenes: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, root: Path) -> SceneRoles:
        """The roles beside generated scenes."""
        document = json.loads((root / "scenes.json").read_text())
        return cls(root / "Roles", tuple(document["roles"]), document["scenes"])

    def where(self, photo: TaggedPhoto, role: str) -> Bool[np.ndarray, "h w"]:
        """Pixels of a role."""
        return read_mask(self.folder / f"{photo.id}.png") == self.roles.index(role)


def _write_masks(
    out: Path,
    job: Job,
    *,
    data: Manifest,
    truth: Manifest,
    cams: Manifest | None,
    masks: Manifest,
) -> Measured:
    given = {"cam": cams, "pseudo": masks}
    folders = {kind: job.work.folder(made) for kind, made in given.items() if made is not None}
    audit = _audit(out, job, folders, data=data, truth=truth, split="train")
    if audit.worst:
        job.work.recorder.note(f"worst leak: {audit.worst[0]}")
    return _keep(out, audit, picture="audit.png")


def _write_segmenter(
    out: Path, job: Job, *, data: Manifest, truth: Manifest, predictions: Manifest, split: str
) -> Measured:
    folders = {"seg": job.work.folder(predictions)}
    audit = _audit(out, job, folders, data=data, truth=truth, split=split)
    return _keep(out, audit, picture=f"audit_{split}.png")


def _audit(
    out: Path, job: Job, folders: dict[str, Path], *, data: Manifest, truth: Manifest, split: str
) -> Audit:
    dataset, indexed = job.work.dataset(data), open_truth(job, data=data, truth=truth)
    photos = [photo for photo in dataset.splits[split] if photo.id in indexed.ids]
    if not photos:
        raise DataError(f"no photo of split {split!r} has a true mask; there is nothing to audit")
    num = len(dataset.classes)
    counts = {kind: Counts(Leaks(num), None if kind == "cam" else Gaps(num)) for kind in folders}
    by_photo = []
    roles = SceneRoles.read(job.work.data_root(data)) if data.stage == "scenes" else None
    for done, photo in enumerate(photos, 1):
        true = indexed.read(photo)
        for kind, folder in folders.items():
            found = count_photo(counts[kind], photo, true, folder, roles)
            if found is not None:
                by_photo.append(found)
        job.work.recorder.progress(f"audit {split}", done, len(photos))
    save_file({"counts": np.stack(by_photo)}, out / PHOTO_COUNTS)
    return build_audit(counts, classes=dataset.classes, split=split, photos=len(photos))


def _keep(out: Path, audit: Audit, *, picture: str) -> Measured:
    (out / AUDIT).write_text(audit.model_dump_json(indent=1) + "\n")
    title = f"{audit.photos} photos of {audit.split}: does a class lie where its company is?"
    draw_audit(audit, title=title).save(out / picture)
    return Measured(audit.metrics())


def count_photo(
    counts: Counts,
    photo: TaggedPhoto,
    true: np.ndarray,
    folder: Path,
    roles: SceneRoles | None,
) -> Int64[np.ndarray, "3 labels"] | None:
    """Count one photo: its mass by true label, its class counts if it has labels, its roles.

    Args:
        counts: What is added to.
        photo: The photo; without tags it has no class to look at.
        true: Its true mask.
        folder: Of its CAM, where the counts know no gaps, or of its mask.
        roles: Known for scenes alone.

    Returns:
        Its `class_counts`; None for a CAM.
    """
    num_labels = counts.leaks.photos.shape[0] + 1
    tags, found = list(photo.tags), None
    weights: Float[np.ndarray, "k h w"]
    if counts.gaps is not None:
        mask = read_mask(folder / f"{photo.id}.png")
        weights = (mask == np.array(tags, np.int64).reshape(-1, 1, 1) + 1).astype(np.float32)
        confusion = confusion_matrix(mask, true, num_classes=num_labels, name=photo.id)
        found = class_counts(confusion)
        counts.gaps.add(tags, found)
    elif tags:
        cam = read_cam(folder / f"{photo.id}.npz")
        weights = upsample_cam(cam.cam, cam.size)
    if tags:
        counts.leaks.add(tags, mass_by_label(weights, true, num_labels=num_labels))
        if roles is not None:
            _count_roles(counts, photo, weights, roles)
    return found


def _count_roles(
    counts: Counts,
    photo: TaggedPhoto,
    weights: Float[np.ndarray, "k h w"],
    roles: SceneRoles,
) -> None:
    """The object's mass on the stuff beside it; how much of the object and its part is found."""
    scene = roles.scenes[photo.id]
    mass = weights[photo.tags.index(scene["object"])]
    tied = scene["stuff"] == scene["object"]
    name = "stuff" if tied else "stuff_untied"
    on_stuff = float(mass[roles.where(photo, "stuff")].sum())
    counts.scenes.setdefault(name, Shares()).add(on_stuff, float(mass.sum()))
    for role in () if counts.gaps is None else ("part", "object"):
        where = roles.where(photo, role)
        counts.scenes.setdefault(role, Shares()).add(float(mass[where].sum()), float(where.sum()))


def read_photo_counts(folder: Path) -> Int64[np.ndarray, "p 3 labels"] | None:
    """The `class_counts` of each photo of an audit, in the split's order; None without any."""
    path = folder / PHOTO_COUNTS
    return load_file(path)["counts"] if path.is_file() else None


audit_masks = Stage("audit", _write_masks, lambda config: {})
audit_segmenter = Stage("audit_segmenter", _write_segmenter, lambda config: {})

"""What one set of masks scored, with everything a table must say beside the number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict

from wsss_core.errors import SettingsError
from wsss_core.evaluation.confusion import class_iou, class_precision, class_recall, mean_iou

Supervision = Literal["tags", "uses truth"]


class Report(BaseModel):
    """Scores of one mask set on one split; a score that does not exist is None, never 0.

    Attributes:
        split: The split's name.
        photos: Photos counted.
        unscored: Photos of the split that were left out because they have no true mask.
        supervision: What the masks were made from.
        settings: How the masks were made, where that is a choice (scale, flip, CRF, threshold).
        miou: Mean IoU over the classes present in truth or prediction, background included.
        miou_core: The same over background and the core classes.
        core: Names behind `miou_core`, background first; empty if there is no core mean.
        absent: Classes in neither truth nor prediction, left out of the means.
        iou: IoU by class.
        precision: Share of the class's predicted pixels that are right (low: over-activation).
        recall: Share of the class's true pixels that are found (low: under-activation).
        confusion: Pixel counts, rows truth, columns prediction, in the order of `iou`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    photos: int
    unscored: int
    supervision: Supervision
    settings: str
    miou: float | None
    miou_core: float | None
    core: tuple[str, ...]
    absent: tuple[str, ...]
    iou: dict[str, float | None]
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    confusion: list[list[int]]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names, e.g. `pseudo/miou`, `pseudo/iou/cat`; missing scores are left out."""
        named: dict[str, float | None] = {"miou": self.miou, "miou_core": self.miou_core}
        for kind in ("iou", "precision", "recall"):
            named |= {f"{kind}/{name}": value for name, value in getattr(self, kind).items()}
        return flat_metrics(named, prefix=prefix)


def build_report(
    confusion: Int64[np.ndarray, "k k"],
    *,
    names: Sequence[str],
    split: str,
    photos: int,
    unscored: int = 0,
    supervision: Supervision = "tags",
    settings: str = "",
    core: Sequence[int] = (),
) -> Report:
    """Turn counts into a report.

    Args:
        confusion: Rows truth, columns prediction, over the whole split.
        names: Name of each label, background first.
        split: The split's name.
        photos: Photos behind the counts.
        unscored: Photos of the split without truth.
        supervision: What the masks were made from.
        settings: How the masks were made.
        core: Labels of the core mean, as `core_labels` gives them.
    """
    iou = class_iou(confusion)
    return Report(
        split=split,
        photos=photos,
        unscored=unscored,
        supervision=supervision,
        settings=settings,
        miou=optional(mean_iou(confusion)),
        miou_core=optional(mean_iou(confusion, labels=core)) if core else None,
        core=tuple(names[label] for label in core),
        absent=tuple(name for name, value in zip(names, iou, strict=True) if np.isnan(value)),
        iou=by_name(names, iou),
        precision=by_name(names, class_precision(confusion)),
        recall=by_name(names, class_recall(confusion)),
        confusion=confusion.tolist(),
    )


def core_labels(core_classes: Sequence[str], *, names: Sequence[str]) -> tuple[int, ...]:
    """Labels of the core mean: background and the given classes; empty if none is given.

    Args:
        core_classes: Foreground names, the setting `data.core_classes`.
        names: Name of each label, background first.

    Raises:
        SettingsError: For a name that is no class.
    """
    known = list(names[1:])
    for name in core_classes:
        if name not in known:
            raise SettingsError(
                f"data.core_classes: {name!r} is not a class of this data; choose from "
                f"{', '.join(known)}"
            )
    labels = sorted({known.index(name) + 1 for name in core_classes})
    return (0, *labels) if labels else ()


def by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    """Values by class name, None for NaN."""
    return {name: optional(value) for name, value in zip(names, values, strict=True)}


def optional(value: float | np.ndarray) -> float | None:
    """A Python float, None for NaN."""
    number = float(value)
    return None if np.isnan(number) else number


def flat_metrics(named: dict[str, float | None], *, prefix: str) -> dict[str, float]:
    """`prefix/name` of every value that exists."""
    return {f"{prefix}/{name}": value for name, value in named.items() if value is not None}

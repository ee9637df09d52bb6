"""Intersection over union, counted over a whole split (docs/decisions/0001).

One confusion matrix over all photos, background included. IoU_i = TP / (truth + predicted - TP).
Pixels whose truth is `IGNORE_INDEX` are left out; a class absent from both truth and prediction has
no IoU and is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer
from numpy.typing import ArrayLike

from wsss_core.errors import DataError
from wsss_core.records import IGNORE_INDEX


def confusion_matrix(
    predicted: Integer[np.ndarray, "_ _"],
    truth: Integer[np.ndarray, "_ _"],
    *,
    num_classes: int,
    name: str = "mask",
) -> Int64[np.ndarray, "k k"]:
    """Count pixels by (true label, predicted label).

    Args:
        predicted: Label of each pixel, in [0, num_classes). `IGNORE_INDEX` counts as background:
            whoever does not decide is not excused (irn eval_sem_seg does the same).
        truth: Label of each pixel, in [0, num_classes), or `IGNORE_INDEX`: not counted, whatever
            was predicted.
        num_classes: Number of classes, background included (21 for VOC).
        name: The photo, for messages.

    Returns:
        Counts; rows are the truth, columns the prediction.

    Raises:
        DataError: If the sizes differ or a counted pixel holds another label.
    """
    true, (guess,) = select_counted(truth, predicted, name=name)
    guess = np.where(guess == IGNORE_INDEX, 0, guess)
    check_labels(true, num_classes=num_classes, name=f"{name}: the truth")
    check_labels(guess, num_classes=num_classes, name=f"{name}: the mask")
    flat = np.bincount(true * num_classes + guess, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def select_counted(
    truth: Integer[np.ndarray, "_ _"], *maps: np.ndarray, name: str
) -> tuple[Int64[np.ndarray, " p"], list[np.ndarray]]:
    """The pixels that count, flat: those whose truth is not `IGNORE_INDEX`.

    Args:
        truth: Label map.
        maps: Further maps of the same photo; integer ones come back as int64.
        name: The photo, for messages.

    Raises:
        DataError: If a map has another size than the truth.
    """
    for other in maps:
        if other.shape != truth.shape:
            raise DataError(
                f"{name}: the mask is {_size(other)} px, its truth {_size(truth)} px "
                "(width x height); a mask must have its photo's own size"
            )
    counted = truth != IGNORE_INDEX
    chosen = [other[counted] for other in maps]
    return truth[counted].astype(np.int64), [
        pixels.astype(np.int64) if np.issubdtype(pixels.dtype, np.integer) else pixels
        for pixels in chosen
    ]


def check_labels(labels: Int64[np.ndarray, " p"], *, num_classes: int, name: str) -> None:
    """Refuse labels outside [0, num_classes).

    Raises:
        DataError: Naming the first stray label.
    """
    stray = labels[(labels < 0) | (labels >= num_classes)]
    if stray.size:
        raise DataError(
            f"{name} holds label {stray[0]}; expected 0..{num_classes - 1} or {IGNORE_INDEX}, "
            "check that it was made for this list of classes"
        )


def class_iou(confusion: Int64[np.ndarray, "*n k k"]) -> Float64[np.ndarray, "*n k"]:
    """Intersection over union of each class; NaN for one absent from truth and prediction."""
    hit, true, guess = _margins(confusion)
    return ratio(hit, true + guess - hit)


def class_precision(confusion: Int64[np.ndarray, "*n k k"]) -> Float64[np.ndarray, "*n k"]:
    """Share of the predicted pixels that are right; low means over-activation. NaN if none."""
    hit, _, guess = _margins(confusion)
    return ratio(hit, guess)


def class_recall(confusion: Int64[np.ndarray, "*n k k"]) -> Float64[np.ndarray, "*n k"]:
    """Share of the true pixels that are found; low means under-activation. NaN if none."""
    hit, true, _ = _margins(confusion)
    return ratio(hit, true)


def mean_iou(
    confusion: Int64[np.ndarray, "*n k k"], *, labels: Sequence[int] | None = None
) -> Float64[np.ndarray, "*n"]:
    """Mean of the IoU over the classes that have one; NaN if none has.

    Args:
        confusion: One matrix or a stack of them.
        labels: The classes to average over; all by default. Confusions with the others still count
            as errors.
    """
    iou = class_iou(confusion)
    if labels is not None:
        iou = iou[..., list(labels)]
    return ratio(np.nansum(iou, axis=-1), np.sum(~np.isnan(iou), axis=-1))


def ratio(part: ArrayLike, whole: ArrayLike) -> Float64[np.ndarray, "*n"]:
    """`part / whole` of equally shaped counts, NaN where `whole` is 0."""
    above, below = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _margins(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    return hit, confusion.sum(axis=-1), confusion.sum(axis=-2)


def _size(map_: np.ndarray) -> str:
    return "x".join(str(side) for side in map_.shape[1::-1])

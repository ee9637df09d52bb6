"""The sum over contexts drawn in pixels: an object before another photo's context (`pasted`).

    P(Y | do(X)) = sum_c P(Y | X, c) P(c)

asks for the same object under every context, as often as the data set shows it and not as often as
it comes with this object. The confounders of CONTA stand for a context by a map of where classes
lie. Here c is a photo of the training list and P(c) the list itself: what the last round's
pseudo-mask says of one tagged object is cut out and put into a photo drawn at random, at a random
place. Company, stuff and place are then drawn anew, in every epoch, and a context whose own object
is hidden no longer carries its tag. The network has no further input, so nothing is needed to look
at an unseen photo.

What a mask takes along of the stuff around its object is pasted too; the tie to that part stays.
Pasting between photos as such is Context Decoupling Augmentation (Su et al., ICCV 2021).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from wsss_core.data.transforms import resize_photo

PASTED_SHARE = 0.5
"""Of the photos of an epoch; the others are seen as they are."""

SMALLEST, LARGEST = 0.01, 0.6
"""Shares of its photo that an object may cover; beyond, the mask is noise or the whole picture."""

HIDDEN = 2 / 3
"""Share of an object's mask beyond which it counts as hidden."""


def paste(
    photo: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    tags: tuple[int, ...],
    *,
    onto: UInt8[np.ndarray, "H W 3"],
    onto_mask: UInt8[np.ndarray, "H W"],
    onto_tags: tuple[int, ...],
    random: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, ...]] | None:
    """One object of a photo before the context of another.

    The object keeps its size relative to the long side, or is made to fit; it lies wholly inside.

    Args:
        photo: RGB, 0..255, whose object is taken.
        mask: Its pseudo-mask, labels 1..n, 0 background.
        tags: Its classes, counted from 0.
        onto: The photo that gives the context.
        onto_mask: Its pseudo-mask.
        onto_tags: Its classes.
        random: Draws the object among the tags, and its place.

    Returns:
        The picture and its tags, sorted: the object's, and those of `onto` that are not hidden; one
        that has no mask counts as seen. None if no tag of the photo has a mask of a usable size.
    """
    usable = [tag for tag in tags if SMALLEST <= (mask == tag + 1).mean() <= LARGEST]
    if not usable:
        return None
    tag = usable[int(random.integers(len(usable)))]
    shape = mask == tag + 1
    rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = shape[box].shape
    ratio = max(onto.shape[:2]) / max(photo.shape[:2])
    ratio = min(ratio, onto.shape[0] / height, onto.shape[1] / width)
    size = (max(1, int(height * ratio)), max(1, int(width * ratio)))
    cut = _resize(photo[box], size)
    cover = _resize(np.repeat(shape[box][:, :, None], 3, axis=2).astype(np.uint8) * 255, size) / 255

    top, left = (int(random.integers(onto.shape[axis] - size[axis] + 1)) for axis in (0, 1))
    place = np.s_[top : top + size[0], left : left + size[1]]
    picture = onto.copy()
    picture[place] = np.rint(cover * cut + (1 - cover) * onto[place]).astype(np.uint8)
    hidden = np.zeros(onto.shape[:2], bool)
    hidden[place] = cover[:, :, 0] > 0.5
    seen = {other for other in onto_tags if _hidden_share(onto_mask == other + 1, hidden) <= HIDDEN}
    return picture, tuple(sorted(seen | {tag}))


def _resize(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> np.ndarray:
    resized: np.ndarray = resize_photo(picture, size).permute(1, 2, 0).numpy()
    return resized


def _hidden_share(shape: np.ndarray, hidden: np.ndarray) -> float:
    return float(hidden[shape].mean()) if shape.any() else 0.0

"""The sum over contexts drawn in pixels: an object before another photo's context (`pasted`).

    P(Y | do(X)) = sum_c P(Y | X, c) P(c)

asks for the same object under every context, as often as the data set shows it and not as often as
it comes with this object. The confounders of CONTA stand for a context by a map of where classes
lie. Here c is a photo of the training list and P(c) the list itself: what the last round's
pseudo-mask says of one tagged object is cut out and put into a photo drawn at random, at a random
place. Company, stuff and place are then drawn anew, in every epoch, and a context whose own object
is hidden no longer carries its tag. Classifier and segmenter of the round both see such pictures;
they have no further input, so nothing is needed to look at an unseen photo.

What a mask takes along of the stuff around its object is pasted too; the tie to that part stays.

`pasted_bare` shows the classifier half of these contexts bare: the photo's own objects lie under
other pieces of its own background and their tags are gone. A context that brings its own object is
no evidence against company and stuff, which that object keeps as well; a bare one is. The segmenter
sees whole contexts; bare ones cost it (decisions/0009).

The control `pasted_own` puts a second copy of the object elsewhere in its own photo: the same
augmentation, without another context. Pasting between photos as such is Context Decoupling
Augmentation (Su et al., ICCV 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from wsss_core.data.transforms import resize_photo

OWN, BARE = "pasted_own", "pasted_bare"
"""Values of `causal.context`: the control, which keeps the photo's own context, and the one that
takes the objects out of half of the others."""

CLASSIFIER_SHARE = 0.5
"""Of the photos of an epoch; the others are seen as they are. With all of them pasted a classifier
learns less, its task is the harder one (decisions/0009). The segmenter's is a setting,
`causal.segmenter_share`: it helps where ties are cut and costs where they hold."""

SMALLEST, LARGEST = 0.01, 0.6
"""Shares of its photo that an object may cover; beyond, the mask is noise or the whole picture."""

BARE_SHARE = 0.5
"""Of the contexts of `pasted_bare`."""

MARGIN, MOST_COVERED, PIECES = 0.04, 0.75, 12
"""How far beyond its mask an object is covered, as a share of the long side; the share of a photo
that may be covered; how many pieces of background are tried."""

HIDDEN = 2 / 3
"""Share of an object's mask beyond which it counts as hidden."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A photo with what is known of it.

    Attributes:
        photo: RGB, 0..255.
        mask: Its pseudo-mask, labels 1..n, 0 background; others are no object.
        tags: Its classes, counted from 0, sorted.
    """

    photo: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    tags: tuple[int, ...]


def paste(source: Picture, onto: Picture, *, random: np.random.Generator) -> Picture | None:
    """One object of a photo before the context of another.

    The object keeps its size relative to the long side, or is made to fit; it lies wholly inside.

    Args:
        source: Whose object is taken.
        onto: What gives the context.
        random: Draws the object among the tags, and its place.

    Returns:
        A picture of the size of `onto`. Its tags are the object's and those of `onto` that are not
        hidden; one that has no mask counts as seen. None if no tag of the source has a mask of a
        usable size.
    """
    usable = [t for t in source.tags if SMALLEST <= (source.mask == t + 1).mean() <= LARGEST]
    if not usable:
        return None
    tag = usable[int(random.integers(len(usable)))]
    shape = source.mask == tag + 1
    rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = shape[box].shape
    whole = onto.mask.shape
    ratio = min(max(whole) / max(shape.shape), whole[0] / height, whole[1] / width)
    size = (max(1, int(height * ratio)), max(1, int(width * ratio)))
    cut = _resize(source.photo[box], size)
    cover = _resize(np.repeat(shape[box][:, :, None], 3, axis=2).astype(np.uint8) * 255, size) / 255

    top, left = (int(random.integers(whole[axis] - size[axis] + 1)) for axis in (0, 1))
    place = np.s_[top : top + size[0], left : left + size[1]]
    photo, mask, hidden = onto.photo.copy(), onto.mask.copy(), np.zeros(whole, bool)
    photo[place] = np.rint(cover * cut + (1 - cover) * onto.photo[place]).astype(np.uint8)
    hidden[place] = cover[:, :, 0] > 0.5
    mask[hidden] = tag + 1
    seen = {t for t in onto.tags if _share(hidden, onto.mask == t + 1) <= HIDDEN}
    return Picture(photo, mask, tuple(sorted(seen | {tag})))


def bare(context: Picture, *, random: np.random.Generator) -> Picture | None:
    """A photo with its objects covered by pieces of its own background, and without tags.

    Every piece is the photo itself, shifted with wraparound and mirrored in half of the draws; it
    shows where it is background and what it falls on is still uncovered.

    Args:
        context: A photo and its mask.
        random: Draws the pieces.

    Returns:
        None for a photo with a tag that has no mask of a usable size (its object would stay in
        sight without its tag), or with too little background.
    """
    margin = max(1, round(MARGIN * max(context.mask.shape)))
    objects = ndimage.binary_dilation(context.mask > 0, iterations=margin)  # type: ignore[attr-defined]
    if objects.mean() > MOST_COVERED or any(
        (context.mask == tag + 1).mean() < SMALLEST for tag in context.tags
    ):
        return None
    photo, left = context.photo.copy(), objects
    for _ in range(PIECES):
        shift = tuple(int(random.integers(-side // 2, side // 2 + 1)) for side in left.shape)
        step = -1 if random.random() < 0.5 else 1
        piece, free = (
            np.roll(pixels[:, ::step], shift, axis=(0, 1)) for pixels in (context.photo, ~objects)
        )
        photo[left & free] = piece[left & free]
        left = left & ~free
        if not left.any():
            return Picture(photo, np.zeros_like(context.mask), ())
    return None


def _resize(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> np.ndarray:
    resized: np.ndarray = resize_photo(picture, size).permute(1, 2, 0).numpy()
    return resized


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part[whole].mean()) if whole.any() else 0.0

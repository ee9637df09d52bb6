"""The confounder set: where each class lies in a picture, and how often a photo holds it.

c_i is an empirical P(pixel is i | photo is tagged i), one map of s x s cells a class. The mean runs
over the photos tagged i alone: over all photos c_i would also hold the class's frequency, and P(c)
would count it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from wsss_core.errors import DataError, InputError, StoreError

COSINE_THRESHOLD = (
    0.95  # above this mean pairwise cosine the c_i are so alike that alpha cannot matter
)
_DTYPES = {"c": np.float32, "counts": np.int64, "prior": np.float32}


@dataclass(frozen=True, eq=False)
class ConfounderSet:
    """The strata of the adjustment and their weights; n foreground classes, s x s cells.

    Attributes:
        c: (n, s, s) float32, class-average masks in [0, 1].
        counts: (n,) int64, training photos in which the segmenter found the class; 0 marks a
            fallback c_i.
        prior: (n,) float32, P(c_i); sums to 1.
    """

    c: np.ndarray
    counts: np.ndarray
    prior: np.ndarray

    def __post_init__(self) -> None:
        """Refuse arrays that are no confounder set."""
        for name, dtype in _DTYPES.items():
            found = getattr(self, name).dtype
            if found != dtype:
                raise InputError(
                    f"{name} of a confounder set is {found}; expected {dtype.__name__}"
                )
        if self.c.ndim != 3 or self.c.shape[1] != self.c.shape[2] or not self.c.size:
            raise InputError(f"c of a confounder set has shape {self.c.shape}; expected (n, s, s)")
        for name in ("counts", "prior"):
            shape = getattr(self, name).shape
            if shape != (self.num_classes,):
                raise InputError(
                    f"{name} of a confounder set has shape {shape}; expected ({self.num_classes},)"
                )
        if not (self.c.min() >= 0 and self.c.max() <= 1):  # false for NaN too
            raise InputError(f"c spans {self.c.min()}..{self.c.max()}; expected values in 0..1")
        if not (self.prior.min() >= 0 and abs(float(self.prior.sum()) - 1) < 1e-4):
            raise InputError(f"prior sums to {self.prior.sum()}; expected shares that sum to 1")

    @property
    def num_classes(self) -> int:
        """n: foreground classes, one confounder each."""
        return len(self.c)

    @property
    def size(self) -> int:
        """s: cells along a side of the canonical frame."""
        return self.c.shape[1]

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal sets give equal bytes."""
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}, path)

    @classmethod
    def load(cls, path: Path) -> ConfounderSet:
        """Read what `save` wrote.

        Raises:
            StoreError: If the file is missing or damaged.
            InputError: If it holds arrays that are no confounder set.
        """
        try:
            arrays = load_file(path)
            return cls(**{name: arrays[name] for name in _DTYPES})
        except (OSError, SafetensorError, KeyError) as error:
            fault = " ".join(str(error).split())
            raise StoreError(
                f"no confounder set can be read from {path} ({fault}); run its round again"
            ) from None


def squash(
    values: Float[np.ndarray, "*k h w"], *, size: int
) -> Float32[np.ndarray, "*k {size} {size}"]:
    """Maps of a whole picture in the canonical frame: exact area averages, aspect ignored.

    A pixel that straddles cells counts in each by the area it covers there, so the mean is kept; a
    picture smaller than the frame is enlarged in blocks. X_m is made by this function too.
    """
    *_, height, width = values.shape
    rows, columns = _overlap_shares(height, size=size), _overlap_shares(width, size=size)
    return (rows @ values.astype(np.float64) @ columns.T).astype(np.float32)


def class_shares(
    mask: UInt8[np.ndarray, "h w"], *, tags: Sequence[int], size: int
) -> Float32[np.ndarray, "k {size} {size}"]:
    """Share of each cell that a tagged class's own pixels cover, one map a tag.

    Args:
        mask: Hard labels of the whole picture, class k painted k + 1; ignored pixels are nobody's.
        tags: Foreground classes a person tagged, 0-based; what else the mask holds is left out.
        size: s, cells along a side.
    """
    labels = np.asarray(tags, np.int64).reshape(-1, 1, 1) + 1
    return squash((mask == labels).astype(np.float32), size=size)


def average_class_masks(
    shares: Iterable[tuple[Sequence[int], Float32[np.ndarray, "_ s s"]]],
    *,
    num_classes: int,
    size: int,
) -> tuple[Float32[np.ndarray, "n {size} {size}"], Int64[np.ndarray, " n"]]:
    """c_i, and in how many photos class i was really segmented.

    Args:
        shares: Tags and `class_shares` of each training photo; read once, one at a time.
        num_classes: n, foreground classes.
        size: s, cells along a side.

    Returns:
        The mean over the photos tagged i, those with an empty mask included (all zero for a class
        that no photo shows); the number of photos tagged i with at least one pixel of i.
    """
    total = np.zeros((num_classes, size, size))
    tagged, counts = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for tags, maps in shares:
        for tag, share in zip(tags, maps, strict=True):
            total[tag] += share
            tagged[tag] += 1
            counts[tag] += bool(share.any())
    return (total / np.maximum(tagged, 1)[:, None, None]).astype(np.float32), counts


def complete_confounders(
    c: Float32[np.ndarray, "n s s"],
    *,
    counts: Int64[np.ndarray, " n"],
    former: Float32[np.ndarray, "n s s"] | None = None,
    pseudo: Float32[np.ndarray, "n s s"] | None = None,
) -> Float32[np.ndarray, "n s s"]:
    """`c` with every class that was never segmented filled in; zero only where no source has it.

    Args:
        c: Class averages of this round.
        counts: Photos in which each class was segmented; 0 asks for a fallback.
        former: c of the round before; the first choice.
        pseudo: Class averages of the pseudo-masks; for a class that `former` does not know either.
    """
    completed = c.copy()
    missing = counts == 0
    for fallback in (former, pseudo):
        if fallback is None:
            continue
        known = missing & fallback.any(axis=(1, 2))
        completed[known] = fallback[known]
        missing = missing & ~known
    return completed


def tag_prior(
    tags: Iterable[Sequence[int]],
    *,
    num_classes: int,
    kind: Literal["uniform", "frequency"],
) -> Float32[np.ndarray, " n"]:
    """P(c): the same for each, or the tag counts of the training photos normalised to 1.

    Args:
        tags: Of each training photo.
        num_classes: n, foreground classes.
        kind: `causal.prior`.

    Raises:
        DataError: If a tag is outside 0..num_classes-1, or no photo has a tag to count.
    """
    if kind == "uniform":
        return np.full(num_classes, 1 / num_classes, np.float32)
    counts = np.zeros(num_classes, np.int64)
    for photo_tags in tags:
        for tag in photo_tags:
            if not 0 <= tag < num_classes:
                raise DataError(
                    f"a photo is tagged {tag}; expected a class in 0..{num_classes - 1}"
                )
            counts[tag] += 1
    if not counts.any():
        raise DataError("no training photo has a tag; set causal.prior to uniform or add tags")
    return (counts / counts.sum()).astype(np.float32)


def mean_pairwise_cosine(c: Float[np.ndarray, "n s s"]) -> float:
    """How alike the c_i are: mean cosine over all pairs of different classes, in [0, 1].

    All-zero maps are left out; 1 if fewer than two are left. Above `COSINE_THRESHOLD` any alpha
    gives nearly the same M.
    """
    flat: Float64[np.ndarray, "n hw"] = c.reshape(len(c), -1).astype(np.float64)
    flat = flat[flat.any(axis=1)]
    if len(flat) < 2:
        return 1.0
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return float((unit @ unit.T)[np.triu_indices(len(unit), k=1)].mean())


def _overlap_shares(length_px: int, *, size: int) -> Float64[np.ndarray, "{size} {length_px}"]:
    """Share of each cell that each pixel covers along one axis; rows sum to 1."""
    edges = np.arange(size + 1) * (length_px / size)
    pixels = np.arange(length_px)
    upper = np.minimum(edges[1:, None], pixels + 1)
    lower = np.maximum(edges[:-1, None], pixels)
    return np.clip(upper - lower, 0, None) * (size / length_px)

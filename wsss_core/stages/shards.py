"""Fixed shards of sorted photo ids, and batches of equal size inside them.

Batches form inside a shard, never across, so the last bits of a result depend neither on the number
of workers nor on which photos another shard holds.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8

from wsss_core.data.images import read_pixels
from wsss_core.errors import ContaError
from wsss_core.records import TaggedPhoto

SHARD_PHOTOS = 24
"""Photos a shard: small enough that two workers end together on a few hundred photos."""

T = TypeVar("T")


def split_shards(items: Sequence[T], *, size: int = SHARD_PHOTOS) -> list[tuple[T, ...]]:
    """Consecutive shards of `size` items, the last one shorter."""
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def read_batches(
    photos: Sequence[TaggedPhoto], *, batch_size: int
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "b h w 3"]]]:
    """The shard's photos in batches of one size, with their positions in the shard."""
    by_size: dict[tuple[int, int], list[tuple[int, UInt8[np.ndarray, "h w 3"]]]] = defaultdict(list)
    for position, photo in enumerate(photos):
        pixels = read_pixels(photo)
        size = (pixels.shape[0], pixels.shape[1])
        by_size[size].append((position, pixels))
        if len(by_size[size]) == batch_size:
            yield _stack(by_size.pop(size))
    for group in by_size.values():
        yield _stack(group)


@contextlib.contextmanager
def naming(what: str, ids: Iterable[str]) -> Iterator[None]:
    """Have an error say at which `what` (shard, photos) it came up; who mends it stays the same.

    Raises:
        ContaError: In the place of an error that has no message for the user.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the stage says what helps
    except ContaError as error:
        error.args = (f"{_place(what, ids)}: {error}",)
        raise
    except OSError as error:
        if error.errno is None:  # one of a library's own
            raise ContaError(f"{_place(what, ids)}: {error}") from error
        reason = f"{error.strerror} ({_place(what, ids)})"
        raise OSError(error.errno, reason, error.filename) from error
    except Exception as error:
        raise ContaError(f"{_place(what, ids)}: {type(error).__name__}: {error}") from error


def _place(what: str, ids: Iterable[str]) -> str:
    return f"{what} {', '.join(ids)}"


def _stack(
    group: list[tuple[int, UInt8[np.ndarray, "h w 3"]]],
) -> tuple[list[int], UInt8[np.ndarray, "b h w 3"]]:
    return [position for position, _ in group], np.stack([pixels for _, pixels in group])

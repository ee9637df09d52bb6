"""Shards and batches: every photo once, equal sizes together, the same whatever else there is."""

import errno

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsss_core.errors import ContaError, DataError
from wsss_core.records import TaggedPhoto
from wsss_core.stages.shards import SHARD_PHOTOS, naming, read_batches, split_shards


@given(st.integers(0, 100), st.integers(1, 30))
def test_split_shards__consecutive_and_full_but_for_the_last(count, size):
    shards = split_shards(range(count), size=size)
    assert [item for shard in shards for item in shard] == list(range(count))
    assert all(len(shard) == size for shard in shards[:-1])
    assert all(shards)


def test_split_shards__photos_added_at_the_end_leave_the_first_shards_alone():
    assert split_shards(range(2 * SHARD_PHOTOS + 5))[:2] == split_shards(range(2 * SHARD_PHOTOS))


@pytest.fixture
def photos(tmp_path):
    found = []
    for number, size in enumerate([(4, 6), (6, 4), (4, 6), (4, 6), (6, 4), (5, 5)]):
        pixels = np.full((*size, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        found.append(TaggedPhoto(str(number), tmp_path / f"{number}.png", (0,)))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_read_batches__every_photo_once_in_a_batch_of_its_size(photos, batch_size):
    seen = []
    for positions, pixels in read_batches(photos, batch_size=batch_size):
        assert 1 <= len(positions) == len(pixels) <= batch_size
        assert [int(photo[0, 0, 0]) for photo in pixels] == positions
        seen += positions
    assert sorted(seen) == list(range(6))


def test_read_batches__by_hand(photos):
    found = [positions for positions, _ in read_batches(photos, batch_size=2)]
    assert found == [[0, 2], [1, 4], [3], [5]]


def test_naming__says_where_and_keeps_who_mends_it():
    with (
        pytest.raises(DataError) as ours,
        naming("shard", ["a to c"]),
        naming("photos", ["a", "b"]),
    ):
        raise DataError("b.png is broken")
    assert str(ours.value) == "shard a to c: photos a, b: b.png is broken"
    with pytest.raises(ContaError) as theirs, naming("shard", ["a to c"]):
        raise KeyError("x")
    assert str(theirs.value) == "shard a to c: KeyError: 'x'"
    assert isinstance(theirs.value.__cause__, KeyError)
    with pytest.raises(OSError, match="Input/output error") as disk, naming("photos", ["a"]):
        raise OSError(errno.EIO, "Input/output error", "a.png")
    assert (disk.value.errno, disk.value.filename) == (errno.EIO, "a.png")
    assert disk.value.strerror == "Input/output error (photos a)"
    with pytest.raises(ContaError, match="photos a: truncated"), naming("photos", ["a"]):
        raise OSError("truncated")
    with pytest.raises(KeyboardInterrupt), naming("photos", ["a"]):
        raise KeyboardInterrupt
    with pytest.raises(torch.OutOfMemoryError, match="20 MiB"), naming("photos", ["a"]):
        raise torch.OutOfMemoryError("20 MiB")  # the stage knows what helps

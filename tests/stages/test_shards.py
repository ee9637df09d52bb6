"""Shards and batches: every photo once, equal sizes together, the same whatever else there is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsss_core.records import TaggedPhoto
from wsss_core.stages.shards import SHARD_PHOTOS, read_batches, split_shards


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

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from flows.pictures import shrink_picture


@pytest.mark.parametrize("size", [(300, 200), (1200, 1500)])
def test_shrink_picture__a_jpeg_below_a_size(tmp_path, size):
    Image.effect_noise(size, 100).save(tmp_path / "panel.png")
    text = shrink_picture(tmp_path / "panel.png", 100_000)
    assert len(text) < 100_000
    head, _, body = text.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
        assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.02)

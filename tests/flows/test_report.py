from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from flows import report


@pytest.mark.parametrize("size", [(300, 200), (1200, 1500)])
def test_shrink_picture__a_jpeg_that_fits_the_database(tmp_path, size):
    Image.effect_noise(size, 100).save(tmp_path / "panel.png")
    text = report.shrink_picture(tmp_path / "panel.png")
    assert len(text) < report.MAX_BYTES
    head, _, body = text.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
        assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.02)

"""Pictures inside a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image


def shrink_picture(path: Path, max_bytes: int) -> str:
    """A picture as a JPEG `data:` address below `max_bytes`, smaller in pixels if need be."""
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    while True:
        for quality in (85, 70, 50):
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=quality)
            text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            if len(text) < max_bytes:
                return text
        shown = shown.resize((max(shown.width // 2, 1), max(shown.height // 2, 1)))

"""The report of a round as Prefect shows it: its scores and its panel."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_markdown_artifact

from flows.runs import Round, Run, markdown_table

MAX_BYTES = 100_000  # it lies in Prefect's database


def publish_report(run: Run, entry: Round, panel: Path | None) -> None:
    """Add a version of the artifact `round-report`.

    Args:
        run: The run so far; its table shows every round.
        entry: The round that the report is about.
        panel: A picture of it; None keeps photos out.
    """
    parts = [f"# {run.name}, round {entry.round}", markdown_table(run)]
    if panel is not None:
        parts.append(f"![panel]({shrink_picture(panel)})")
    if run.mlflow_url is not None:
        parts.append(f"[Charts in MLflow]({run.mlflow_url})")
    create_markdown_artifact("\n\n".join(parts), key="round-report")


def shrink_picture(path: Path) -> str:
    """A picture as a JPEG `data:` address below 100 kB, smaller in pixels if need be."""
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    while True:
        for quality in (85, 70, 50):
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=quality)
            text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            if len(text) < MAX_BYTES:
                return text
        shown = shown.resize((max(shown.width // 2, 1), max(shown.height // 2, 1)))

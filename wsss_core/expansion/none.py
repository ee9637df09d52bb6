"""No expansion: the seeds against a constant background, the baseline of the other methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wsss_core.config import Config
from wsss_core.expansion.method import Expanded, Seeded, add_background


def choose_settings(config: Config) -> dict[str, Any]:
    """The background's score."""
    return {"threshold": config.seeds.threshold}


def expand(seeded: Sequence[Seeded], settings: dict[str, Any]) -> list[Expanded]:
    """The seeds as they are."""
    return [
        Expanded(add_background(photo.scores, threshold=settings["threshold"])) for photo in seeded
    ]

"""Progress of a running stage, on the terminal, in the run's log and on Prefect's page."""

from __future__ import annotations

import logging
import time
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from flows.patience import ask_once
from wsss_core.observe import ConsoleRecorder

logger = logging.getLogger(__name__)

EVERY_S = 5.0


class FlowRecorder(ConsoleRecorder):
    """A console recorder that also keeps a bar on the flow run's page for what takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._what = ""
        self._next_s = 0.0
        self._artifact: UUID | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        """Draw the line, and every few seconds the bar."""
        super().progress(what, done, total)
        now = time.monotonic()
        if what != self._what:
            self._what, self._artifact, self._next_s = what, None, now + EVERY_S
        ends = done >= total and self._artifact is not None
        if now >= self._next_s or ends:
            self._next_s = now + EVERY_S
            self._draw_bar(100 * done / total)
        if ends:
            self._what = ""

    def note(self, message: str) -> None:
        """Print the line and log it."""
        super().note(message)
        logger.info(message.strip())

    def _draw_bar(self, percent: float) -> None:
        try:
            with ask_once():
                self._send_bar(percent)
        except (HTTPError, OSError, PrefectException) as error:
            # a bar is not worth a run
            logger.warning("no progress on Prefect's page: %s", error)
            self._next_s = time.monotonic() + 60

    def _send_bar(self, percent: float) -> None:
        if self._artifact is None:
            made = create_progress_artifact(percent, key="progress", description=self._what)
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent, description=self._what)

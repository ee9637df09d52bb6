"""How long a run waits for a Prefect server that is gone.

Prefect 3.8 by itself tries each event for seven seconds, one after the other, before it lets the
process end: minutes for the events of a round.
"""

from __future__ import annotations

import contextlib

from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker, emit_events_to_cloud
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

_RECONNECTIONS = 2  # it sleeps a second before the third and each later one


def pass_over_events() -> None:
    """Have Prefect go on to the next event when one cannot be sent.

    The client keeps it and sends it with the next that arrives, so a server that comes back misses
    none.
    """
    if not emit_events_to_cloud():  # that client needs a key
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=_RECONNECTIONS)


def ask_once() -> contextlib.AbstractContextManager[object]:
    """A context in which a request to Prefect that fails is not repeated for a minute."""
    return temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})

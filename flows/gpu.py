"""Deployed runs take turns on a GPU."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

LEASE_S = 60.0  # a killed holder keeps the others waiting no longer than this


@contextlib.contextmanager
def turn_on_gpu(index: int, *, note: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other deployed run computes on a GPU of this host, and keep it meanwhile.

    The limit is made if it is not there; who wants two runs on one GPU may raise it on Prefect's
    page.

    Args:
        index: Index of the GPU as torch counts them.
        note: Hears of the wait.
    """
    name = f"conta-gpu-{socket.gethostname()}-{device_id(index)}"
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
            if limit.active_slots >= limit.limit:
                note(f"waiting for a turn ({name})")
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # of a run that starts with this one
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=1)
                )
    with concurrency(
        name,
        strict=True,  # else a limit that somebody deleted would limit nothing, and say nothing
        lease_duration=LEASE_S,
        raise_on_lease_renewal_failure=False,  # a server that restarts is no reason to stop
    ):
        yield


def device_id(index: int) -> str:
    """The GPU behind an index: processes that see different GPUs count each from 0."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return visible[index] if index < len(visible) and visible[index] else str(index)

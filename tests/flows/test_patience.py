from __future__ import annotations

import contextlib
import json
import os
import threading
import time

import pytest
from prefect.context import refresh_global_settings_context
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES
from websockets.sync.server import serve

from flows import patience
from flows.servers import HOST, find_free_port


@contextlib.contextmanager
def events_server(port):
    """The end of Prefect's server that takes events; yields the names of those that came."""
    names, connections = [], []

    def take(connection):
        connections.append(connection)
        connection.recv()
        connection.send(json.dumps({"type": "auth_success"}))
        names.extend(json.loads(message)["event"] for message in connection)

    server = serve(take, HOST, port, subprotocols=["prefect"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield names
    finally:
        server.shutdown()
        for connection in connections:
            connection.close()


@pytest.fixture
def port(clean_environment):
    EventsWorker.drain_all(timeout=10)  # that of another test talks to another server
    free = find_free_port()
    os.environ["PREFECT_API_URL"] = f"http://{HOST}:{free}/api"
    refresh_global_settings_context()
    yield free
    EventsWorker.drain_all(timeout=10)
    EventsWorker.set_client_override(None)


def emit(name):
    emit_event(name, {"prefect.resource.id": "toy"})


def wait_for(wanted, names):
    end = time.monotonic() + 30
    while not wanted <= set(names):
        assert time.monotonic() < end, names
        time.sleep(0.01)


def test_pass_over_events__a_dead_server_costs_no_time_and_hears_all_once_it_is_back(port):
    patience.pass_over_events()
    lost = [f"lost {number}" for number in range(20)]
    with events_server(port) as names:
        emit("first")
        wait_for({"first"}, names)
    started = time.monotonic()
    for name in lost:
        emit(name)
    EventsWorker.instance().wait_until_empty()
    assert time.monotonic() - started < 7  # what Prefect by itself gives each of them
    with events_server(port) as names:
        emit("last")
        wait_for({*lost, "last"}, names)


def test_ask_once__only_in_the_context():
    before = PREFECT_CLIENT_MAX_RETRIES.value()
    with patience.ask_once():
        assert PREFECT_CLIENT_MAX_RETRIES.value() == 0
    assert PREFECT_CLIENT_MAX_RETRIES.value() == before > 0

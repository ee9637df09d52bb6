"""One Prefect server for all flow tests, and homes of their own for each."""

from __future__ import annotations

import os

import pytest

from flows import environment, servers


@pytest.fixture
def clean_environment():
    """Put the environment back as it was."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """A Prefect server with a database of its own; this process talks to it."""
    before = dict(os.environ)
    home = tmp_path_factory.mktemp("server")
    for name in environment.describe_environment(home):
        os.environ.pop(name, None)
    environment.set_defaults(home)
    server = servers.open_prefect(home)
    try:
        server.wait_ready()
        yield server
    finally:
        servers.close_prefect(server)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def home(prefect_server, tmp_path, monkeypatch):
    """An empty CONTA_HOME with an MLflow database, on the session's Prefect server."""
    folder = tmp_path / "home"
    monkeypatch.setenv("CONTA_HOME", str(folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    folder.mkdir()
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return folder

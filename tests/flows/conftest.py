"""One Prefect server for all flow tests, and homes of their own for each."""

from __future__ import annotations

import os
import shutil

import pytest
from prefect.context import refresh_global_settings_context

from flows import environment, servers


@pytest.fixture
def clean_environment():
    """Put the environment back as it was, and Prefect's view of it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    refresh_global_settings_context()


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
def home(prefect_server, empty_mlflow, tmp_path, monkeypatch):
    """A CONTA_HOME with an MLflow database, on the session's Prefect server."""
    import mlflow

    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    monkeypatch.setenv("CONTA_HOME", str(folder))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    yield folder
    mlflow.set_tracking_uri(before)

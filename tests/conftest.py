"""What several areas share because it takes seconds to make."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The nets here are small: a second thread gains nothing and, beside other work, waits many times
# as long as it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory):
    """An MLflow database without runs; its tables take seconds to make, a copy none."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    mlflow.MlflowClient().search_experiments()
    mlflow.set_tracking_uri(before)
    return path

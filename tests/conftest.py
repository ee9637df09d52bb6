"""What several areas share because it takes seconds to make."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Beside other work, threads that wait for each other in a loop take twice as long over nets as
# small as these (docs/performance.md). How many there are stays as users have it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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

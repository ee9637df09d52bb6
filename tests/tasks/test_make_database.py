"""MLflow's database is there as a whole or not at all."""

from pathlib import Path

import pytest

from tasks import tracking
from tasks.tracking import make_database


@pytest.fixture
def fill(monkeypatch):
    """Replaces what fills a new database: writes `text`, then dies if told to."""

    def prepare(text, *, dies=False):
        class Client:
            def __init__(self, uri):
                self.path = Path(uri.removeprefix("sqlite:///"))

            def search_experiments(self, max_results):
                assert not self.path.exists(), "began with what another had left"
                self.path.write_text(text)
                if dies:
                    raise KeyboardInterrupt

        monkeypatch.setattr(tracking.mlflow, "MlflowClient", Client)

    return prepare


def test_make_database__dies_half_way_and_is_made_anew(tmp_path, fill):
    uri, path = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlflow.db"
    fill("half", dies=True)
    with pytest.raises(KeyboardInterrupt):
        make_database(uri)
    assert not path.exists()
    fill("whole")
    make_database(uri)
    assert path.read_text() == "whole"
    fill("another")
    make_database(uri)
    assert path.read_text() == "whole"


def test_make_database__other_addresses_are_left_alone(fill):
    fill("never", dies=True)
    make_database("http://127.0.0.1:5000")
    make_database("postgresql://tracking/mlflow")

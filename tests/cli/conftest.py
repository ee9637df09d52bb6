"""The command, called in this process."""

from typing import NamedTuple

import pytest

from flows.cli import main


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def conta(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CONTA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["conta", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Answer(end.value.code, *capsys.readouterr())

    return call

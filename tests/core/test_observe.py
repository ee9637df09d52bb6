"""What a person is told is worth less than their run."""

import sys

import pytest

from wsss_core.observe import ConsoleRecorder


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error")])
def test_console_recorder__a_terminal_that_was_closed_ends_no_run(monkeypatch, error):
    class Closed:
        def write(self, _text):
            raise error

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Closed())
    recorder = ConsoleRecorder()
    recorder.note("hello")
    recorder.progress("photos", 1, 1)
    recorder.scalars("classifier", 0, {"loss": 1.0})


def test_console_recorder__writes(capsys):
    recorder = ConsoleRecorder()
    recorder.note("hello")
    recorder.progress("photos", 2, 2)
    assert capsys.readouterr().err == "hello\n  photos 2/2\n"

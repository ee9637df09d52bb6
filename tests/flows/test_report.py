"""Prefect's page of a round, and what a server that is gone costs: a line in the log."""

from __future__ import annotations

import logging

from httpx import ConnectError

from flows import report, runs


def test_publish_report__a_server_that_is_gone_costs_a_line(monkeypatch, caplog):
    def refuse(text, *, key):
        pages.append((key, text))
        raise ConnectError("All connection attempts failed")

    pages = []
    monkeypatch.setattr(report, "create_markdown_artifact", refuse)
    run = runs.Run(name="toy-1", config={}, data="d", started_ms=0)
    run.start_round(2)
    with caplog.at_level(logging.WARNING, logger="flows.report"):
        report.publish_report(report.write_report(run, run.rounds[-1], None))
    ((key, text),) = pages
    assert key == "round-report"
    assert text.startswith("# toy-1, round 2")
    assert caplog.messages == [
        "no report of toy-1, round 2 on Prefect's page: All connection attempts failed"
    ]

"""The report of a round as Prefect shows it: its scores and its panel."""

from __future__ import annotations

import logging
from pathlib import Path

from httpx import HTTPError
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectException

from flows.patience import ask_once
from flows.pictures import shrink_picture
from flows.runs import TABLE_UNITS, Round, Run, markdown_table

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000  # it lies in Prefect's database


def write_report(run: Run, entry: Round, panel: Path | None) -> str:
    """The report of a round, in Markdown.

    Args:
        run: The run so far; its table shows every round.
        entry: The round that the report is about.
        panel: A picture of it; None keeps photos out.
    """
    parts = [f"# {run.name}, round {entry.round}", TABLE_UNITS, markdown_table(run)]
    if panel is not None:
        parts.append(f"![panel]({shrink_picture(panel, MAX_BYTES)})")
    if run.mlflow_url is not None:
        parts.append(f"[Charts in MLflow]({run.mlflow_url})")
    return "\n\n".join(parts)


def publish_report(report: str) -> None:
    """Add a version of the artifact `round-report`, if the server still answers."""
    try:
        with ask_once():
            create_markdown_artifact(report, key="round-report")
    except (HTTPError, OSError, PrefectException) as error:
        # a page is not worth a run
        title = report.partition("\n")[0].lstrip("# ")
        logger.warning("no report of %s on Prefect's page: %s", title, error)

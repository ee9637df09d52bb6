"""A person between two rounds: looks at one and says how the next goes.

A deployed run is suspended: its process ends, its GPU is free, and Prefect's page shows the round's
report with a form. When that is filled in, the flow runs again from the top and finds all that it
made in the store. A run started by hand asks in its terminal.
"""

from __future__ import annotations

import sys
from typing import Literal

import typer
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from pydantic import Field

from flows.runs import Review, Round, Run, round_table
from wsss_core.config import Auto, Config
from wsss_core.errors import InputError


class ReviewForm(RunInput):
    """The form on Prefect's page."""

    choice: Literal["continue", "stop here"] = "continue"
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        title="seeds.threshold",
        description="Another one from the next round on; leave it empty to keep it.",
    )


class ChangedError(Exception):
    """Another run, with another threshold from a round on, goes on in this one's place."""

    def __init__(self, number: int, threshold: float) -> None:
        super().__init__(f"seeds.threshold {threshold:g} from round {number} on")
        self._change = {number: threshold}

    def settings(self, config: Config) -> Config:
        """The settings of that run."""
        changes = config.threshold_changes | self._change
        return config.model_copy(update={"threshold_changes": dict(sorted(changes.items()))})


def check_reviewer(config: Config) -> None:
    """Make sure, before anything is computed, that there is somebody to ask.

    Raises:
        InputError: If there is neither a form nor a terminal.
    """
    if config.review and deployment.id is None and not _has_terminal():
        raise InputError(
            "review: true asks a person after each round, and this start has no terminal to ask "
            "in; start it from Prefect's page (`conta deploy`), or say --set review=false"
        )


def ask_reviewer(run: Run, entry: Round, report: str, *, threshold: float | Auto) -> Review:
    """What a person says to a round; does not return from a deployed run that has to wait.

    Args:
        run: The run so far.
        entry: The round.
        report: What it made, in Markdown.
        threshold: The present one.
    """
    if deployment.id is None:
        return _ask_in_terminal(run, entry, threshold)
    present = f"The present `seeds.threshold` is {threshold}."
    form = suspend_flow_run(
        wait_for_input=ReviewForm.with_initial_data(description=f"{report}\n\n{present}"),
        # asked anew under a new name: what was answered before lies under the old one
        key=f"{run.name[-8:]}-round-{entry.round}-{entry.review.answers}",
        timeout=None,
    )
    return Review(goes_on=form.choice == "continue", threshold=form.threshold)


def _ask_in_terminal(run: Run, entry: Round, threshold: float | Auto) -> Review:
    typer.echo(f"\n{round_table(run)}\n", err=True)
    drawn = entry.manifests.get("draw_panels")
    if drawn is not None:
        typer.echo(f"panel: store/{drawn.stage}/{drawn.key}/panel.png in the home", err=True)
    question = (
        f"round {entry.round} is done. continue, stop, or another seeds.threshold (now {threshold})"
    )
    try:
        answer: Review = typer.prompt(
            question, default="continue", value_proc=read_answer, err=True
        )
    except typer.Abort:  # Ctrl-C, or the terminal was closed
        raise KeyboardInterrupt from None
    return answer


def read_answer(text: str) -> Review:
    """What was typed: `continue`, `stop`, or a number between 0 and 1.

    Raises:
        typer.BadParameter: If it is none of them; the terminal asks again.
    """
    word = text.strip().lower()
    if word and "continue".startswith(word):
        return Review(goes_on=True)
    if word and "stop".startswith(word):
        return Review()
    try:
        threshold = float(word)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold < 1:
        raise typer.BadParameter(f"{text!r} is neither continue, nor stop, nor between 0 and 1")
    return Review(goes_on=True, threshold=threshold)


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()

"""Where everything of a user lives, and what Prefect and MLflow are told before they are imported.

A variable that the user has set always wins. PREFECT_HOME is never set: it would drop the user's
profile.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wsss_core.errors import StoreError

if TYPE_CHECKING:
    from wsss_core.config import Config

HEARTBEAT_S = 30
"""How often a flow run tells Prefect that it lives; the automation of `conta deploy` listens."""


def resolve_home() -> Path:
    """CONTA_HOME, absolute; `.conta` in the current folder if it is not set."""
    return Path(os.environ.get("CONTA_HOME") or ".conta").absolute()


def open_home() -> Path:
    """The home, if this version can read what is in it.

    Raises:
        StoreError: If another version wrote it in a layout that this one does not know.
    """
    from wsss_core.store import Store

    home = resolve_home()
    if "?" in str(home):
        raise StoreError(f"CONTA_HOME {home} holds a '?', which ends an address of a database")
    Store(home / "store").check_format()
    return home


def describe_environment(home: Path) -> dict[str, str]:
    """The variables under which plain `prefect` and `mlflow` commands see the runs of `home`."""
    return {
        "CONTA_HOME": str(home),
        "DO_NOT_TRACK": "true",  # MLflow understands this word alone
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the other one is pickle
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes and 1 GB for nothing
        "GIT_PYTHON_REFRESH": "quiet",
    }


def set_defaults(home: Path) -> None:
    """Prepare this process and its children; has to come before Prefect or MLflow is imported.

    Raises:
        StoreError: If there is no home and none can be made.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the home {home} cannot be made ({error.strerror}); set CONTA_HOME to another"
        ) from error
    defaults = {
        **describe_environment(home),
        # `conta` speaks for itself
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # a screenful for each event that is lost
        # 6 s a request; by Prefect's own 62 s a run outlives a dead server by minutes
        "PREFECT_CLIENT_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own seven take four minutes
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["CONTA_HOME"] = str(home)


def write_exports(variables: Mapping[str, str]) -> list[str]:
    """Lines of shell that set what this environment does not set already.

    What a person has set wins everywhere, and may hold a password, so it is not repeated.
    """
    return [
        f"export {name}={shlex.quote(value)}"
        for name, value in variables.items()
        if name == "CONTA_HOME" or name not in os.environ
    ]


def locate_data(config: Config) -> Config:
    """The settings with an absolute `data.root`; the folders of seeds and masks are looked for.

    Raises:
        InputError: If there is no such folder, none was given where one is needed, or a setting
            asks for photos where scenes are drawn.
    """
    from wsss_core.errors import InputError

    for group in ("seeds", "expansion"):
        folder = getattr(config, group).folder
        if folder is not None and not folder.is_dir():
            raise InputError(
                f"{group}.folder: no folder at {folder.absolute()}; start from the folder that "
                f"{folder} is in, or give its whole path"
            )
    if config.data.source == "scenes":
        if config.data.limit is not None:
            raise InputError("data.limit is for photos; set data.scenes.photos to draw fewer")
        if config.data.root is not None:
            raise InputError(
                f"source 'scenes' draws its photos, so {config.data.root} would not be looked at; "
                "leave --data (data.root) out, or take recipes/photos.yaml"
            )
        return config
    if config.data.root is None:
        raise InputError(
            f"source {config.data.source!r} needs the folder of its photos; give it with "
            "--data DIR (data.root)"
        )
    root = config.data.root.absolute()
    if not root.is_dir() and not config.data.download:
        raise InputError(f"no folder at {root}; give the one of your photos with --data DIR")
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root})})

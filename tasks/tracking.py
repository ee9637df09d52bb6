"""What MLflow gets to see: manifests, copied so that copying twice changes nothing.

The parent run is the run, with every score at step = round and the panels as step images; a child
run is a round, with its training curves at step = epoch. They are found again by the tags
`conta.run` and `conta.round`; the child's tag `conta.stage_key.<stage>` says which artifact is
copied already. Points carry the time their artifact was finished, or one just after those shown
where an older artifact came back, and MLflow stores equal points once. A tracker that fails costs
one line: the scores are in the manifests, and the next run copies them.

The registry has one model, and the alias `champion` on one of its versions. A version holds a copy
of a round's segmenter, so it outlives its run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
)
from mlflow.entities import Run as MlflowRun
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from wsss_core.config import Config
from wsss_core.errors import ContaError
from wsss_core.records import Manifest

logger = logging.getLogger(__name__)

RUN_TAG, ROUND_TAG, STAGE_TAG = "conta.run", "conta.round", "conta.stage_key"
MODEL, CHAMPION = "segmenter", "champion"
"""Name of the registered model, and the alias that one of its versions bears."""
PICTURES = dict.fromkeys(("draw_panels", "draw_context", "audit", "audit_segmenter"), "*.png")
"""Files of a stage's artifact that become step images."""

_MODEL_CODE = Path(__file__).with_name("serving.py")  # a path: importing it would import torch
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LOCAL_PAGES = "http://127.0.0.1:5000"  # where `conta ui` serves a database of files
_SQLITE = "sqlite:///"
FAULTS = (MlflowException, SQLAlchemyError, OSError)
"""What a database or server that is of no use raises; no run ends by it."""
_BATCH = 100  # parameters that MLflow takes at once; ten times as many points


class Tracker:
    """The parent and child runs of one run.

    Attributes:
        run_id: Of the parent run; empty if MLflow failed.
        url: Its page; empty likewise.
    """

    def __init__(
        self, config: Config, *, name: str, home: Path, note: Callable[[str], None]
    ) -> None:
        self.run_id = ""
        self.url = ""
        self._panels = config.tracking.panels == "all"
        self._name, self._note = name, note
        self._children: dict[int, MlflowRun] = {}
        self._failed = self._no_files = False
        self._try(self._open, config, home)

    def describe(self, config: Config, data: Manifest, tags: Mapping[str, str]) -> None:
        """Copy the settings and the data's digest, once, and set `tags` of the parent."""
        self._try(self._describe, config, data, tags)

    def sync(self, number: int, label: str, manifest: Manifest, folder: Path) -> None:
        """Copy what a stage of a round measured, and its pictures, unless that was done before.

        Args:
            number: The round.
            label: The stage, with its split if it has one.
            manifest: What the stage returned.
            folder: The artifact's files.
        """
        self._try(self._sync, number, label, manifest, folder)

    def close(self, status: str) -> None:
        """End parent and children as `finished`, `stopped` or `failed`."""
        if not self._failed:
            self._try(self._close, STATUS[status])
        elif self.run_id:  # once more and in silence, lest a finished run stays at Running
            with contextlib.suppress(*FAULTS):
                self._close(STATUS[status])

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            call(*args)
        except FAULTS as error:
            self._failed = True
            reason = str(error).partition("\n")[0]
            self._note(f"MLflow failed ({reason}); the run goes on, and its next start catches up")

    def _file(self, call: Callable[..., None], *args: Any) -> None:
        """Scores are worth having where a folder takes no files, as after a home was moved."""
        if self._no_files:
            return
        try:
            call(*args)
        except OSError as error:
            self._no_files = True
            self._note(f"MLflow has the scores of this run and not its pictures ({error})")

    def _open(self, config: Config, home: Path) -> None:
        # in a worker; MLflow's default is its current folder
        if not mlflow.is_tracking_uri_set():  # type: ignore[no-untyped-call]
            mlflow.set_tracking_uri(f"{_SQLITE}{home / 'mlflow.db'}")
        make_database(mlflow.get_tracking_uri())
        self._client = mlflow.MlflowClient()
        experiment = self._find_experiment(config.name, home)
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{self._name}'")
        parent = next((run for run in found if ROUND_TAG not in run.data.tags), None)
        if parent is None:
            parent = self._client.create_run(
                experiment, run_name=self._name, tags={RUN_TAG: self._name}
            )
        self.run_id = parent.info.run_id
        self._client.update_run(self.run_id, status="RUNNING")
        self._children = {  # those of a parent that somebody deleted are not ours
            int(run.data.tags[ROUND_TAG]): run
            for run in found
            if ROUND_TAG in run.data.tags and run.data.tags.get(MLFLOW_PARENT_RUN_ID) == self.run_id
        }
        uri = mlflow.get_tracking_uri()
        # a worker may know the server by a name that means nothing to a browser
        pages = os.environ.get("CONTA_MLFLOW_PAGES")
        base = pages or (uri if uri.startswith("http") else _LOCAL_PAGES)
        self.url = f"{base.rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"

    def _find_experiment(self, name: str, home: Path) -> str:
        local = not mlflow.get_tracking_uri().startswith("http")
        found = self._client.get_experiment_by_name(name)
        folder = home / "mlartifacts" / name
        if found is None:
            place = folder.as_uri() if local else None
            try:
                return str(self._client.create_experiment(name, artifact_location=place))
            except MlflowException:  # another run has just made it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if local and _is_elsewhere(found.artifact_location, folder):
            self._note(
                f"MLflow keeps pictures and models of experiment {name} where it was made, "
                f"{found.artifact_location}; move the home back there, or rename the recipe"
            )
        return str(found.experiment_id)

    def _describe(self, config: Config, data: Manifest, tags: Mapping[str, str]) -> None:
        tree = config.model_dump(mode="json")
        text = yaml.safe_dump(tree, sort_keys=False)
        self._file(self._client.log_text, self.run_id, text, "config.yaml")
        # these may differ between two starts of a run, and MLflow lets no parameter change
        for name in ("rounds", "runtime", "tracking", "review"):
            tree.pop(name)
        for group, name in (
            ("data", "root"),
            ("data", "download"),
            ("evaluation", "stop_stability"),
        ):
            tree[group].pop(name)
        params = [Param(name, str(value)[:500]) for name, value in _leaves(tree)]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + _BATCH])
        source = f'{{"root": "{config.data.root or "scenes"}"}}'
        dataset = Dataset(config.name, data.digest, "local", source)
        context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, context)])
        self._client.log_batch(self.run_id, tags=[RunTag(*item) for item in tags.items()])

    def _sync(self, number: int, label: str, manifest: Manifest, folder: Path) -> None:
        child, tag = self._child(number), f"{STAGE_TAG}.{label}"
        if child.data.tags.get(tag) == manifest.key:
            return
        at = manifest.finished_ms
        if tag in child.data.tags:  # MLflow shows the latest, and an older one may have come back
            shown = self._client.get_metric_history(self.run_id, _clean(f"seconds/{label}"))
            last = max((point.timestamp for point in shown if point.step == number), default=at)
            at = at if at >= last else last + 1
        scores = {**manifest.metrics, f"seconds/{label}": manifest.seconds}
        points = [Metric(_clean(name), value, at, number) for name, value in scores.items()]
        self._log_points(self.run_id, points)
        curves = [
            Metric(_clean(f"{manifest.stage}/{name}"), value, at, int(entry["epoch"]))
            for entry in manifest.history
            for name, value in entry.items()
            if name != "epoch"
        ]
        self._log_points(child.info.run_id, curves)
        if self._panels and manifest.stage in PICTURES:
            for picture in sorted(folder.glob(PICTURES[manifest.stage])):
                self._file(self._show, picture, number, at)
        if manifest.stage in PICTURES and (self._no_files or not self._panels):
            return  # a later start tries again, or asks for them
        self._client.set_tag(child.info.run_id, tag, manifest.key)
        child.data.tags[tag] = manifest.key

    def _log_points(self, run_id: str, points: Sequence[Metric]) -> None:
        for start in range(0, len(points), 10 * _BATCH):
            self._client.log_batch(run_id, metrics=points[start : start + 10 * _BATCH])

    def _child(self, number: int) -> MlflowRun:
        if number not in self._children:
            tags = {
                RUN_TAG: self._name,
                ROUND_TAG: str(number),
                MLFLOW_PARENT_RUN_ID: self.run_id,
            }
            experiment = self._client.get_run(self.run_id).info.experiment_id
            self._children[number] = self._client.create_run(
                experiment, run_name=f"{self._name} round {number}", tags=tags
            )
        return self._children[number]

    def _show(self, picture: Path, number: int, at: int) -> None:
        # MLflow names the file itself; releases differ in the separator
        step = rf"step[+%]{number}[+%]timestamp[+%]{at}[+%]"
        same = re.compile(rf"images/{re.escape(picture.stem)}[+%]{step}")
        if any(
            same.match(file.path) for file in self._client.list_artifacts(self.run_id, "images")
        ):
            return  # a run that died after this picture and before its tag
        with Image.open(picture) as image:
            self._client.log_image(
                self.run_id,
                image.convert("RGB"),
                key=picture.stem,
                step=number,
                timestamp=at,
                synchronous=True,
            )

    def _close(self, status: str) -> None:
        for run_id in [*(run.info.run_id for run in self._children.values()), self.run_id]:
            self._client.set_terminated(run_id, status)


@dataclass(frozen=True)
class Candidate:
    """A round's segmenter that shall be champion.

    Attributes:
        run: Name of the run.
        round: Number of the round.
        mlflow_run: Id of the parent run.
        segmenter: Its manifest.
        scores: Manifests of what measured it.
        dataset: Name and content digest of the data it was trained on.
        reason: Why this round, one line.
    """

    run: str
    round: int
    mlflow_run: str
    segmenter: Manifest
    scores: Sequence[Manifest]
    dataset: tuple[str, str]
    reason: str

    def tags(self) -> dict[str, str]:
        """What its version is found by."""
        return {
            RUN_TAG: self.run,
            ROUND_TAG: str(self.round),
            "conta.segmenter": self.segmenter.digest,
            "conta.data": self.dataset[1],
        }


@dataclass(frozen=True)
class Champion:
    """The model that bears the alias.

    Attributes:
        version: Of the registered model.
        run: Name of the run it is from.
        round: Number of the round.
        folder: A copy of its files, as `wsss_core.stages.package` wrote them.
    """

    version: str
    run: str
    round: str
    folder: Path


def promote(candidate: Candidate, write: Callable[[Path], None]) -> str:
    """Give the alias `champion` to a candidate, and register it if that was not done before.

    Args:
        candidate: The round's segmenter.
        write: Fills an empty folder with its files; may not be called.

    Returns:
        Its version.

    Raises:
        ContaError: If MLflow fails.
    """
    try:
        make_database(mlflow.get_tracking_uri())
        client = mlflow.MlflowClient()
        version = _find_version(client, candidate) or _register(client, candidate, write)
        client.set_registered_model_alias(MODEL, CHAMPION, version)
    except FAULTS as error:
        reason = str(error).partition("\n")[0]
        raise ContaError(
            f"MLflow failed ({reason}), so nothing was promoted; see conta doctor"
        ) from (error)
    return version


def fetch_champion(into: Path) -> Champion | None:
    """Copy the champion's files below `into`; None if there is no champion.

    Raises:
        ContaError: If MLflow fails.
    """
    try:
        make_database(mlflow.get_tracking_uri())
        client = mlflow.MlflowClient()
        known = client.search_registered_models(f"name = '{MODEL}'")
        if not known or CHAMPION not in known[0].aliases:
            return None
        version = client.get_model_version_by_alias(MODEL, CHAMPION)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source, dst_path=str(into)
        )
    except FAULTS as error:
        reason = str(error).partition("\n")[0]
        raise ContaError(f"MLflow cannot give the champion ({reason}); see conta doctor") from error
    run, number = version.tags[RUN_TAG], version.tags[ROUND_TAG]
    return Champion(str(version.version), run, number, Path(folder) / "artifacts" / MODEL)


def _find_version(client: mlflow.MlflowClient, candidate: Candidate) -> str | None:
    asked = candidate.tags().items()
    for version in client.search_model_versions(f"name = '{MODEL}'"):
        if asked <= version.tags.items() and _has_files(client, version):
            return str(version.version)
    return None


def _has_files(client: mlflow.MlflowClient, version: ModelVersion) -> bool:
    """Whether a version's files are where its record says: a restored backup may be without."""
    with contextlib.suppress(*FAULTS):
        model = client.get_logged_model(str(version.source).removeprefix("models:/"))
        place = model.artifact_location
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=f"{place}/artifacts/{MODEL}"))
    return False


def _register(
    client: mlflow.MlflowClient, candidate: Candidate, write: Callable[[Path], None]
) -> str:
    """Log the model to the parent run, with its metrics on its data, and make a version of it."""
    experiment = client.get_run(candidate.mlflow_run).info.experiment_id
    logged = client.create_logged_model(
        experiment,
        name=f"{candidate.run}-round-{candidate.round}",
        source_run_id=candidate.mlflow_run,
        tags=candidate.tags(),
        model_type=MODEL,
    )
    try:
        _log_files(client, candidate, logged, write)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(candidate.mlflow_run, [LoggedModelOutput(logged.model_id, candidate.round)])
    points = [
        Metric(
            _clean(name),
            value,
            made.finished_ms,  # as the tracker copied it: the run keeps one point
            candidate.round,
            logged.model_id,
            *candidate.dataset,
            candidate.mlflow_run,
        )
        for made in candidate.scores
        for name, value in made.metrics.items()
    ]
    for start in range(0, len(points), 10 * _BATCH):
        client.log_batch(candidate.mlflow_run, metrics=points[start : start + 10 * _BATCH])
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    version = client.create_model_version(
        MODEL,
        f"models:/{logged.model_id}",
        run_id=candidate.mlflow_run,
        tags=candidate.tags(),
        description=candidate.reason,
        model_id=logged.model_id,
    )
    return str(version.version)


def _log_files(
    client: mlflow.MlflowClient,
    candidate: Candidate,
    logged: LoggedModel,
    write: Callable[[Path], None],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        package, model = Path(folder) / MODEL, Path(folder) / "model"
        package.mkdir()
        write(package)
        mlflow.pyfunc.save_model(
            path=str(model),
            python_model=str(_MODEL_CODE),
            artifacts={MODEL: str(package)},
            # without any MLflow starts a process to guess them
            pip_requirements=[f"{n}=={v}" for n, v in candidate.segmenter.versions.items()],
            mlflow_model=Model(run_id=candidate.mlflow_run, model_id=logged.model_id),
        )
        client.log_model_artifacts(logged.model_id, str(model))


def keep_page(run_ids: Sequence[str], page: Path) -> str | None:
    """Keep a page with parent runs, below `compare/`; returns what went wrong, if anything did."""
    problem = None
    for run_id in run_ids:
        try:
            make_database(mlflow.get_tracking_uri())
            mlflow.MlflowClient().log_artifact(run_id, str(page), "compare")
        except FAULTS as error:  # somebody may have deleted this one
            problem = str(error).partition("\n")[0]
    return problem


def close_dead(experiment: str, name: str, ended_ms: int) -> bool:
    """End the MLflow runs of a run whose process is gone, as failed.

    Args:
        experiment: Name of the experiment.
        name: Name of the run.
        ended_ms: When it was last seen alive, ms since 1970.

    Returns:
        Whether MLflow could be told; what it does not know needs no telling.
    """
    try:
        make_database(mlflow.get_tracking_uri())
        client = mlflow.MlflowClient()
        known = client.get_experiment_by_name(experiment)
        if known is None:
            return True
        chosen = f"tags.`{RUN_TAG}` = '{name}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([known.experiment_id], chosen):
            client.set_terminated(run.info.run_id, STATUS["failed"], end_time=ended_ms)
    except FAULTS as error:
        logger.warning("run %s died, and MLflow could not be told: %s", name, error)
        return False
    return True


def make_database(uri: str) -> None:
    """Make a local database whole, if it is not there; any other address is left alone.

    MLflow fills a new one by some hundred statements without a transaction, for seconds. What a
    process that dies among them leaves behind, no MLflow opens again.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    unfinished = path.with_name(f".{path.name}.new")
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished.unlink(missing_ok=True)
            mlflow.MlflowClient(f"{_SQLITE}{unfinished}").search_experiments(max_results=1)
            unfinished.rename(path)


def _is_elsewhere(location: str, folder: Path) -> bool:
    """Whether a local address names another folder."""
    address = urllib.parse.urlparse(location)
    if address.scheme not in ("", "file"):
        return False
    place = Path(urllib.request.url2pathname(address.path))
    same = place.exists() and folder.exists() and place.samefile(folder)  # by a link, say
    return place != folder and not same


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _clean(name: str) -> str:
    """A name that MLflow takes for a metric; class names may hold anything."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")  # each a folder's name to MLflow
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)

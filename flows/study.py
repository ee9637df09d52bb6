"""Studies: arms against one control over seeds, and one JSON a finished cell.

A cell is one arm under one seed. Its file is small and meant to be committed: the settings it was
made with, the scores of its rounds, and bootstrap draws of its end point. The tables need nothing
else, so anybody can make them again without the store.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from flows.runs import MAIN_STAGES
from wsss_core.config import Config, explain_faults, load_recipe, parse_config
from wsss_core.errors import DataError, SettingsError, StoreError
from wsss_core.store import write_atomically

_SCORES = {
    r"classifier/(map|f1|f1_micro)": "score_classifier",
    r"cam/(miou|miou_core|miou_oracle)": "score_cams",
    r"pseudo/(miou|miou_core)": "score_masks",
    r"seg_([^/]+)/(?:miou|miou_core)": r"score_segmenter/\1",
    r"audit/(leak|gap|object|part|stuff|stuff_untied)_(cam|pseudo)": "audit",
    r"audit/(leak|gap|object|part|stuff|stuff_untied)_seg": "audit_segmenter/train",
    r"audit_([^/]+)/(?:leak|gap|object|part|stuff|stuff_untied)_seg": r"audit_segmenter/\1",
    r"audit/blur_(own|company)": "audit_blur",
    r"tag_agreement(/precision|/recall)?|stability": "check_tags",
}
"""Names of scores, and the stage that each is of, with its split."""
_NO_SCORES = re.compile(  # what the same groups hold beside; names of other groups are free
    r"cam/threshold_oracle|classifier/(loss|skipped)|(?!(cam|pseudo|classifier)/|seg_|audit)[^/]+(/\w+)?"
)
ArmName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_+.-]{0,40}$")]


class Check(BaseModel):
    """What the cells have to show before the study may be believed.

    Attributes:
        what: In words.
        of: Arm and metric: the mean over seeds, in the last round.
        less: What is taken off, likewise.
        over: What it is divided by, likewise.
        over_less: What is taken off that, likewise.
        low: Least value that holds; scores are shares of 1.
        high: Largest value that holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    of: tuple[str, str]
    less: tuple[str, str] | None = None
    over: tuple[str, str] | None = None
    over_less: tuple[str, str] | None = None
    low: float | None = None
    high: float | None = None

    def places(self) -> tuple[tuple[str, str] | None, ...]:
        """`of`, `less`, `over` and `over_less`."""
        return self.of, self.less, self.over, self.over_less


class Study(BaseModel):
    """What a study file says.

    Attributes:
        name: Folder of its cells, and their experiment in MLflow.
        recipe: What every arm starts from; in the file relative to its folder.
        seeds: One cell of every arm each.
        seeded: Settings that take the seed's value.
        rounds: Rounds after round 0; the last one is compared.
        until: Stop in the last round after this stage; None goes to its end.
        settings: What every arm changes in the recipe, dotted names.
        arms: What each arm changes beyond that.
        against: The arm that the others are compared with.
        endpoint: The one metric that the study was planned for.
        metrics: Further columns.
        checks: What has to hold, in a table of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    recipe: Path
    seeds: tuple[int, ...]
    seeded: tuple[str, ...] = ("seed",)
    rounds: int = Field(1, ge=0, le=20)
    until: str | None = None
    settings: dict[str, Any] = {}
    arms: dict[ArmName, dict[str, Any]] = Field(min_length=1)
    against: str
    endpoint: str = "pseudo/miou"
    metrics: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @model_validator(mode="after")
    def _arms_and_seeds_are_told_apart(self) -> Study:
        if not self.seeds or not self.seeded:
            raise ValueError("seeds and seeded: each needs one at least")
        for arm, changes in {"settings": self.settings, **self.arms}.items():
            for name in changes.keys() & self.seeded:
                raise ValueError(f"{arm}: {name} is what the seeds change; remove it there")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice, it would count twice")
        if self.against not in self.arms:
            raise ValueError(f"against: {self.against!r} is no arm; there are {list(self.arms)}")
        return self

    @model_validator(mode="after")
    def _comes_to_its_endpoint(self) -> Study:
        if self.until is not None and self.until not in MAIN_STAGES:
            raise ValueError(f"until: no stage {self.until!r}; there are {list(MAIN_STAGES)}")
        if stage_of_score(self.endpoint) is None:
            raise ValueError(
                f"endpoint: {self.endpoint!r} is no score; some are pseudo/miou, cam/miou_oracle, "
                "classifier/map, seg_val/miou and audit/leak_cam"
            )
        return self

    @model_validator(mode="after")
    def _checks_and_metrics_exist(self) -> Study:
        places = [place for check in self.checks for place in check.places() if place is not None]
        for arm, _ in places:
            if arm not in self.arms:
                raise ValueError(f"checks: {arm!r} is no arm; there are {list(self.arms)}")
        for name in (*self.metrics, *(name for _, name in places)):
            if stage_of_score(name) is None and not _NO_SCORES.fullmatch(name):
                raise ValueError(
                    f"metrics or checks: no cell has {name!r}; names are those of conta compare "
                    "--json, without single classes"
                )
        return self

    def config(self, arm: str, seed: int, *, data: Path | None = None) -> Config:
        """The settings of a cell.

        Args:
            arm: Name of the arm.
            seed: Value of every setting in `seeded`.
            data: Folder of the photos, where the recipe needs one.

        Raises:
            SettingsError: For an unknown name or a value out of range.
        """
        changes = {"name": self.name, "rounds": self.rounds, **self.settings, **self.arms[arm]}
        changes |= dict.fromkeys(self.seeded, seed)
        if data is not None:
            changes["data.root"] = str(data)
        texts = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        try:
            return load_recipe(self.recipe, texts)
        except SettingsError as error:
            raise SettingsError(f"arm {arm!r} of study {self.name}: {error}") from None

    @property
    def stop(self) -> str | None:
        """Where the flow stops, as its `until`."""
        return None if self.until is None else f"{self.until}:{self.rounds}"


class Cell(BaseModel):
    """What one arm gave under one seed.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        stop: Where the study asked it to stop.
        config: The resolved settings.
        data: Content digest of the data.
        rounds: Flat metrics of each round, those of single classes left out.
        endpoint: The study's, which `bootstrap` is of; empty in cells of 0.1.0.
        bootstrap: The end point of the last round under draws of photos; empty if the artifacts
            hold no counts of single photos.
        artifacts: Content digest of what each stage of the last round made.
        code: Hash of the code behind each stage; cells of 0.1.0 say nothing of it.
        versions: Of the libraries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int
    stop: str | None
    config: dict[str, Any]
    data: str
    rounds: list[dict[str, float]] = Field(min_length=1)
    endpoint: str = ""
    bootstrap: list[float] = []
    artifacts: dict[str, str] = {}
    code: dict[str, str] = {}
    versions: dict[str, str] = {}


Cells = Mapping[tuple[str, int], Cell]
"""Cells by arm and seed."""


def stage_of_score(name: str) -> str | None:
    """The stage that a score is of, as `stage` or `stage/split`; None if it is no score."""
    for pattern, stage in _SCORES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(stage)
    return None


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        SettingsError: For a missing file, broken YAML or a fault in it or in an arm; one line.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(
            f"no study at {path}; those that ship are in recipes/studies/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fault = " ".join(str(error).split())
        raise SettingsError(f"{path} cannot be read as YAML: {fault}") from None
    if isinstance(tree, dict) and "arms" not in tree and "against" not in tree:
        raise SettingsError(f"{path} has no arms, so it is no study; a recipe: conta run {path}")
    if not isinstance(tree, dict):
        raise SettingsError(f"{path} has no settings; it has to begin with lines like name: mine")
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        faults = explain_faults(error.errors(), Study)
        raise SettingsError(f"{path}: {'; '.join(faults)}") from None
    study = study.model_copy(update={"recipe": path.parent / study.recipe})
    for arm in study.arms:  # a typo in the last arm is said before the first one is computed
        refusal = _refuse(study, study.config(arm, study.seeds[0]))
        if refusal is not None:
            raise SettingsError(f"arm {arm!r} of study {study.name}: {refusal}")
    _refuse_copies(study)
    return study


def _refuse(study: Study, config: Config) -> str | None:
    """Why a run of these settings would not come to what the study compares."""
    if config.supervision == "truth" and study.rounds:
        return "the fully supervised twin has one round; set rounds: 0"
    if config.rounds != study.rounds:
        return f"rounds {config.rounds}: the study has {study.rounds}; remove it here"
    if config.evaluation.stop_stability is not None:
        return "evaluation.stop_stability may end it before the last round; set it to null"
    late = [number for number in config.threshold_changes if number > study.rounds]
    if late:
        return f"threshold_changes: there is no round {late[0]}; the study has {study.rounds}"
    return None


def _refuse_copies(study: Study) -> None:
    """Two cells of the same settings are one training, and would count as two."""
    first: dict[str, str] = {}
    for seed in study.seeds:
        for arm in study.arms:
            name = f"arm {arm!r}, seed {seed}"
            other = first.setdefault(study.config(arm, seed).digest(), name)
            if other != name:
                raise SettingsError(
                    f"study {study.name}: {other} and {name} have the same settings; change an "
                    "arm, or name in `seeded` what the seeds should change"
                )


def cell_path(folder: Path, arm: str, seed: int) -> Path:
    """The file of a cell."""
    return folder / f"{arm}-{seed}.json"


def write_cell(folder: Path, cell: Cell) -> None:
    """Keep a finished cell; a reader never sees half of it.

    Raises:
        StoreError: If it cannot be written.
    """
    text = json.dumps(cell.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_text(cell_path(folder, cell.arm, cell.seed), text)


def check_folder(study: Study, folder: Path) -> None:
    """Look whether the cells that are missing can be kept, before the first is computed.

    Raises:
        StoreError: If nothing can be written there.
        DataError: If a cell of other settings is in the place of one that is missing.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # no folder is made for a study that is refused
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror}); give another folder by --out"
        ) from error
    refuse_strangers(study, folder, find_cells(study, folder))


def refuse_strangers(study: Study, folder: Path, cells: Cells) -> None:
    """Say so where a cell of other settings is in the place of one that is missing.

    Raises:
        DataError: Naming the first.
    """
    paths = [cell_path(folder, arm, seed) for arm, seed in list_missing(study, cells)]
    strangers = [path for path in paths if path.exists()]
    if strangers:
        raise DataError(
            f"{len(strangers)} of the cells in {folder} have other settings or rounds than "
            f"{study.name} asks for, the first is {strangers[0].name}; give the study another "
            "name, or remove them"
        )


def find_cells(study: Study, folder: Path) -> dict[tuple[str, int], Cell]:
    """The cells of a study that are there and were made with the settings it asks for today.

    A setting that did not exist when a cell was made counts as its default.

    Raises:
        DataError: For a broken cell, or two that ask for the same data and were made of different.
    """
    found: dict[tuple[str, int], Cell] = {}
    for arm in study.arms:
        for seed in study.seeds:
            path = cell_path(folder, arm, seed)
            cell = _read_cell(path)
            if cell is None or not _answers(cell, study, arm, seed):
                continue
            other = find_other_data(found, parse_config(cell.config), cell.data)
            if other is not None:
                raise DataError(
                    f"{path} and {cell_path(folder, *other)} were made of different data, so they "
                    "do not compare; remove the one of the data you do not mean and run the study "
                    "again"
                )
            found[arm, seed] = cell
    return found


def find_other_data(cells: Cells, config: Config, digest: str) -> tuple[str, int] | None:
    """Arm and seed of a cell of the same data settings that was made of other data.

    Args:
        cells: Those that are there.
        config: Settings of a further one.
        digest: Of its data.
    """
    asked = config.data.model_dump_json(exclude={"root"})
    for place, cell in cells.items():
        if cell.data == digest:
            continue
        if parse_config(cell.config).data.model_dump_json(exclude={"root"}) == asked:
            return place
    return None


def list_missing(study: Study, cells: Cells) -> list[tuple[str, int]]:
    """Arm and seed of what is not done; seed by seed, so that arms find what they share."""
    return [(arm, seed) for seed in study.seeds for arm in study.arms if (arm, seed) not in cells]


def _read_cell(path: Path) -> Cell | None:
    try:
        return Cell.model_validate_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        raise DataError(f"{path} is no cell of a study; remove it, or take it from git") from None


def _answers(cell: Cell, study: Study, arm: str, seed: int) -> bool:
    try:
        made_with = parse_config(cell.config)
    except SettingsError:  # a setting of then does not exist any more
        return False
    asked = study.config(arm, seed)
    return (cell.stop, made_with.rounds, len(cell.rounds) - 1, made_with.digest()) == (
        study.stop,
        asked.rounds,
        study.rounds,
        asked.digest(),
    )


def write_text(path: Path, text: str) -> None:
    """Replace a file of a study.

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}); make room or set its permissions, and "
            "run the study again: what was computed is kept"
        ) from error

"""Studies: what a file may say, which cells are missing, and tables counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows import cli, study, study_tables
from tests.flows import toys as toy_stages
from wsss_core.config import load_recipe
from wsss_core.errors import DataError, SettingsError, StoreError

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "docs" / "studies"
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))

TREE = {
    "name": "toy",
    "recipe": "toy.yaml",
    "seeds": [0, 1],
    "rounds": 1,
    "arms": {"none": {"causal.context": "none"}, "conta": {}},
    "against": "none",
    "metrics": ["cam/miou", "context/cosine"],
}


@pytest.fixture
def place(tmp_path):
    """Writes the study file; returns its path."""
    (tmp_path / "toy.yaml").write_text("name: recipe\nsegmenter: {class_balanced: true}\n")

    def write(**changes):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def write_cells(asked, folder, scores, *, draws=None):
    """Cells with a given end point: {arm: [score of each seed]}."""
    for arm, values in scores.items():
        for seed, value in zip(asked.seeds, values, strict=True):
            rounds = [
                {"pseudo/miou": 0.25, "cam/miou": 0.2},
                {"pseudo/miou": value, "cam/miou": value / 2},
            ]
            if arm != "none":
                rounds[1]["context/cosine"] = 0.48765
            config = asked.config(arm, seed).model_dump(mode="json")
            cell = study.Cell(
                arm=arm,
                seed=seed,
                stop=asked.stop,
                config=config,
                data="d",
                rounds=rounds,
                endpoint=asked.endpoint,
                bootstrap=[value + draw for draw in (draws or {}).get(arm, ())],
            )
            study.write_cell(folder, cell)


def test_load_study__arms_are_settings_of_the_recipe(place):
    asked = study.load_study(place(settings={"data.scenes.confounding": 0.5}, until="masks"))
    config = asked.config("none", 7)
    assert (config.name, config.seed, config.rounds) == ("toy", 7, 1)
    assert (config.causal.context, config.data.scenes.confounding) == ("none", 0.5)
    assert config.segmenter.class_balanced
    assert config.data.scenes.seed == 0
    assert asked.stop == "masks:1"
    seeded = study.load_study(place(seeded=["seed", "data.scenes.seed"]))
    assert seeded.config("conta", 7).data.scenes.seed == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "x"}, r"study\.yaml: against: 'x' is no arm; there are \['none', 'conta'\]"),
        ({"until": "x"}, r"until: no stage 'x'; there are \['classifier', "),
        ({"seeds": []}, r"study\.yaml: seeds and seeded: each needs one at least"),
        ({"seeds": ["a"]}, r"study\.yaml: seeds\.0: should be a valid integer.*, not 'a'$"),
        (
            {"arms": {"none": None}},
            r"arms\.none: should be a valid dictionary, not None",
        ),
        ({"seeds": [1, 0, 1]}, r"study\.yaml: seeds: \[1, 0, 1\] names one twice"),
        ({"arm": {}}, r"study\.yaml: unknown setting 'arm' \(did you mean 'arms'\?\)"),
        (
            {"checks": [{"what": "w", "of": ["none", "cam/miou"], "lo": 0}]},
            r"unknown setting 'checks\.0\.lo' \(did you mean 'checks\.0\.low'\?\)",
        ),
        (
            {"metrics": ["calibrate_seeds/threshold", "cam/miuo"]},
            r"metrics or checks: no cell has 'cam/miuo'; names are ",
        ),
        (
            {"checks": [{"what": "w", "of": ["none", "pseudo/mio"]}]},
            r"metrics or checks: no cell has 'pseudo/mio'",
        ),
        (
            {"arms": {"none": {}, "other": {"seed": 7}}},
            r"study\.yaml: other: seed is what the seeds change; remove it there",
        ),
        (
            {"arms": {"none": {}, "late": {"threshold_changes": {2: 0.2}}}},
            r"^arm 'late' of study toy: threshold_changes: there is no round 2; the study has 1",
        ),
        ({"arms": {"A b": {}}}, r"arms\.A b.*should match pattern"),
        ({"checks": [{"what": "w", "of": ["x", "cam/miou"]}]}, r"checks: 'x' is no arm"),
        ({"endpoint": "pseudo/mIoU"}, r"endpoint: 'pseudo/mIoU' is no score; some are pseudo/miou"),
        ({"endpoint": "seconds"}, r"endpoint: 'seconds' is no score"),
        ({"seeded": []}, r"seeds and seeded: each needs one at least"),
        (
            {"arms": {"none": {"causal.context": "none"}, "other": {"rounds": 2}}},
            r"^arm 'other' of study toy: rounds 2: the study has 1; remove it here",
        ),
        (
            {"settings": {"evaluation.stop_stability": 0.9}},
            r"^arm 'none' of study toy: evaluation.stop_stability may end it before",
        ),
        (
            {"arms": {"none": {}, "same": {"causal.context": "conta"}}},
            r"arm 'none', seed 0 and arm 'same', seed 0 have the same settings",
        ),
        (
            {"seeded": ["runtime.threads"], "seeds": [1, 2]},
            r"arm 'none', seed 1 and arm 'none', seed 2 have the same settings",
        ),
    ],
)
def test_load_study__faults_are_one_line(place, changes, message):
    with pytest.raises(SettingsError, match=message) as caught:
        study.load_study(place(**changes))
    assert "\n" not in str(caught.value)


def test_load_study__no_file_and_no_such_setting(place, tmp_path):
    with pytest.raises(SettingsError, match=r"no study at .*recipes/studies/"):
        study.load_study(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match=r"has no arms, .*: conta run .*scenes\.yaml$"):
        study.load_study(ROOT / "recipes" / "scenes.yaml")
    with pytest.raises(SettingsError, match=r"is a study of several runs; start it by: conta st"):
        load_recipe(ROOT / "recipes" / "studies" / "scenes_claim.yaml")
    arms = TREE["arms"] | {"last": {"causal.contxt": "none"}}
    with pytest.raises(SettingsError, match=r"^arm 'last' of study toy: unknown setting"):
        study.load_study(place(arms=arms))
    with pytest.raises(SettingsError, match=r"^arm 'twin' of .* has one round; set rounds: 0$"):
        study.load_study(place(arms=TREE["arms"] | {"twin": {"supervision": "truth"}}))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies__those_that_ship_name_settings_that_exist(path):
    asked = study.load_study(path)
    assert asked.name == path.stem
    keys = {asked.config(arm, asked.seeds[0]).digest() for arm in asked.arms}
    assert len(keys) == len(asked.arms)


def test_findings__every_table_is_quoted_from_a_study_or_says_that_it_is_not():
    lines = (ROOT / "docs" / "findings.md").read_text().splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("|") and lines[n - 1][:1] != "|"]
    marks = [lines[n - 1] for n in heads]
    ran = {f"<!-- table {path.stem} -->" for path in STUDIES if (CELLS / path.stem).is_dir()}
    assert set(marks) <= ran | {"<!-- no cells: by a script -->"}
    assert [line for line in lines if "<!--" in line] == marks  # a mark elsewhere checks nothing


def test_find_cells__those_made_with_these_settings(place, tmp_path):
    asked = study.load_study(place())
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.4]})
    assert not study.list_missing(asked, study.find_cells(asked, tmp_path))
    changed = study.load_study(place(arms=TREE["arms"] | {"conta": {"causal.prior": "frequency"}}))
    missing = study.list_missing(changed, study.find_cells(changed, tmp_path))
    assert missing == [("conta", 0), ("conta", 1)]
    more = study.load_study(place(seeds=[1, 2]))
    missing = study.list_missing(more, study.find_cells(more, tmp_path))
    assert missing == [("none", 2), ("conta", 2)]
    for change in ({"until": "masks"}, {"rounds": 2}):
        other = study.load_study(place(**change))
        assert len(study.list_missing(other, study.find_cells(other, tmp_path))) == 4


def test_find_cells__settings_of_before_and_after(place, tmp_path):
    """One that came later counts as its default; one that went makes the cell another's."""
    asked = study.load_study(place(seeds=[0]))
    write_cells(asked, tmp_path, {"none": [0.2], "conta": [0.3]})
    path = study.cell_path(tmp_path, "conta", 0)
    document = json.loads(path.read_text())
    del document["config"]["causal"]["exact_samples"]
    path.write_text(json.dumps(document))
    assert ("conta", 0) in study.find_cells(asked, tmp_path)
    document["config"]["causal"]["gone"] = 1
    path.write_text(json.dumps(document))
    assert ("conta", 0) not in study.find_cells(asked, tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"conta-0\.json is no cell of a study"):
        study.find_cells(asked, tmp_path)


def test_find_cells__of_different_data_are_no_pair(place, tmp_path):
    asked = study.load_study(place(seeds=[0]))
    write_cells(asked, tmp_path, {"none": [0.2], "conta": [0.3]})
    path = study.cell_path(tmp_path, "conta", 0)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"data": "other"}))
    with pytest.raises(DataError, match=r"conta-0\.json and .*none-0\.json were made of different"):
        study.find_cells(asked, tmp_path)
    document["config"]["data"]["scenes"]["confounding"] = 0.5  # not asked for: none of its cells
    path.write_text(json.dumps(document | {"data": "other"}))
    assert study.list_missing(asked, study.find_cells(asked, tmp_path)) == [("conta", 0)]


def test_find_cells__the_data_of_cells_from_before_a_setting_was_there(place, tmp_path):
    asked = study.load_study(place(seeds=[0]))
    write_cells(asked, tmp_path, {"none": [0.2], "conta": [0.3]})
    path = study.cell_path(tmp_path, "conta", 0)
    document = json.loads(path.read_text())
    del document["config"]["data"]["long_side_px"]
    path.write_text(json.dumps(document))
    assert ("conta", 0) in study.find_cells(asked, tmp_path)
    path.write_text(json.dumps(document | {"data": "other"}))
    with pytest.raises(DataError, match=r"conta-0\.json and .*none-0\.json were made of different"):
        study.find_cells(asked, tmp_path)


def test_find_cells__one_that_ends_too_early_is_missing(place, tmp_path):
    asked = study.load_study(place(seeds=[0]))
    write_cells(asked, tmp_path, {"none": [0.2], "conta": [0.3]})
    path = study.cell_path(tmp_path, "conta", 0)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"rounds": document["rounds"][:1]}))
    assert study.list_missing(asked, study.find_cells(asked, tmp_path)) == [("conta", 0)]
    path.write_text(json.dumps(document | {"rounds": []}))
    with pytest.raises(DataError, match=r"conta-0\.json is no cell of a study"):
        study.find_cells(asked, tmp_path)


def test_build_tables__says_where_the_code_of_a_stage_changed(place, tmp_path):
    asked = study.load_study(place(metrics=[]))
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})

    def stamp(arm, seed, **code):
        path = study.cell_path(tmp_path, arm, seed)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": code}))
        (endpoint,) = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
        return endpoint.splitlines()[-1].partition(" | 2 |")[0]

    assert stamp("conta", 0, classifier="a", cams="b") == "| conta"  # the others do not say
    assert stamp("none", 0, classifier="a") == "| conta"
    assert stamp("conta", 1, classifier="a", cams="c") == "| conta (code changed: cams)"
    assert stamp("none", 1, classifier="d") == "| conta (code changed: cams, classifier)"


def test_build_tables__says_where_two_cells_have_not_the_same_round_0(place, tmp_path):
    asked = study.load_study(place(metrics=[]))
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    path = study.cell_path(tmp_path, "conta", 1)
    document = json.loads(path.read_text())
    document["rounds"][0] |= {"cam/miou": 0.21, "new": 1.0, "seconds": 9.0}
    path.write_text(json.dumps(document))
    (endpoint,) = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
    assert "| conta (another round 0: 1 of 2) | 2 | 33.0 | +8.0 |" in endpoint
    other = study.load_study(
        place(metrics=[], arms=TREE["arms"] | {"conta": {"seeds.scales": [1]}})
    )
    write_cells(other, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    (endpoint,) = study_tables.build_tables(other, study.find_cells(other, tmp_path))
    assert "| conta | 2 |" in endpoint


def test_build_tables__draws_of_another_end_point_are_not_shown(place, tmp_path):
    asked = study.load_study(place(metrics=[]))
    draws = {"none": [0.0, 0.01], "conta": [0.0, 0.05]}
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]}, draws=draws)
    other = asked.model_copy(update={"endpoint": "cam/miou"})
    (endpoint,) = study_tables.build_tables(other, study.find_cells(other, tmp_path))
    assert endpoint.splitlines()[-1] == "| conta | 2 | 16.5 | +4.0 | -8.7 .. +16.7 | - |"


def test_build_tables__photos_of_some_of_the_seeds_are_not_shown(place, tmp_path):
    """An interval beside a mean of two seeds is of both, or it is not there."""
    asked = study.load_study(place(metrics=[]))
    draws = {"none": [0.0, 0.01], "conta": [0.0, 0.05]}
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]}, draws=draws)
    path = study.cell_path(tmp_path, "conta", 1)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"endpoint": ""}))
    (endpoint,) = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
    assert endpoint.splitlines()[-1] == "| conta | 2 | 33.0 | +8.0 | -17.4 .. +33.4 | - |"


def test_build_tables__counts_the_seeds_of_a_dead_context(place, tmp_path):
    asked = study.load_study(place(metrics=["context/rms_ratio"]))
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    for seed, ratio in ((0, 0.002), (1, 0.3)):
        path = study.cell_path(tmp_path, "conta", seed)
        document = json.loads(path.read_text())
        document["rounds"][1] |= {"context/rms_ratio": ratio, "context/cosine": 0.5}
        path.write_text(json.dumps(document))
    endpoint, metrics = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
    assert "| conta (context dead: 1 of 2) | 2 | 33.0 |" in endpoint
    assert metrics.splitlines()[2:] == ["| none | - |", "| conta (context dead: 1 of 2) | 0.151 |"]


def test_build_tables__hand_counted(place, tmp_path):
    asked = study.load_study(place())
    draws = {"none": [0.0, 0.01], "conta": [0.0, 0.05]}
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]}, draws=draws)
    endpoint, metrics = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
    # differences .10 and .06: mean .08, deviation .02 sqrt 2, t(0.975, 1) = 12.706
    # draws: .08 and .12, of which the interval is 2.5 % to 97.5 % of the way
    assert endpoint.splitlines() == [
        "| arm | seeds | pseudo/miou, round 1 | less none | 95 %, seeds | 95 %, photos |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| round 0 | 2 | 25.0 |  |  |  |",
        "| none | 2 | 25.0 |  |  |  |",
        "| conta | 2 | 33.0 | +8.0 | -17.4 .. +33.4 | +8.1 .. +11.9 |",
    ]
    assert metrics.splitlines()[2:] == [
        "| none | 12.5 | - |",
        "| conta | 16.5 (+4.0 ± 12.7) | 0.488 |",
    ]


def test_build_tables__one_seed_and_no_draws_have_no_interval(place, tmp_path):
    asked = study.load_study(place(seeds=[3], metrics=[]))
    write_cells(asked, tmp_path, {"none": [0.5], "conta": [0.4]})
    (endpoint,) = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))
    assert endpoint.splitlines()[-1] == "| conta | 1 | 40.0 | -10.0 | - | - |"


def test_build_tables__checks_hand_counted(place, tmp_path):
    none, conta = ["none", "cam/miou"], ["conta", "cam/miou"]
    checks = [
        {"what": "gain", "of": conta, "less": none, "low": 0.03, "high": 0.5},
        {"what": "twice", "of": conta, "over": none, "low": 2},
        {"what": "small", "of": conta, "high": 0.2},
        {"what": "unknown", "of": ["none", "context/cosine"], "low": 0},
        {
            "what": "gap closed",
            "of": conta,
            "less": none,
            "over": ["conta", "pseudo/miou"],
            "over_less": none,
            "low": 0.1,
        },
        {"what": "no gap", "of": conta, "less": none, "over": none, "over_less": none},
        {"what": "losses", "of": none, "less": conta, "over": none, "over_less": conta, "low": 0.5},
    ]
    asked = study.load_study(place(checks=checks))
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    # CAM is half the end point: 12.5 and 16.5
    table = study_tables.build_tables(asked, study.find_cells(asked, tmp_path))[-1]
    assert table.splitlines() == [
        "| check | found | 95 %, seeds | asked | holds |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| gain | 4.0 | -8.7 .. 16.7 | 3.0 .. 50.0 | yes |",  # 5 and 3; t = 12.706
        "| twice | 1.32 | -inf .. inf | 2.00 .. | no |",  # 10 and 15: with two seeds it may be 0
        "| small | 16.5 | -2.6 .. 35.6 | .. 20.0 | yes |",
        "| unknown | - | - | 0 .. | - |",
        "| gap closed | 0.20 | -0.32 .. 1.18 | 0.10 .. | yes |",  # 8 of 41 points
        "| no gap | - | - | .. | - |",
        "| losses | - | - | 0.50 .. | - |",  # less than nothing was there to be won
    ]


def test_verify__says_what_differs_from_the_cells(place, tmp_path):
    path, folder = place(), tmp_path / "studies" / "toy"
    asked, findings = study.load_study(path), tmp_path / "findings.md"
    write_cells(asked, folder, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})

    def check():
        return study_tables.verify(asked, folder, findings=findings)

    with pytest.raises(DataError, match=r"tables\.md is not what the cells give"):
        check()
    done = CliRunner().invoke(cli.app, ["study", str(path), "-o", str(folder.parent)])
    assert done.exit_code == 0, done.output  # every cell is there: nothing is started
    assert check() == done.output.strip("\n")
    picture = folder / "differences.svg"
    picture.write_text(picture.read_text().replace("conta", "other"))
    with pytest.raises(DataError, match=r"differences\.svg is not what the cells give"):
        check()
    study_tables.write_tables(asked, folder)
    endpoint = check().partition("\n\n")[0]
    findings.write_text(f"# Findings\n\n<!-- table toy -->\n{endpoint}\n\nWords.\n")
    check()
    assert (
        CliRunner()
        .invoke(cli.app, ["study", str(path), "-o", str(folder.parent), "--verify"])
        .exit_code
        == 0
    )
    findings.write_text(findings.read_text().replace("33.0", "43.0"))
    with pytest.raises(DataError, match=r"a table of toy in .*findings\.md is not what the cells"):
        check()
    study.cell_path(folder, "none", 1).unlink()
    with pytest.raises(DataError, match=r"1 of 4 cells of toy are missing, .* arm none, seed 1"):
        check()


def test_check_folder__never_in_the_place_of_other_cells(place, tmp_path):
    asked = study.load_study(place())
    write_cells(asked, tmp_path / "cells", {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    study.check_folder(asked, tmp_path / "cells")
    study.check_folder(study.load_study(place(seeds=[0, 1, 2])), tmp_path / "cells")
    other = study.load_study(place(settings={"data.scenes.confounding": 0.5}))
    for look in (
        study.check_folder,
        lambda *where: study_tables.verify(*where, findings=tmp_path / "f"),
    ):
        with pytest.raises(DataError, match=r"^4 of the cells in .* first is none-0\.json; "):
            look(other, tmp_path / "cells")
    with pytest.raises(StoreError, match=r"study\.yaml cannot be written .* folder by --out"):
        study.check_folder(asked, tmp_path / "study.yaml")
    with pytest.raises(StoreError, match=r"study\.yaml/none-0\.json cannot be written \("):
        write_cells(asked, tmp_path / "study.yaml", {"none": [0.2, 0.3]})
    assert study.find_cells(asked, tmp_path / "study.yaml") == {}


def test_write_tables__of_a_finished_study_where_nothing_can_be_written(
    place, tmp_path, monkeypatch
):
    asked = study.load_study(place())
    write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
    text = study_tables.write_tables(asked, tmp_path)

    def fail(path, content):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(study, "write_atomically", fail)
    assert study_tables.write_tables(asked, tmp_path) == text
    (tmp_path / study_tables.PICTURE).unlink()
    with pytest.raises(StoreError, match=r"differences\.svg cannot be written \(Read-only"):
        study_tables.write_tables(asked, tmp_path)


def test_verify__a_number_that_no_cell_has(place, tmp_path):
    """A misspelt name would be a table of dashes, which every cell agrees with."""
    other = {"what": "gain", "of": ["conta", "cam/miou_core"], "low": 0}
    for changes, message in (
        ({"metrics": ["cam/miou", "context/mean"]}, r"metrics of toy: no cell has 'context/mean'"),
        ({"endpoint": "seg_val/miou"}, r"metrics of toy: no cell has 'seg_val/miou'"),
        ({"checks": [other]}, r"check 'gain' of toy finds no number .* it has: cam/miou_core$"),
    ):
        asked = study.load_study(place(**{"metrics": []} | changes))
        write_cells(asked, tmp_path, {"none": [0.2, 0.3], "conta": [0.3, 0.36]})
        study_tables.write_tables(asked, tmp_path)
        with pytest.raises(DataError, match=message):
            study_tables.verify(asked, tmp_path, findings=tmp_path / "findings.md")


@pytest.mark.parametrize("cells", sorted(CELLS.iterdir()), ids=lambda folder: folder.name)
def test_verify__what_ships_is_what_its_cells_give(cells):
    """Tables, picture, and what docs/findings.md quotes of them."""
    asked = study.load_study(ROOT / "recipes" / "studies" / f"{cells.name}.yaml")
    study_tables.verify(asked, cells, findings=ROOT / "docs" / "findings.md")


@pytest.mark.flow
def test_study_flow__shared_stages_once_and_only_missing_cells(home, place, tmp_path, monkeypatch):
    from flows.cells import study_flow

    toys = toy_stages.install(monkeypatch)
    folder, asked = tmp_path / "cells", study.load_study(place(until="masks"))
    assert study_flow(asked, folder) == 4
    calls = toys.take_calls()
    assert calls.count("scenes") == 1
    # a seed: round 0, which both arms share, and conta's round 1, which stops after its masks
    assert calls.count("classifier") == 2 * 2
    assert calls.count("segmenter") == 2
    # what toys make does not differ between seeds, so the second finds what follows a classifier
    assert calls.count("masks") == 2
    cells = study.find_cells(asked, folder)
    assert len(cells) == 4
    cell = cells["conta", 1]
    assert [set(entry) & {"pseudo/miou", "seg_val/miou"} for entry in cell.rounds] == [
        {"pseudo/miou", "seg_val/miou"},
        {"pseudo/miou"},
    ]
    assert cell.rounds[0] == {**cells["none", 1].rounds[0], "seconds": cell.rounds[0]["seconds"]}
    assert cell.artifacts["masks"]
    assert cell.code.keys() >= {"classifier", "masks", "segmenter"}
    assert cell.code == cells["conta", 0].code
    assert cell.config["causal"]["context"] == "conta"

    study.cell_path(folder, "none", 0).unlink()
    assert study_flow(asked, folder) == 1
    assert toys.take_calls() in ([], ["truth"])
    assert study_flow(asked, folder) == 0

    for seed in asked.seeds:
        path = study.cell_path(folder, "none", seed)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "other"}))
        study.cell_path(folder, "conta", seed).unlink()
    toys.take_calls()
    with pytest.raises(DataError, match=r"is not the data that .*none-0\.json was made of"):
        study_flow(asked, folder)
    assert not set(toys.take_calls()) - {"scenes", "truth"}  # said before anything is trained
    assert not study.cell_path(folder, "conta", 0).exists()


@pytest.mark.flow
@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"endpoint": "seg_val/miou", "until": "masks"}, "score_segmenter/val"),
        ({"endpoint": "audit/leak_seg", "until": "masks"}, "audit_segmenter/train"),
        ({"endpoint": "seg_nope/miou"}, "score_segmenter/nope"),
        ({"settings": {"data.val": []}, "endpoint": "classifier/map"}, "score_classifier"),
        ({"rounds": 0, "settings": {"supervision": "truth"}}, "score_masks"),
    ],
)
def test_study_flow__an_end_point_that_never_comes(
    home, place, tmp_path, monkeypatch, changes, stage
):
    from flows.cells import study_flow

    toys = toy_stages.install(monkeypatch)
    asked = study.load_study(place(**changes))
    with pytest.raises(DataError, match=rf"^arm 'none' of .* is of the stage '{stage}', and round"):
        study_flow(asked, tmp_path / "cells")
    assert not set(toys.take_calls()) - {"scenes", "truth"}


def test_stage_of_score__names_that_the_cells_that_ship_have():
    """A score that a stage gives and no pattern knows could be no study's end point."""
    names = {
        name
        for path in CELLS.glob("*/*.json")
        for entry in json.loads(path.read_text())["rounds"]
        for name in entry
    }
    scores = {name for name in names if study.stage_of_score(name)}
    assert {name.partition("/")[0] for name in names - scores} == {
        *("adjustment", "boundary", "boundary_labels", "confounders", "context", "expansion"),
        *("cam", "classifier", "segmenter", "seconds"),
    }
    assert {name for name in names - scores if name.startswith(("cam/", "classifier/"))} == {
        *("cam/threshold_oracle", "classifier/loss", "classifier/skipped"),
    }
    assert study.stage_of_score("seg_val_do/miou") == "score_segmenter/val_do"
    assert study.stage_of_score("audit_val/gap_seg") == "audit_segmenter/val"
    assert study.stage_of_score("cam/iou/cat") is None


@pytest.fixture
def make_run(place, tmp_path):
    """Makes a run of the given rounds, each of which has an IoU of 1/3 under any photos."""
    import numpy as np
    from safetensors.numpy import save_file

    from flows.runs import Round, Run
    from wsss_core.stages.audit import PHOTO_COUNTS
    from wsss_core.stages.stage import Workspace
    from wsss_core.store import Measured

    work, asked = Workspace(tmp_path / "home"), study.load_study(place())

    def make(num_rounds):
        rounds = []
        for number in range(num_rounds):

            def write(out, number=number):
                counts = np.zeros((3, 3, 2), np.int64)
                counts[:, 0], counts[:, 1:] = 5, 10
                save_file({"counts": counts}, out / PHOTO_COUNTS)
                return Measured(
                    {"pseudo/miou": 1 / 3, "pseudo/iou/cat": 1 / 3, "cam/miou": number / 10}
                )

            made = work.store.publish("audit", f"k{number}", write)
            rounds.append(Round(round=number, manifests={"audit": made}))
        config = asked.config("conta", 1).model_dump(mode="json")
        run = Run(name="toy-1", config=config, data="d", rounds=rounds, started_ms=0)
        return asked, run, work

    return make


def test_take_cell__bootstrap_from_the_counts_of_single_photos(make_run):
    from flows.cells import take_cell

    asked, run, work = make_run(2)
    cell = take_cell(asked, run, work, arm="conta", seed=1)
    assert cell.rounds[1] == {"pseudo/miou": 0.333333, "cam/miou": 0.1, "seconds": 0}
    assert (cell.endpoint, len(cell.bootstrap)) == ("pseudo/miou", 400)
    assert set(cell.bootstrap) == {0.33333}
    other = asked.model_copy(update={"endpoint": "cam/miou"})
    assert take_cell(other, run, work, arm="conta", seed=1).bootstrap == []


def test_take_cell__the_round_that_is_asked_for(make_run):
    """A run may have gone further for another study, or have ended before."""
    from flows.cells import take_cell

    asked, run, work = make_run(4)
    cell = take_cell(asked, run, work, arm="conta", seed=1)
    assert [entry["cam/miou"] for entry in cell.rounds] == [0.0, 0.1]
    further = asked.model_copy(update={"rounds": 4})
    with pytest.raises(DataError, match=r"^run toy-1 has no pseudo/miou in round 4: .* is 3 and"):
        take_cell(further, run, work, arm="conta", seed=1)
    typo = asked.model_copy(update={"endpoint": "pseudo/mIoU"})  # a study file would be refused
    with pytest.raises(DataError, match=r"no pseudo/mIoU .* has cam/miou, pseudo/iou/cat, pseudo/"):
        take_cell(typo, run, work, arm="conta", seed=1)

"""The scenes: marginals, dependences and pairing of the graph; geometry of the layout; files."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from wsss_core.config import Config, DataConfig, ScenesConfig, parse_config
from wsss_core.data.check import check_data
from wsss_core.data.images import read_mask, read_photo
from wsss_core.data.scenes import write_scenes
from wsss_core.data.scenes.draw import ROLES, draw_scene
from wsss_core.data.scenes.graph import CLASSES, CUT_EDGES, PLACE_CENTRES, sample_scene
from wsss_core.data.scenes.layout import touch_ratio
from wsss_core.data.scenes.shapes import outline_class
from wsss_core.data.source import read_source
from wsss_core.errors import InputError, SettingsError
from wsss_core.observe import SilentRecorder
from wsss_core.stages.scenes import make_scenes
from wsss_core.stages.stage import Workspace

NUM_SCENES = 1000
STRENGTHS = (0.0, 0.5, 0.9)
# Chi-square that a true null hypothesis exceeds once in 10,000, by degrees of freedom.
CRITICAL = {1: 15.14, 3: 21.11, 7: 29.88, 8: 31.83}
SMALL = ScenesConfig(photos=8, val_photos=4, size_px=48, seed=5)


@functools.cache
def sample_split(split, confounding, count=NUM_SCENES):
    return [sample_scene(split, index=q, confounding=confounding, seed=1) for q in range(count)]


@functools.cache
def drawn_scenes():
    """A few scenes, half of them confounded, as (scene, drawn)."""
    scenes = [sample_scene("train", index=q, confounding=0.9 * (q % 2), seed=3) for q in range(40)]
    return [(scene, draw_scene(scene, size_px=96)) for scene in scenes]


def chi_square(values, shares):
    counts = np.bincount(np.asarray(values, dtype=int), minlength=len(shares))
    expected = np.asarray(shares) * len(values)
    return float(((counts - expected) ** 2 / expected).sum())


def assert_share(hits, expected):
    """The share of true `hits` lies within four and a half deviations of `expected`."""
    hits = list(hits)
    deviation = np.sqrt(expected * (1 - expected) / len(hits))
    assert abs(np.mean(hits) - expected) < 4.5 * deviation


# The graph


@pytest.mark.parametrize("split", CUT_EDGES)
@pytest.mark.parametrize("confounding", STRENGTHS)
def test_sample_scene__marginals_are_the_same_for_every_strength_and_split(split, confounding):
    scenes = sample_split(split, confounding)
    accompanied = [scene for scene in scenes if scene.company is not None]
    eighths, quarters = [1 / 8] * 8, [1 / 4] * 4
    assert chi_square([s.canvas for s in scenes], quarters) < CRITICAL[3]
    assert chi_square([s.object for s in scenes], eighths) < CRITICAL[7]
    assert chi_square([s.stuff for s in scenes], eighths) < CRITICAL[7]
    assert chi_square([s.place for s in scenes], quarters) < CRITICAL[3]
    quadrants = [(s.centre[0] > 0.5) + 2 * (s.centre[1] > 0.5) for s in scenes]
    assert chi_square(quadrants, quarters) < CRITICAL[3]
    assert chi_square([s.company is not None for s in scenes], [0.25, 0.75]) < CRITICAL[1]
    assert chi_square([s.company for s in accompanied], eighths) < CRITICAL[7]
    assert chi_square([s.touches for s in accompanied], [0.3, 0.7]) < CRITICAL[1]


@pytest.mark.parametrize("split", CUT_EDGES)
@pytest.mark.parametrize("confounding", STRENGTHS)
def test_sample_scene__dependences_are_as_strong_as_the_split_says(split, confounding):
    scenes = sample_split(split, confounding)
    accompanied = [scene for scene in scenes if scene.company is not None]

    def share(edge, chance):
        strength = 0.0 if edge in CUT_EDGES[split] else confounding
        return strength + (1 - strength) * chance

    assert_share((s.object // 2 == s.canvas for s in scenes), share("object", 1 / 4))
    assert_share((s.company == s.object ^ 1 for s in accompanied), share("company", 1 / 7))
    assert_share((s.stuff == s.object for s in scenes), share("stuff", 1 / 8))
    assert_share((s.place == s.canvas for s in scenes), share("place", 1 / 4))


def test_sample_scene__company_comes_as_often_to_every_object():
    counts = np.zeros((8, 2))
    for scene in sample_split("train", 0.9):
        counts[scene.object, int(scene.company is not None)] += 1
    expected = counts.sum(axis=1, keepdims=True) * [0.25, 0.75]
    assert ((counts - expected) ** 2 / expected).sum() < CRITICAL[8]


def test_sample_scene__company_is_another_class():
    for split in CUT_EDGES:
        assert all(scene.company != scene.object for scene in sample_split(split, 0.5))


def test_sample_scene__the_look_knows_no_strength():
    for calm, confounded in zip(
        sample_split("train", 0.0), sample_split("train", 0.9), strict=True
    ):
        assert calm.look == confounded.look
        assert calm.object_pose == confounded.object_pose
        assert calm.company_pose == confounded.company_pose


@pytest.mark.parametrize(
    ("split", "cut"),
    [
        ("val_do", ("object", "company", "stuff", "place", "centre")),
        ("val_do_company", ("company",)),
        ("val_do_stuff", ("stuff",)),
        ("val_do_place", ("place", "centre")),
    ],
)
def test_sample_scene__val_splits_differ_in_the_cut_variables_alone(split, cut):
    pairs = list(zip(sample_split("val", 0.9), sample_split(split, 0.9), strict=True))
    for kept, intervened in pairs:
        changed = {name: getattr(intervened, name) for name in cut}
        assert dataclasses.replace(kept, **changed) == intervened
        assert (kept.company is None) == (intervened.company is None)
    assert any(kept != intervened for kept, intervened in pairs)


def test_sample_scene__a_moved_place_keeps_its_offset():
    for kept, moved in zip(
        sample_split("val", 0.9), sample_split("val_do_place", 0.9), strict=True
    ):
        offsets = [np.subtract(s.centre, PLACE_CENTRES[s.place]) for s in (kept, moved)]
        inside = [0.16 < c < 0.84 for s in (kept, moved) for c in s.centre]
        assert not all(inside) or np.allclose(*offsets)


def test_sample_scene__no_confounding_makes_all_val_splits_equal():
    for split in CUT_EDGES:
        if split != "train":
            assert sample_split(split, 0.0) == sample_split("val", 0.0)


def test_scenes_config__refuses_full_confounding():
    with pytest.raises(SettingsError, match=r"data\.scenes\.confounding: .* less than 1, not 1"):
        parse_config({"data": {"scenes": {"confounding": 1}}})


# Layout and paint


@pytest.mark.parametrize("index", range(len(CLASSES)), ids=CLASSES)
def test_outline_class__every_class_has_the_area_of_its_pose(index):
    pose = sample_scene("train", index=0, confounding=0, seed=0).object_pose
    x, y = outline_class(index, pose=pose, centre=(0.4, 0.6)).T
    area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
    assert area == pytest.approx(pose.area, rel=1e-9)


def test_draw_scene__truth_holds_the_tags_and_nothing_else():
    for scene, drawn in drawn_scenes():
        assert set(np.unique(drawn.truth)) == {0, *(tag + 1 for tag in scene.tags)}
        for label, pose in (
            (scene.object, scene.object_pose),
            (scene.company, scene.company_pose),
        ):
            if label is not None:
                visible = (drawn.truth == label + 1).sum() / drawn.truth.size
                assert visible > 0.5 * pose.area


def test_draw_scene__roles_agree_with_truth():
    for scene, drawn in drawn_scenes():
        role = {name: drawn.roles == place for place, name in enumerate(ROLES)}
        assert np.array_equal(drawn.truth == 0, role["background"] | role["stuff"])
        assert np.array_equal(drawn.truth == scene.object + 1, role["object"] | role["part"])
        assert role["company"].any() == (scene.company is not None)


def test_draw_scene__part_is_a_quarter_of_the_object():
    for _, drawn in drawn_scenes():
        layers = drawn.layers
        assert (layers.part & ~layers.object).sum() == 0
        assert layers.part.sum() / layers.object.sum() == pytest.approx(0.25, abs=0.002)


def test_draw_scene__stuff_is_large_and_touches():
    for scene, drawn in drawn_scenes():
        layers = drawn.layers
        ratio = layers.stuff.sum() / layers.object.sum()
        assert not (layers.stuff & layers.object).any()
        assert 0.6 - 0.002 <= ratio <= 1.002
        assert ratio == pytest.approx(scene.look.stuff_ratio, abs=0.002)
        assert touch_ratio(layers.object, layers.stuff) >= 0.25
        seen = drawn.truth == scene.object + 1
        assert touch_ratio(seen, drawn.roles == ROLES.index("stuff")) >= 0.25


def test_draw_scene__company_touches_if_and_only_if_drawn_so():
    for scene, drawn in drawn_scenes():
        layers = drawn.layers
        assert (touch_ratio(layers.object, layers.company) > 0) == scene.touches


def test_draw_scene__part_shows_the_mirrored_canvas():
    checked = 0
    for q in range(12):
        scene = sample_scene("train", index=q, confounding=0.9, seed=1)
        plain = dataclasses.replace(scene.look, noise=0, blur=0, exposure=0, contrast=1)
        drawn = draw_scene(dataclasses.replace(scene, look=plain), size_px=96)
        photo = drawn.photo.astype(float)
        inner = drawn.roles == ROLES.index("part")
        for shift in ((2, 0), (-2, 0), (0, 2), (0, -2)):
            inner &= np.roll(inner, shift, (0, 1))
        pairs = inner & (drawn.roles == 0)[:, ::-1]
        if pairs.sum() > 20 and photo.mean() > 80:
            # light and shadow are grey, so they change no ratio of colours
            ratio = photo[pairs] / photo[:, ::-1][pairs]
            assert np.median(np.ptp(ratio, axis=1) / ratio.mean(axis=1)) < 0.03
            checked += 1
    assert checked >= 4


def test_draw_scene__another_stuff_changes_its_own_pixels_alone():
    pairs = zip(sample_split("val", 0.9), sample_split("val_do_stuff", 0.9), strict=True)
    kept, changed = next(pair for pair in pairs if pair[0].stuff != pair[1].stuff)
    before, after = draw_scene(kept, size_px=96), draw_scene(changed, size_px=96)
    assert np.array_equal(before.truth, after.truth)
    assert np.array_equal(before.roles, after.roles)
    near_stuff = before.layers.stuff_cover > 0
    for _ in range(3):  # the lens blur reaches two pixels at this size
        grown = near_stuff.copy()
        for shift in (1, -1):
            grown |= np.roll(near_stuff, shift, 0) | np.roll(near_stuff, shift, 1)
        near_stuff = grown
    differs = (before.photo != after.photo).any(axis=2)
    assert differs.any()
    assert not (differs & ~near_stuff).any()


def test_draw_scene__a_cut_that_changes_nothing_gives_the_same_pixels():
    pairs = zip(sample_split("val", 0.5), sample_split("val_do", 0.5), strict=True)
    kept, intervened = next(pair for pair in pairs if pair[0] == pair[1])
    for name in ("photo", "truth", "roles"):
        before, after = (getattr(draw_scene(s, size_px=64), name) for s in (kept, intervened))
        assert np.array_equal(before, after)


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    return out, write_scenes(out, SMALL, SilentRecorder())


def read_all(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_write_scenes__same_settings_same_bytes(written, tmp_path):
    write_scenes(tmp_path / "again", SMALL, SilentRecorder())
    assert read_all(tmp_path / "again") == read_all(written[0])
    other = SMALL.model_copy(update={"seed": 6})
    write_scenes(tmp_path / "other", other, SilentRecorder())
    name = "JPEGImages/train_00000.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (written[0] / name).read_bytes()


def test_write_scenes__reads_back_as_voc(written):
    out, dataset = written
    splits = tuple(name for name in CUT_EDGES if name != "train")
    config = DataConfig(source="voc", val=splits)
    assert read_source(config, out, SilentRecorder()) == dataset
    assert {name: len(photos) for name, photos in dataset.splits.items()} == {
        "train": 8,
        **dict.fromkeys(splits, 4),
    }
    assert not check_data(config, out, SilentRecorder()).faults


def test_write_scenes__tags_masks_and_variables_agree(written):
    out, dataset = written
    variables = json.loads((out / "scenes.json").read_text())
    assert variables["settings"]["confounding"] == SMALL.confounding
    photos = [photo for split in dataset.splits.values() for photo in split]
    assert sorted(variables["scenes"]) == sorted(photo.id for photo in photos)
    for photo in photos:
        assert read_photo(photo.path).shape == (48, 48, 3)
        truth = read_mask(out / "SegmentationClass" / f"{photo.id}.png")
        roles = read_mask(out / "Roles" / f"{photo.id}.png")
        drawn = variables["scenes"][photo.id]
        assert set(np.unique(truth)) == {0, *(tag + 1 for tag in photo.tags)}
        assert set(photo.tags) == {drawn["object"], drawn["company"]} - {None}
        assert (truth[roles == ROLES.index("object")] == drawn["object"] + 1).all()
        assert roles.max() < len(variables["roles"])


def test_write_scenes__refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder; name a new one"):
        write_scenes(tmp_path, SMALL, SilentRecorder())
    with pytest.raises(InputError, match="not an empty folder"):
        write_scenes(tmp_path / "mine.txt", SMALL, SilentRecorder())


def test_make_scenes__is_found_again_by_runs_of_another_seed(tmp_path, written):
    work = Workspace(home=tmp_path)
    tree = {"data": {"scenes": SMALL.model_dump()}}
    made = make_scenes(Config.model_validate(tree), work)
    again, problem = make_scenes.find(Config.model_validate({**tree, "seed": 9}), work)
    assert (again, problem) == (made, None)
    tags = {
        name: [(photo.id, photo.tags) for photo in photos]
        for name, photos in work.dataset(made).splits.items()
    }
    assert tags == {
        name: [(photo.id, photo.tags) for photo in photos]
        for name, photos in written[1].splits.items()
    }

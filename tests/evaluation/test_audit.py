"""The audit on masks drawn by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsss_core.evaluation.audit import (
    Counts,
    Gaps,
    Leaks,
    Shares,
    build_audit,
    class_counts,
    draw_audit,
    mass_by_label,
    name_drops,
    name_worst,
)
from wsss_core.evaluation.confusion import confusion_matrix

CLASSES = ("cat", "dog", "cow")
# 0 background, 1 cat, 2 dog, 255 not counted
TRUTH = np.array([[0, 0, 1, 1], [0, 2, 2, 255]], np.uint8)


def masks_of(mask, tags):
    return np.stack([(mask == tag + 1).astype(np.float32) for tag in tags])


def test_mass_by_label__hand_counted():
    cam = np.float32([[[0.5, 0, 1, 0.25], [0, 0.5, 0, 9]]])
    assert mass_by_label(cam, TRUTH, num_labels=4).tolist() == [[0.5, 1.25, 0.5, 0]]
    assert mass_by_label(cam[:0], TRUTH, num_labels=4).shape == (0, 4)


@given(st.integers(0, 999))
def test_mass_by_label__every_counted_pixel_is_somewhere(seed):
    random = np.random.default_rng(seed)
    weights, truth = random.random((3, 5, 7)), random.choice(np.uint8([0, 1, 3, 255]), (5, 7))
    masses = mass_by_label(weights, truth, num_labels=4)
    np.testing.assert_allclose(masses.sum(axis=1), weights[:, truth != 255].sum(axis=1))


def test_leaks__over_the_photos_that_show_both():
    leaks = Leaks(3)
    # cat's mask: 2 px on cat, 1 on dog, 1 on background; dog's: 1 on dog
    mask = np.array([[0, 1, 1, 1], [0, 1, 2, 1]], np.uint8)
    leaks.add([0, 1], mass_by_label(masks_of(mask, [0, 1]), TRUTH, num_labels=4))
    assert leaks.matrix()[0, 1] == 1 / 4
    assert leaks.matrix()[1, 0] == 0
    # a photo of the cat alone has no company to leak on, and does not count
    leaks.add([0], mass_by_label(masks_of(mask, [0]), TRUTH, num_labels=4))
    assert leaks.matrix()[0, 1] == 1 / 4
    assert leaks.photos.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert np.isnan(leaks.matrix()[0, 2])
    # sums over photos before the division: (1 + 3) / (4 + 4), all mass: 4 / (4 + 1 + 4)
    leaks.add([0, 1], np.array([[1.0, 0, 3, 0], [0, 0, 0, 0]]))
    assert leaks.matrix()[0, 1] == 4 / 8
    assert leaks.overall() == 4 / 9


def test_leaks__two_companions_are_two_pairs():
    leaks = Leaks(3)
    leaks.add([0, 1, 2], np.array([[0.0, 0, 1, 3], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert leaks.matrix()[0].tolist()[1:] == [1 / 4, 3 / 4]
    assert leaks.overall() == 4 / 12  # class 0's four twice, the two others' one each twice


def test_leaks__class_without_mass_has_none():
    leaks = Leaks(2)
    assert np.isnan(leaks.overall())
    leaks.add([0, 1], np.zeros((2, 3)))
    assert np.isnan(leaks.matrix()[0, 1])
    assert leaks.photos[0, 1] == 1


def test_gaps__iou_alone_less_iou_in_company():
    gaps = Gaps(2)
    alone, truth = np.array([[1, 1, 0, 0]]), np.array([[1, 1, 1, 0]])  # IoU 2/3
    gaps.add([0], class_counts(confusion_matrix(alone, truth, num_classes=3)))
    both, truth = np.array([[1, 1, 1, 2]]), np.array([[1, 2, 2, 2]])  # cat 1/3, dog 1/3
    gaps.add([0, 1], class_counts(confusion_matrix(both, truth, num_classes=3)))
    assert gaps.alone()[0] == pytest.approx(2 / 3)
    assert gaps.company().tolist() == pytest.approx([1 / 3, 1 / 3])
    assert np.isnan(gaps.alone()[1])  # the dog is never alone, so it has no gap
    assert gaps.overall() == pytest.approx(1 / 3)


def test_class_counts__void_truth_is_not_counted():
    confusion = confusion_matrix(np.full((2, 4), 1), TRUTH, num_classes=4)
    assert class_counts(confusion).tolist() == [[0, 2, 0, 0], [3, 2, 2, 0], [0, 7, 0, 0]]


def test_shares__of_nothing_is_none():
    shares = Shares()
    assert np.isnan(shares.value())
    shares.add(1, 4)
    shares.add(2, 2)
    assert shares.value() == 0.5


def test_name_worst__in_words_and_not_from_an_anecdote():
    matrix = np.array([[np.nan, 0.5, 0.9], [0.2, np.nan, 0], [0.9, np.nan, np.nan]])
    pairs = np.array([[0, 7, 4], [7, 0, 9], [4, 0, 0]])
    assert name_worst({"cam": matrix, "pseudo": matrix / 2}, pairs, classes=CLASSES) == [
        "50 % of the CAM of cat lies on dog (7 photos)",
        "25 % of the pseudo-mask of cat lies on dog (7 photos)",
        "20 % of the CAM of dog lies on cat (7 photos)",
        "10 % of the pseudo-mask of dog lies on cat (7 photos)",
    ]


def test_name_drops__in_words_and_not_of_a_class_by_itself():
    drops = [[Shares() for _ in CLASSES] for _ in CLASSES]
    drops[0][0].add(5, 6)
    drops[0][1].add(1.5, 6)
    drops[1][0].add(3, 6)
    drops[1][2].add(3, 4)
    drops[2][1].add(-1, 9)
    assert name_drops(drops, classes=CLASSES) == [
        "dog loses 50 points of probability where cat is blurred (6 photos)",
        "cat loses 25 points of probability where dog is blurred (6 photos)",
    ]


def an_audit(num=3, split="train"):
    counts = {
        "cam": Counts(Leaks(num), None, {"stuff": Shares(1, 4), "stuff_untied": Shares()}),
        "pseudo": Counts(Leaks(num), Gaps(num)),
    }
    masses = np.zeros((2, num + 1))
    masses[0, :3] = 1, 1, 2
    for count in counts.values():
        for _ in range(6):
            count.leaks.add([0, 1], masses)
    classes = CLASSES if num == 3 else [f"class {k}" for k in range(num)]
    return build_audit(counts, classes=classes, split=split, photos=9)


def test_build_audit__flat_numbers_and_what_does_not_exist():
    audit = an_audit()
    assert audit.metrics() == {
        "audit/leak_cam": 0.5,
        "audit/leak_pseudo": 0.5,
        "audit/stuff_cam": 0.25,
    }
    assert audit.leaks["cam"][0] == [None, 0.5, None]
    assert audit.alone["pseudo"] == [None] * 3
    assert audit.worst[0] == "50 % of the CAM of cat lies on dog (6 photos)"
    assert set(an_audit(split="val_do").metrics()) == {
        "audit_val_do/leak_cam",
        "audit_val_do/leak_pseudo",
        "audit_val_do/stuff_cam",
    }


@pytest.mark.parametrize("num", [1, 3, 80])
def test_draw_audit__one_picture_of_any_number_of_classes(num):
    if num == 1:
        counts = {"seg": Counts(Leaks(1), Gaps(1))}
        audit = build_audit(counts, classes=["cat"], split="val", photos=1)
    else:
        audit = an_audit(num)
    page = draw_audit(audit, title="9 photos")
    assert page.width <= 1600
    assert page.height <= 900
    assert page.tobytes() == draw_audit(audit, title="9 photos").tobytes()
    colours = {colour for _, colour in page.getcolors(maxcolors=page.width * page.height)}
    assert ((200, 40, 30) in colours) == (num > 1)  # a leak of half the mass is as red as it gets

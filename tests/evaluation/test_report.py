import json

import numpy as np
import pytest

from wsss_core.errors import SettingsError
from wsss_core.evaluation.report import Report, build_report, core_labels

NAMES = ("background", "cat", "dog", "cow")
COUNTS = np.array([[6, 2, 0, 0], [0, 4, 0, 0], [1, 0, 3, 0], [0, 0, 0, 0]])


def test_build_report__counted_by_hand():
    report = build_report(
        COUNTS, names=NAMES, split="val", photos=5, unscored=2, core=(0, 1), settings="scale 1"
    )
    assert report.iou == {"background": 6 / 9, "cat": 4 / 6, "dog": 3 / 4, "cow": None}
    assert report.miou == pytest.approx((6 / 9 + 4 / 6 + 3 / 4) / 3)
    assert report.miou_core == pytest.approx((6 / 9 + 4 / 6) / 2)
    assert report.core == ("background", "cat")
    assert report.absent == ("cow",)
    assert report.precision["cat"] == 4 / 6
    assert report.recall["dog"] == 3 / 4
    assert (report.photos, report.unscored, report.supervision) == (5, 2, "tags")


def test_metrics__flat_names_without_missing_scores():
    metrics = build_report(COUNTS, names=NAMES, split="val", photos=5).metrics("pseudo")
    assert set(metrics) == {"pseudo/miou"} | {
        f"pseudo/{kind}/{name}" for kind in ("iou", "precision", "recall") for name in NAMES[:3]
    }
    assert all(np.isfinite(value) for value in metrics.values())


def test_metrics__nothing_counted():
    report = build_report(np.zeros((4, 4), np.int64), names=NAMES, split="val", photos=1)
    assert report.metrics("cam") == {}
    assert report.absent == NAMES


def test_report__json_and_back():
    report = build_report(COUNTS, names=NAMES, split="val", photos=5, core=(0, 3))
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    assert json.loads(text)["iou"]["cow"] is None


def test_core_labels__background_always_counts():
    assert core_labels(("dog", "cat"), names=NAMES) == (0, 1, 2)
    assert core_labels((), names=NAMES) == ()


def test_core_labels__unknown_class():
    with pytest.raises(SettingsError, match=r"'cot' is not a class of this data; choose from cat,"):
        core_labels(("cot",), names=NAMES)

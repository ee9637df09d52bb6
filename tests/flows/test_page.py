"""The page shows what the runs hold, needs nothing else, and believes no name."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from flows import page, runs
from wsss_core.records import Manifest
from wsss_core.store import Measured, Store

EVIL = "<img src=x onerror=alert(1)>"
EVIL_PHOTO = '"><script src="http://evil.example/x.js"></script>'
SIZES = {0: (40, 30), 1: (60, 30), 2: (60, 30)}


class Reader(HTMLParser):
    """Keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def scores(number, shift=0.0):
    iou = {"background": 0.9, EVIL: 0.1 * (number + 1) + shift}
    return {
        "pseudo/miou": 0.25 + 0.1 * number + shift,
        "seg_val/miou": 0.2 + 0.1 * number + shift,
        **{f"seg_val/iou/{name}": value for name, value in iou.items()},
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make_run(store, name, *, shift=0.0, **config):
    run = runs.Run(name=name, config=config, data="d", started_ms=0)
    for number in (0, 1, 2):

        def write(out, number=number):
            Image.new("RGB", SIZES[number]).save(out / "panel.png")
            photo = {"id": EVIL_PHOTO, "tags": [EVIL], "segmenter": 0.125}
            (out / "worst.json").write_text(json.dumps({"measure": "miou", "photos": [photo]}))
            return Measured()

        run.start_round(number)
        # the panel of round 2 is that of round 1
        run.keep(number, "draw_panels", store.publish("draw_panels", f"{min(number, 1)}", write))
        scored = Manifest(
            stage="score",
            key=f"{number}",
            digest="",
            count=1,
            index_sha256="",
            metrics=scores(number, shift),
            finished_ms=0,
            seconds=1,
        )
        run.keep(number, "score_segmenter/val", scored)
    return run


def test_compare_page__is_alone_and_escapes_every_name(store):
    text = page.compare_page([make_run(store, "toy-1")], store=store)
    read = Reader(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    addresses = [a[n] for _, a in read.tags for n in ("src", "href", "action") if n in a]
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, a in read.tags for name in a)
    assert EVIL not in text
    assert EVIL_PHOTO not in text
    assert EVIL in read.text
    assert EVIL_PHOTO in read.text
    policy = read.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none';")


def test_compare_page__curves_bars_and_table(store):
    both = [make_run(store, "a-1"), make_run(store, "b-1", shift=0.05, supervision="truth")]
    read = Reader(page.compare_page(both, store=store))
    assert read.text.count("pseudo-mask") == 2  # in the table, above its chart
    assert "b-1 (uses truth)" in read.text
    curves = [a for a in read.all("polyline") if a["stroke"] == page.COLOURS[1]]
    assert len(curves) == 2  # pseudo-mask, val
    # 0.25 and 0.5 are the least and the most; rounds lie at 36, 180 and 324
    assert curves[0]["points"].split()[2] == f"324.0,{page.MARGIN:.1f}"
    first = next(a for a in read.all("polyline") if a["stroke"] == page.COLOURS[0])
    assert first["points"].split()[0] == f"36.0,{page.HEIGHT - page.MARGIN:.1f}"
    bars = [a["style"] for a in read.all("i")]
    assert len(bars) == 2 * 2 * 3  # classes, runs, rounds
    assert [style.split(";")[0] for style in bars[6:]] == [
        "width:10.0%", "width:20.0%", "width:30.0%", "width:15.0%", "width:25.0%", "width:35.0%",
    ]  # fmt: skip


def test_compare_page__panels_of_each_round_once(store):
    read = Reader(page.compare_page([make_run(store, "toy-1")], store=store))
    sizes = []
    for attributes in read.all("img"):
        data = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            sizes.append(image.size)
    assert sizes == [SIZES[0], SIZES[1]]
    assert "toy-1, round 2: as before" in read.text


def test_compare_page__photos_kept_out_and_lost(store):
    private = make_run(store, "toy-1", tracking={"panels": "none"})
    read = Reader(page.compare_page([private], store=store))
    assert not read.all("img")
    assert "toy-1: photos are kept out (tracking.panels: none)." in read.text
    lost = make_run(store, "toy-2")
    (store.root / "draw_panels" / "0" / "panel.png").write_bytes(b"damaged")
    read = Reader(page.compare_page([lost], store=store))
    assert len(read.all("img")) == 1
    assert "no panel in the store" in read.text


def test_compare_page__a_run_without_anything():
    run = runs.Run(name="new-1", config={}, data="d", started_ms=0)
    read = Reader(page.compare_page([run], store=None))
    assert "Without true masks there is no IoU." in read.text
    assert "new-1: no list in the store." in read.text

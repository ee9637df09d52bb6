"""Runs compared on one page that needs nothing but itself: curves, bars by class, panels.

No script, no address of anything outside; a policy in its head forbids both. Whatever comes from
data (names of runs, classes, photos) is escaped where it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from flows import runs
from flows.pictures import shrink_picture
from flows.runs import Round, Run
from wsss_core.records import Manifest
from wsss_core.store import Store

PANEL_BYTES = 400_000  # of a picture; a page of ten rounds can still be mailed
WIDTH, HEIGHT, MARGIN = 360, 220, 36  # of a chart, in px
# Okabe and Ito 2008: told apart by everybody
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202020; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem }
h2 { margin-top: 2.5rem } svg text { font: 12px system-ui, sans-serif; fill: #202020 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem } .charts h3 { margin: 0; font-size: 1rem }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }
.bar { display: grid; grid-template-columns: 16rem 1fr 4rem; gap: .6rem; align-items: center }
.bar i { display: block; height: .6rem } .bar b { font-weight: normal; text-align: right }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.panels { display: flex; gap: 1rem; overflow-x: auto } .panels figure { margin: 0; flex: none }
.panels img { max-width: 1000px; width: 80vw } summary { cursor: pointer }
"""
_HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)


def compare_page(chosen: Sequence[Run], *, store: Store) -> str:
    """The page as HTML.

    Args:
        chosen: The runs; at least one.
        store: Where their panels are.
    """
    title = "Rounds of " + ", ".join(runs.mark_run(run) for run in chosen)
    parts = [
        f"{_HEAD}<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _legend(chosen),
        _table(runs.compare_cells(chosen)),
        f"<h2>Over the rounds</h2><p>{escape(runs.TABLE_UNITS)}</p>",
        _charts(chosen),
        "<h2>By class</h2><p>IoU in percent, round after round.</p>",
        _bars(chosen),
        "<h2>The same photos, round after round</h2>",
        *(_panels(run, store) for run in chosen),
        "<h2>The worst photos of the last round</h2>",
        *(_worst(run, store) for run in chosen),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _legend(chosen: Sequence[Run]) -> str:
    keys = [
        f'<span class="key" style="background:{_colour(index)}"></span>{escape(runs.mark_run(run))}'
        for index, run in enumerate(chosen)
    ]
    return f"<p>{''.join(keys)}</p>"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rows = [f"<tr>{_tagged('th', head)}</tr>", *(f"<tr>{_tagged('td', row)}</tr>" for row in body)]
    return f"<table>{''.join(rows)}</table>"


def _tagged(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)


def _charts(chosen: Sequence[Run]) -> str:
    columns = runs.score_columns(runs.compare_rows(chosen))
    charts = []
    for title, metric in columns:
        curves = [
            [
                (entry.round, entry.metrics[metric])
                for entry in run.rounds
                if metric in entry.metrics
            ]
            for run in chosen
        ]
        if any(curves):
            charts.append(f"<div><h3>{escape(title)}</h3>{_chart(curves)}</div>")
    return f'<div class="charts">{"".join(charts)}</div>'


def _chart(curves: Sequence[Sequence[tuple[int, float]]]) -> str:
    """Lines over the rounds; the vertical axis spans what occurs, the scores are in [0, 1]."""
    points = [point for curve in curves for point in curve]
    last = max(1, *(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low, high) if high - low > 0.01 else (max(0.0, low - 0.005), high + 0.005)

    def place(x: int, y: float) -> tuple[float, float]:
        right = MARGIN + (WIDTH - 2 * MARGIN) * x / last
        return round(right, 1), round(
            HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - low) / (high - low), 1
        )

    parts = [
        f'<text x="{place(x, low)[0]}" y="{HEIGHT - 10}" text-anchor="middle">{x}</text>'
        for x in range(last + 1)
    ]
    for y in (low, high):
        across, down = place(0, y)[1], place(last, y)[0]
        parts.append(f'<path d="M{MARGIN} {across}H{down}" stroke="#ddd"/>')
        parts.append(f'<text x="0" y="{across + 4}">{100 * y:.1f}</text>')
    for index, curve in enumerate(curves):
        places = [place(x, y) for x, y in curve]
        line = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_colour(index)}"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{_colour(index)}">'
            f"<title>round {number}: {100 * score:.1f}</title></circle>"
            for (x, y), (number, score) in zip(places, curve, strict=True)
        ]
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'


def _bars(chosen: Sequence[Run]) -> str:
    """A group a metric, the classes in it, and in each a bar a round, darker with the rounds."""
    rows = [(index, entry) for index, run in enumerate(chosen) for entry in run.rounds]
    titles = {metric.removesuffix("/miou"): title for title, metric in _mious(chosen)}
    groups = []
    for prefix, title in titles.items():
        classes = dict.fromkeys(
            name.removeprefix(f"{prefix}/iou/")
            for _, entry in rows
            for name in entry.metrics
            if name.startswith(f"{prefix}/iou/")
        )
        inner = [
            f"<h4>{escape(name)}</h4>" + "".join(_class_bars(rows, f"{prefix}/iou/{name}", chosen))
            for name in classes
        ]
        if inner:
            groups.append(f"<details><summary>{escape(title)}</summary>{''.join(inner)}</details>")
    return "".join(groups) or "<p>Without true masks there is no IoU.</p>"


def _class_bars(rows: Sequence[tuple[int, Round]], metric: str, chosen: Sequence[Run]) -> list[str]:
    bars = []
    for index, entry in rows:
        score = entry.metrics.get(metric)
        if score is None:
            continue
        label = f"{chosen[index].name}, round {entry.round}"
        shade = (1 + entry.round) / len(chosen[index].rounds)
        style = (
            f"width:{100 * score:.1f}%;background:{_colour(index)};opacity:{0.3 + 0.7 * shade:.2f}"
        )
        bars.append(
            f'<div class="bar"><span title="{escape(label)}">{escape(label)}</span>'
            f'<i style="{style}"></i><b>{100 * score:.1f}</b></div>'
        )
    return bars


def _panels(run: Run, store: Store) -> str:
    if run.config.get("tracking", {}).get("panels") == "none":
        return f"<p>{escape(run.name)}: photos are kept out (tracking.panels: none).</p>"
    figures, before = [], None
    for entry in run.rounds:
        drawn = entry.manifests.get("draw_panels")
        label = f"{run.name}, round {entry.round}"
        if drawn is not None and drawn.key == before:
            figures.append(f"<figure><figcaption>{escape(label)}: as before</figcaption></figure>")
            continue
        before = None if drawn is None else drawn.key
        panel = _file(drawn, "panel.png", store)
        shown = (
            f'<img alt="{escape(label)}" src="{shrink_picture(panel, PANEL_BYTES)}">'
            if panel is not None
            else "no panel in the store"
        )
        figures.append(f"<figure><figcaption>{escape(label)}</figcaption>{shown}</figure>")
    return f'<div class="panels">{"".join(figures)}</div>'


def _worst(run: Run, store: Store) -> str:
    drawn = run.rounds[-1].manifests.get("draw_panels") if run.rounds else None
    file = _file(drawn, "worst.json", store)
    if file is None:
        return f"<p>{escape(run.name)}: no list in the store.</p>"
    worst = json.loads(file.read_text())
    lines = [
        [photo["id"], " ".join(photo["tags"]), f"{100 * photo['segmenter']:.1f}"]
        for photo in worst["photos"]
    ]
    head = [f"{run.name}, round {run.rounds[-1].round}", "tags", worst["measure"]]
    return _table([head, *lines])


def _file(made: Manifest | None, name: str, store: Store) -> Path | None:
    """A file of a sound artifact; None if it is not there any more."""
    if made is None or store.find(made.stage, made.key)[0] is None:
        return None
    file = store.folder(made) / name
    return file if file.is_file() else None


def _mious(chosen: Sequence[Run]) -> list[tuple[str, str]]:
    columns = runs.score_columns(runs.compare_rows(chosen))
    return [(title, metric) for title, metric in columns if metric.endswith("/miou")]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]

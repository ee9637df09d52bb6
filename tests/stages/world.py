"""A home with eight small photos of discs and squares, for the stages to work on."""

import numpy as np
from PIL import Image

from wsss_core.config import RuntimeConfig, parse_config
from wsss_core.observe import SilentRecorder
from wsss_core.stages.data import index_data
from wsss_core.stages.stage import Workspace

TAGS = ("disc", "square", "disc square", "disc", "square", "disc square", "square", "disc")
VAL_TAGS = ("disc", "square")


class Listener(SilentRecorder):
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def draw_photo(tags, number):
    """A red disc above, a blue square below, on a grey ground; every third photo is lower."""
    height, width = (48, 64) if number % 3 == 2 else (64, 64)
    random = np.random.default_rng(number)
    photo = random.integers(90, 130, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    if "disc" in tags:
        photo[(y - 14) ** 2 + (x - 16 - 3 * number) ** 2 < 120] = [220, 40, 30]
    if "square" in tags:
        photo[height - 22 : height - 4, 20 + number : 40 + number] = [30, 60, 210]
    return photo.astype(np.uint8)


def draw_photos(root):
    """A photos folder: `p0.png`..`p7.png` to train, `v0.png`, `v1.png` to score."""
    root.mkdir()
    names = [f"p{k}" for k in range(len(TAGS))] + [f"v{k}" for k in range(len(VAL_TAGS))]
    rows = dict(zip(names, TAGS + VAL_TAGS, strict=True))
    for number, (name, tags) in enumerate(rows.items()):
        Image.fromarray(draw_photo(tags, number)).save(root / f"{name}.png")
    lines = [f"{name}.png,{tags}" for name, tags in rows.items()]
    (root / "tags.csv").write_text("\n".join(["filename,tags", *lines]) + "\n")
    (root / "val.txt").write_text("v0\nv1\n")


def settings(**changes):
    """Every stage once, as small as it gets; `group__name=value` sets a field."""
    training = {"epochs": 1, "batch_size": 8, "long_side_px": [64, 80], "crop_px": 64}
    tree = {
        "data": {"source": "photos"},
        "classifier": {"pretrained": False, "training": training | {"learning_rate": 0.01}},
        "causal": {"context_size": 8},
        "seeds": {"scales": [1.0, 0.5]},
        "expansion": {"crf": {"iterations": 2}},
        "segmenter": {"pretrained": False, "training": training | {"learning_rate": 0.01}},
    }
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            tree[group] = tree.get(group, {}) | {field: value}
        else:
            tree[group] = value
    return parse_config(tree)


def make_home(folder):
    """(workspace, data manifest) of a fresh home and its photos."""
    draw_photos(folder / "photos")
    work = Workspace(
        home=folder / "home",
        photos_root=folder / "photos",
        runtime=RuntimeConfig(device="cpu", threads=1, workers=1),
        recorder=Listener(),
    )
    return work, index_data(settings(), work)

"""The audit that needs no truth, with a classifier whose eyes are known."""

import json

import numpy as np
import pytest
import torch

from tests.stages.world import draw_photo, make_home, settings
from wsss_core.data.images import write_mask
from wsss_core.stages import audit_blur as stage
from wsss_core.store import Measured

RED, BLUE = 0, 2


class ByColour(torch.nn.Module):
    """Sees a disc by red; sees a square by red too, for the disc is its company."""

    def forward(self, photos, x_m=None, affine=None, draw=None):
        red = photos[:, RED].amax(dim=(1, 2))
        return torch.stack([red, red], dim=1) - 1.5

    def to(self, device):
        return self

    def parameters(self):
        yield torch.zeros(())


def test_blur_region__keeps_the_rest_and_takes_the_shape():
    photo = draw_photo("disc square", 0)
    region = np.zeros(photo.shape[:2], bool)
    region[:32, :40] = True
    found = stage.blur_region(photo, region)
    assert np.array_equal(found[~region], photo[~region])
    assert found[region][:, RED].max() < photo[region][:, RED].max() - 20
    assert found.dtype == np.uint8


def test_audit_blur__drop_of_a_class_that_looks_at_its_company(tmp_path, monkeypatch):
    work, data = make_home(tmp_path)
    photos = work.dataset(data).splits["train"]

    def write_masks(out):
        for number, photo in enumerate(photos):
            pixels = draw_photo(" ".join(["disc", "square"][t] for t in photo.tags), number)
            mask = np.zeros(pixels.shape[:2], np.uint8)
            mask[pixels[..., RED] > 200], mask[pixels[..., BLUE] > 200] = 1, 2
            write_mask(out / f"{photo.id}.png", mask)
        return Measured()

    masks = work.store.publish("masks", "m", write_masks)
    classifier = work.store.publish("classifier", "c", lambda out: Measured())
    monkeypatch.setattr(stage, "load_classifier", lambda folder: ByColour())
    done = stage.audit_blur(settings(), work, data=data, classifier=classifier, masks=masks)
    document = json.loads((work.folder(done) / "blur.json").read_text())
    assert document["photos"] == 2  # those tagged disc and square
    drops = np.array(document["drops"], float)
    assert drops[0, 0] == drops[1, 0] > 0.05  # both look at the disc
    assert drops[0, 1] == drops[1, 1] == pytest.approx(0, abs=1e-6)  # none at the square
    assert document["worst"] == []  # two photos are an anecdote
    assert done.metrics["audit/blur_company"] == pytest.approx((drops[1, 0] + drops[0, 1]) / 2)
    assert done.metrics["audit/blur_own"] == pytest.approx((drops[0, 0] + drops[1, 1]) / 2)

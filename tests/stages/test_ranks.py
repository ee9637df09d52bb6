"""A classifier with its hooks, context and exact sum, trained by two ranks."""

import functools

import pytest
import torch

from tests.stages.test_exact import build
from wsss_core.config import Config, RuntimeConfig, TrainingConfig
from wsss_core.errors import ContaError, InputError
from wsss_core.models.backbones import set_training_mode
from wsss_core.observe import SilentRecorder
from wsss_core.stages import classifier as stage
from wsss_core.stages.stage import Stage, Workspace, try_gpu
from wsss_core.training.loop import Machine, Trainable, train


def view(item, epoch):
    generator = torch.Generator().manual_seed(100 * epoch + item)
    return {
        "photo": torch.randn(3, 24, 24, generator=generator),
        "tags": torch.randint(2, (3,), generator=generator).float(),
        "x_m": torch.rand(4, 4, generator=generator),
        "affine": torch.tensor([[0.7, 0, 0.1], [0, 0.8, -0.2]]),
    }


@pytest.mark.parametrize("exact", [False, True])
def test_classifier__two_ranks_do_what_one_process_does(tmp_path, exact):
    nets = []
    for devices in (1, 2):
        model = build(exact=exact, awake=False)
        train(
            Trainable(
                "classifier",
                model,
                model.new_parameters(),
                stage._loss,
                functools.partial(set_training_mode, batch_norm_frozen=True),
            ),
            items=range(7),
            view=view,
            config=TrainingConfig(epochs=2, batch_size=3, learning_rate=0.01),
            seed=0,
            machine=Machine(
                device=torch.device("cpu"),
                amp=False,
                threads=1,
                scratch=tmp_path / str(devices),
                recorder=SilentRecorder(),
                num_devices=devices,
            ),
        )
        nets.append(model)
    alone, together = (net.state_dict() for net in nets)
    for name, weight in alone.items():
        if weight.is_floating_point():
            assert (together[name] - weight).norm() <= 1e-4 * weight.norm(), name
    slices = [name for name in alone if ".slices." in name]
    assert slices
    assert all(alone[name].any() for name in slices)


def test_device__more_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="devices is 2, but 1 CUDA devices are seen here"):
        Workspace(tmp_path, runtime=RuntimeConfig(devices=2)).device()
    assert Workspace(tmp_path, runtime=RuntimeConfig(device="cuda:0")).device().index == 0
    with pytest.raises(InputError, match=r"device is 'cuda:1', but the CUDA devices seen .* 0..0"):
        Workspace(tmp_path, runtime=RuntimeConfig(device="cuda:1")).device()
    on_cpu = RuntimeConfig(device="cpu", devices=2)
    assert Workspace(tmp_path, runtime=on_cpu).device() == torch.device("cpu")


def test_stage__a_gpu_without_memory_is_one_line(tmp_path):
    def write(out, job):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB"
        )

    work = Workspace(tmp_path, runtime=RuntimeConfig(device="cpu"))
    line = (
        r"toy needs more memory than cpu has free \(CUDA out of memory. Tried .* 20.00 MiB\);"
        " where it trains, lower its batch_size or crop_px, else data.long_side_px, or set"
    )
    with pytest.raises(ContaError, match=line):
        Stage("toy", write, lambda config: {})(Config(name="r"), work)


def test_try_gpu__one_that_torch_was_not_built_for(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "old")
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(ContaError, match=r"^cuda:7 is seen but .* \(CUDA error: no kernel image"):
        try_gpu(torch.device("cuda", 7))

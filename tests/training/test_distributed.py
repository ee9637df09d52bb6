"""Two ranks do what one process does, stop as one, and leave nobody behind."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.training.test_loop import KilledError, Listener, timeless
from wsss_core.config import TrainingConfig
from wsss_core.errors import ContaError, DataError, InputError
from wsss_core.models.segmenter import count_labels, segmentation_loss
from wsss_core.observe import SilentRecorder
from wsss_core.training.distributed import run_ranks, sum_over_ranks, take_slice
from wsss_core.training.loop import Machine, Trainable, epoch_order, train

SEED, NUM_PHOTOS, IGNORED = 5, 10, 255
CPUS = [torch.device("cpu")] * 2


class Net(nn.Module):
    """Frozen stem, a block whose activations are computed twice, a part that no loss reaches."""

    def __init__(self, norm):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU())
            self.unused = nn.Linear(2, 2)
            self.head = nn.Conv2d(4, 3, 1)

    def forward(self, photos):
        return self.head(checkpoint(self.block, self.stem(photos), use_reentrant=False))


def view(item, epoch, *, order):
    """Batches of 3: labels for rank 0 alone; none; foreground for rank 1 alone; one photo."""
    generator = torch.Generator().manual_seed(1000 * epoch + item)
    labels = torch.randint(3, (8, 8), generator=generator)
    place = order.index(item) if epoch == 0 else 9
    if place in (1, 2, 3, 4, 5):
        labels[:] = IGNORED
    if place == 6:
        labels[labels > 0] = IGNORED
    labels[: item % 5] = IGNORED
    return {"photo": torch.randn(3, 8, 8, generator=generator), "labels": labels}


def loss(model, batch, *, class_balanced):
    labels = batch["labels"]
    counts = sum_over_ranks(count_labels(labels, ignore_index=IGNORED))
    if not counts.any():
        return None
    return segmentation_loss(
        model(batch["photo"]),
        labels,
        ignore_index=IGNORED,
        class_balanced=class_balanced,
        counts=counts,
    )


def run(scratch, *, devices, class_balanced=False, norm=None, recorder=None, epochs=1):
    net = Net(norm or nn.GroupNorm(2, 4))
    order = epoch_order(NUM_PHOTOS, seed=SEED, epoch=0)
    history = train(
        Trainable(
            "segmenter",
            net,
            list(net.head.parameters()),
            functools.partial(loss, class_balanced=class_balanced),
            nn.Module.train,
        ),
        items=range(NUM_PHOTOS),
        view=functools.partial(view, order=order),
        config=TrainingConfig(epochs=epochs, batch_size=3, learning_rate=0.05, clip_norm=1.0),
        seed=SEED,
        machine=Machine(
            device=torch.device("cpu"),
            amp=False,
            threads=1,
            scratch=scratch,
            recorder=recorder or SilentRecorder(),
            num_devices=devices,
        ),
    )
    return net, history


def largest_difference(one, other):
    """max |dw| / |w| over the tensors of two nets."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("class_balanced", [False, True])
def test_train__two_ranks_do_what_one_process_does(tmp_path, class_balanced):
    alone, expected = run(tmp_path / "one", devices=1, class_balanced=class_balanced)
    listener = Listener()
    together, history = run(
        tmp_path / "two", devices=2, class_balanced=class_balanced, recorder=listener
    )
    difference = largest_difference(together, alone)
    print(f"max |dw|/|w| after one epoch: {difference:.1e}")
    assert difference < 1e-4
    assert (alone.head.weight - Net(nn.GroupNorm(2, 4)).head.weight).norm() > 1e-2
    assert history[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert [record["skipped"] for record in (history[0], expected[0])] == [1, 1]
    assert [(done, total) for _, done, total in listener.steps] == [(1, 4), (3, 4), (4, 4)]
    assert [(stage, step) for stage, step, _ in listener.epochs] == [("segmenter", 0)]


def test_train__ranks_killed_and_resumed_end_with_the_same_bits(tmp_path):
    straight, expected = run(tmp_path / "straight", devices=2, epochs=3)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", devices=2, epochs=3, recorder=Listener(die_in=1))
    listener = Listener()
    resumed, history = run(tmp_path / "killed", devices=2, epochs=3, recorder=listener)
    assert listener.notes == ["segmenter goes on after epoch 1 of 3"]
    assert timeless(history) == timeless(expected)
    assert largest_difference(resumed, straight) == 0


def test_train__batch_norm_that_learns_is_refused(tmp_path):
    with pytest.raises(InputError, match="set freeze_bn true, or runtime"):
        run(tmp_path, devices=2, norm=nn.BatchNorm2d(4))


def gather(_device, recorder, *, num):
    mine = list(take_slice(range(num)))
    sums = torch.zeros(10, dtype=torch.int64)
    sums[mine] = 1
    recorder.note(f"{mine} {sum_over_ranks(sums).tolist()}")


@pytest.mark.parametrize(
    ("num", "said"),
    [
        (5, "[0, 1] [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]"),
        (1, "[0] [2, 0, 0, 0, 0, 0, 0, 0, 0, 0]"),
    ],
)
def test_take_slice__every_item_once_or_too_few_everywhere(num, said):
    listener = Listener()
    run_ranks(functools.partial(gather, num=num), devices=CPUS, recorder=listener, what="a toy")
    assert listener.notes == [said]


def fail(_device, _recorder, *, rank, error):
    if int(torch.distributed.get_rank()) == rank:
        if error is None:
            os._exit(9)
        raise error
    sum_over_ranks(torch.zeros(1))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "said"),
    [(DataError("photo p3 is broken"), "photo p3 is broken"), (None, "a process of a toy died")],
)
def test_run_ranks__what_stops_one_stops_all(rank, error, said):
    with pytest.raises(ContaError, match=said) as caught:
        run_ranks(
            functools.partial(fail, rank=rank, error=error),
            devices=CPUS,
            recorder=SilentRecorder(),
            what="a toy",
        )
    assert type(caught.value) is type(error or ContaError())


def sleep_long(_device, _recorder, *, folder):
    (folder / f"{os.getpid()}.pid").touch()
    sum_over_ranks(torch.zeros(1))
    if torch.distributed.get_rank() == 0:
        time.sleep(60)
    sum_over_ranks(torch.zeros(1))  # rank 1 waits in here


_PARENT = """
import sys
from functools import partial
from pathlib import Path
from tests.training import test_distributed as here
from wsss_core.observe import SilentRecorder
from wsss_core import workers
from wsss_core.training.distributed import run_ranks
workers._PRELOADED = ("torch",)
work = partial(here.sleep_long, folder=Path(sys.argv[1]))
run_ranks(work, devices=here.CPUS, recorder=SilentRecorder(), what="toys")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_run_ranks__none_outlives_its_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)])
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 600)
        time.sleep(0.5)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait(10)
        assert wait_until(lambda: not any(map(is_alive, pids)), 10)
    finally:
        parent.kill()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False

"""The loop: order, resume to the same bits, and what stops or skips a batch."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.oracles import schedule as oracle
from wsss_core.config import TrainingConfig
from wsss_core.errors import DataError, DivergedError
from wsss_core.observe import SilentRecorder
from wsss_core.store import file_sha256
from wsss_core.training.loop import Machine, Trainable, _load, _Views, epoch_order, train

NUM_PHOTOS = 10


class Net(nn.Module):
    """A trunk with BatchNorm, so that buffers have to be resumed too, and a new head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, photos):
        return self.head(self.trunk(photos)).mean(dim=(2, 3))


def view(item, epoch):
    """A pure function of item and epoch."""
    generator = torch.Generator().manual_seed(1000 * epoch + item)
    return {"photo": torch.randn(3, 6, 6, generator=generator), "tags": torch.eye(2)[item % 2]}


def loss(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch["photo"]), batch["tags"])


def broken_view(item, epoch):
    raise DataError(f"p{item}.jpg is cut off; copy it again")


class KilledError(Exception):
    """Stands for kill -9."""


class Listener(SilentRecorder):
    """Keeps what it hears; dies while epoch `die_in` is half done."""

    def __init__(self, die_in=None):
        self.notes, self.steps, self.epochs, self._die_in = [], [], [], die_in

    def progress(self, what, done, total):
        self.steps.append((what, done, total))
        if self._die_in is not None and what.endswith(f"epoch {self._die_in + 1}/3") and done == 2:
            raise KilledError

    def scalars(self, stage, step, values):
        self.epochs.append((stage, step, values))

    def note(self, message):
        self.notes.append(message)


def run(scratch, *, loss=loss, view=view, recorder=None, **changes):
    net = Net()
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 0.05} | changes
    history = train(
        Trainable(
            "classifier", net, list(net.head.parameters()), loss, lambda model: model.train()
        ),
        items=range(NUM_PHOTOS),
        view=view,
        config=TrainingConfig(**settings),
        seed=5,
        machine=Machine(
            device=torch.device("cpu"),
            amp=False,
            threads=1,
            scratch=scratch,
            recorder=recorder or SilentRecorder(),
        ),
    )
    return net, history


def timeless(history):
    return [{name: v for name, v in record.items() if name != "seconds"} for record in history]


@given(st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 100))
def test_epoch_order__is_a_permutation_and_pure(num_photos, seed, epoch):
    torch.manual_seed(epoch)
    order = epoch_order(num_photos, seed=seed, epoch=epoch)
    torch.manual_seed(seed)
    assert sorted(order) == list(range(num_photos))
    assert epoch_order(num_photos, seed=seed, epoch=epoch) == order


def test_epoch_order__epochs_and_seeds_differ():
    orders = {tuple(epoch_order(20, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("killed_in", [[1], [2], [1, 2], [0, 0, 2]])
def test_train__killed_and_resumed_ends_with_the_same_bits(tmp_path, killed_in):
    straight, expected = run(tmp_path / "straight")
    for epoch in killed_in:
        with pytest.raises(KilledError):
            run(tmp_path / "killed", recorder=Listener(die_in=epoch))
    listener = Listener()
    resumed, history = run(tmp_path / "killed", recorder=listener)

    assert timeless(history) == timeless(expected)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    redone = [step for _, step, _ in listener.epochs]
    assert redone == list(range(killed_in[-1], 3))
    if killed_in[-1]:
        assert listener.notes == [f"classifier goes on after epoch {killed_in[-1]} of 3"]


def test_train__finished_training_is_not_repeated(tmp_path):
    first, expected = run(tmp_path)
    listener = Listener()
    second, history = run(tmp_path, recorder=listener)
    assert history == expected
    assert not listener.steps
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    "damage",
    ["no state", "half a state", "no object", "no tensors", "half the tensors", "a flipped bit"],
)
def test_train__half_written_checkpoint_is_ignored(tmp_path, damage):
    _, expected = run(tmp_path / "straight")
    scratch = tmp_path / "damaged"
    with pytest.raises(KilledError):
        run(scratch, recorder=Listener(die_in=2))
    state, tensors = scratch / "checkpoint.json", scratch / "epoch-0002.safetensors"
    assert tensors.is_file()
    match damage:
        case "no state":
            state.unlink()
        case "half a state":
            state.write_text(state.read_text()[:20])
        case "no tensors":
            tensors.unlink()
        case "half the tensors":
            tensors.write_bytes(tensors.read_bytes()[:100])
        case "no object":
            state.write_text("[]")
        case "a flipped bit":
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            tensors.write_bytes(content)
    listener = Listener()
    _, history = run(scratch, recorder=listener)
    assert timeless(history) == timeless(expected)
    assert not listener.notes


def test_train__one_checkpoint_is_kept_and_names_its_tensors(tmp_path):
    _, history = run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.json",
        "epoch-0003.safetensors",
    ]
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    sha256 = file_sha256(tmp_path / "epoch-0003.safetensors")
    assert state == {"file": "epoch-0003.safetensors", "sha256": sha256, "history": history}


def test_train__every_photo_once_an_epoch_and_the_last_batch_too(tmp_path):
    seen = []

    def spy(item, epoch):
        seen.append((epoch, item))
        return view(item, epoch)

    listener = Listener()
    run(tmp_path, view=spy, recorder=listener)
    assert sorted(seen) == [(epoch, item) for epoch in range(3) for item in range(NUM_PHOTOS)]
    assert [item for _, item in seen[:NUM_PHOTOS]] == epoch_order(NUM_PHOTOS, seed=5, epoch=0)
    assert [(done, total) for _, done, total in listener.steps] == [(1, 3), (2, 3), (3, 3)] * 3


def test_train__loss_and_rate_of_an_epoch_by_hand(tmp_path):
    values = iter([1.0, 2.0, 6.0])

    def scripted(model, _batch):
        return model.head.weight.sum() * 0 + next(values)

    _, history = run(tmp_path, loss=scripted, epochs=1)
    assert history[0]["loss"] == pytest.approx(3.0)
    expected = oracle.poly_rate(0.05, step=2, steps=3, power=0.9)
    assert history[0]["rate"] == pytest.approx(expected)
    assert history[0]["epoch"] == 0


def test_train__rates_follow_the_schedule_over_all_epochs(tmp_path, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def spy(self, *args, **options):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run(tmp_path, head_rate_ratio=10, poly_power=0.9)
    trunk = [oracle.poly_rate(0.05, step=k, steps=9, power=0.9) for k in range(9)]
    assert np.array(rates) == pytest.approx(np.stack([trunk, np.multiply(trunk, 10)], axis=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_train__loss_that_is_no_number_names_batch_and_rate(tmp_path, bad):
    calls = []

    def broken(model, batch):
        calls.append(1)
        return loss(model, batch) * (bad if len(calls) == 5 else 1)

    with pytest.raises(DivergedError) as caught:
        run(tmp_path, loss=broken)
    rate = oracle.poly_rate(0.05, step=4, steps=9, power=0.9)
    assert str(caught.value) == (
        f"the loss of classifier is {bad} at epoch 1, batch 1, rate {rate:.3g}; "
        "lower classifier.training.learning_rate"
    )


def test_train__batch_with_nothing_to_learn_is_skipped_and_counted(tmp_path):
    values = []

    def picky(model, batch):
        if len(batch["tags"]) == 2:  # the short last batch
            return None
        value = loss(model, batch)
        values.append(value.item())
        return value

    _, history = run(tmp_path, loss=picky)
    assert [record["skipped"] for record in history] == [1, 1, 1]
    assert [record["loss"] for record in history] == pytest.approx(
        [np.mean(values[2 * epoch : 2 * epoch + 2]) for epoch in range(3)]
    )


def test_train__only_empty_batches_change_nothing(tmp_path):
    net, history = run(tmp_path, loss=lambda _model, _batch: None)
    assert [record["loss"] for record in history] == [0, 0, 0]
    assert [record["skipped"] for record in history] == [3, 3, 3]
    assert torch.equal(net.head.weight, Net().head.weight)


@pytest.mark.parametrize(("clip_norm", "length"), [(0.5, 0.5), (100.0, 5.0), (None, 5.0)])
def test_train__gradient_is_clipped_by_its_global_norm(tmp_path, clip_norm, length):
    """Two weights pull with 3 and 4: a gradient of length 5 over trunk and head together."""

    def pull(model, _batch):
        return 3 * model.head.weight.flatten()[0] + 4 * model.trunk[0].weight.flatten()[0]

    options = {"epochs": 1, "batch_size": 10, "weight_decay": 0, "head_rate_ratio": 1}
    net, _ = run(tmp_path, loss=pull, clip_norm=clip_norm, **options)
    before = Net()
    moved = [
        (b - a).norm().item() / 0.05
        for a, b in (
            (net.head.weight, before.head.weight),
            (net.trunk[0].weight, before.trunk[0].weight),
        )
    ]
    assert moved == pytest.approx([length * 3 / 5, length * 4 / 5], rel=1e-3)


def test_train__every_epoch_enters_training_anew(tmp_path):
    """What a loss may switch off, the next epoch has on again."""
    modes = []

    def switch_off(model, batch):
        modes.append(model.training)
        model.eval()
        return loss(model, batch)

    run(tmp_path, loss=switch_off)
    assert modes == [True, False, False] * 3


def test_train__threads_are_set_for_the_training_alone(tmp_path):
    before, seen = torch.get_num_threads(), []

    def spy(model, batch):
        seen.append(torch.get_num_threads())
        return loss(model, batch)

    torch.set_num_threads(2)
    try:
        run(tmp_path, loss=spy)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_train__global_generator_is_not_touched(tmp_path):
    Net()  # seeds and draws, as the one inside `run` does
    state = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 12))
def test_train__any_batch_size_visits_every_photo(tmp_path_factory, batch_size):
    listener = Listener()
    _, history = run(
        tmp_path_factory.mktemp("run"), batch_size=batch_size, epochs=2, recorder=listener
    )
    assert len(history) == 2
    assert listener.steps[-1][1:] == (-(-NUM_PHOTOS // batch_size),) * 2


def test_train__a_broken_photo_is_its_own_line(tmp_path):
    with pytest.raises(DataError) as caught:
        run(tmp_path, view=broken_view)
    assert (
        str(caught.value)
        == f"p{epoch_order(NUM_PHOTOS, seed=5, epoch=0)[0]}.jpg is cut off; copy it again"
    )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_load__readers_give_what_this_process_gives_and_errors_as_they_are():
    order = [[(0, 3), (0, 1)], [(1, 2)]]
    for readers in (0, 1):
        batches = list(_load(_Views(view, range(4)), order, seed=0, readers=readers))
        assert torch.equal(batches[0]["photo"][1], view(1, 0)["photo"])
        assert torch.equal(batches[1]["photo"][0], view(2, 1)["photo"])
    (error,) = _load(_Views(broken_view, range(4)), order[:1], seed=0, readers=1)
    assert type(error) is DataError
    assert str(error) == "p3.jpg is cut off; copy it again"

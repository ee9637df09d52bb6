from __future__ import annotations

import errno
import os
import socket

import pytest
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer
from prefect.states import Failed

from tasks import policy, stages
from tests.stages.world import Listener
from wsss_core.errors import DivergedError, InputError, StoreError
from wsss_core.records import Manifest
from wsss_core.stages.stage import Workspace
from wsss_core.store import Measured

MANIFEST = Manifest(
    stage="toy", key="k", digest="d", count=1, index_sha256="", finished_ms=0, seconds=0
)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (InputError("bad"), False),
        (DivergedError("nan"), False),
        (StoreError("full"), False),
        (ValueError("bad"), False),
    ],
)
def test_may_pass__only_what_may_pass_by_itself(error, passes):
    assert policy.may_pass(None, None, Failed(data=error)) is passes


def test_settle_record__follows_the_store(tmp_path):
    from prefect.filesystems import LocalFileSystem

    records = ResultStore(
        result_storage=LocalFileSystem(basepath=str(tmp_path)), serializer=JSONSerializer()
    )
    policy._settle_record(records, "toy-k", None)
    assert not records.exists("toy-k")
    policy._settle_record(records, "toy-k", MANIFEST)
    assert records.exists("toy-k")
    fresh = ResultStore(result_storage=records.result_storage, serializer=JSONSerializer())
    assert fresh.read("toy-k").result == MANIFEST
    assert b"pickle" not in (tmp_path / "toy-k").read_bytes()
    policy._settle_record(records, "toy-k", None)
    assert not records.exists("toy-k")


def test_tell_wait__names_the_writer_and_how_far_it_is(tmp_path):
    listener = Listener()
    work = Workspace(tmp_path, recorder=listener)

    def write(out):
        checkpoint = tmp_path / "scratch" / "toy" / "k" / "checkpoint.json"
        policy._tell_wait("toy", "k", work)
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text('{"file": "", "history": [{}, {}]}')
        policy._tell_wait("toy", "k", work)
        return Measured()

    policy._tell_wait("toy", "k", work)
    work.store.publish("toy", "k", write)
    policy._tell_wait("toy", "k", work)
    us = f"waiting for toy: host {socket.gethostname()}, pid {os.getpid()}, is making it"
    assert listener.notes == [us, f"{us}, 2 epochs so far"]


def test_stage_task__every_stage_has_one_of_its_name():
    made = [getattr(stages, name) for name in vars(stages) if not name.startswith("_")]
    made = [t for t in made if isinstance(getattr(t, "cache_policy", None), policy.StagePolicy)]
    assert len(made) == len({t.name for t in made}) == 23
    assert all(policy.stage_of(t).name == t.name for t in made)
    with pytest.raises(TypeError, match="'dataset' has no stage"):
        policy.stage_of(stages.index_data)

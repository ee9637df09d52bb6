"""A person between the rounds: asked once, in a terminal or by a form, and never passed over."""

from __future__ import annotations

import pytest
import typer
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause

from flows import deploy, review, runs
from tests.flows import toys as toy_stages
from wsss_core.config import parse_config
from wsss_core.errors import InputError

# as few stages as a round can have; without a change, the later rounds are round 0 again
SMALL = {"name": "toy", "review": True, "data": {"val": []}, "causal": {"context": "none"}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("continue", runs.Review(goes_on=True)),
        (" C ", runs.Review(goes_on=True)),
        ("s", runs.Review()),
        ("0.2", runs.Review(goes_on=True, threshold=0.2)),
    ],
)
def test_read_answer(text, answer):
    assert review.read_answer(text) == answer


@pytest.mark.parametrize("text", ["", "maybe", "0", "1", "20", "nan"])
def test_read_answer__nothing_else(text):
    with pytest.raises(typer.BadParameter, match="neither continue, nor stop"):
        review.read_answer(text)


@pytest.fixture
def toys(monkeypatch):
    return toy_stages.install(monkeypatch)


@pytest.fixture
def conta(home):
    from flows.conta import conta_flow

    def run(**tree):
        return runs.read_run(home, conta_flow(parse_config(SMALL | tree)))

    return run


@pytest.mark.flow
def test_conta_flow__nobody_to_ask_is_refused_before_compute(home, toys, conta):
    with pytest.raises(InputError, match="has no terminal to ask in; start it from Prefect's page"):
        conta()
    assert toys.take_calls() == []
    assert not (home / "runs").exists()


@pytest.mark.flow
def test_conta_flow__asks_in_the_terminal(home, toys, conta, monkeypatch, capsys):
    answers, asked = [], []

    def prompt(question, *, value_proc, **_):
        asked.append(question)
        return value_proc(answers.pop(0))

    monkeypatch.setattr(review, "_has_terminal", lambda: True)
    monkeypatch.setattr(typer, "prompt", prompt)

    answers[:] = ["stop"]
    first = conta(rounds=2)
    assert (first.status, first.reason) == ("stopped", "after round 0, by who reviewed it")
    assert "pseudo-mask" in capsys.readouterr().err
    assert {"classifier", "masks", "segmenter"} <= set(toys.take_calls())

    answers[:] = ["0.4", "continue"]
    second = conta(rounds=2)
    assert [question.partition(".")[0] for question in asked] == [
        "round 0 is done",
        "round 0 is done",
        "round 1 is done",
    ]
    assert asked[1].endswith("(now 0.15)")
    assert asked[2].endswith("(now 0.4)")
    assert second.status == "finished"
    assert second.name != first.name
    assert second.config["threshold_changes"] == {"1": 0.4}
    assert [r.review.goes_on for r in second.rounds] == [False, True, False]
    left = runs.read_run(home, first.name)
    assert (left.status, len(left.rounds)) == ("stopped", 1)
    assert left.reason == f"goes on as {second.name} with seeds.threshold 0.4 from round 1 on"
    assert left.rounds[0].manifests == second.rounds[0].manifests
    masks = [entry.manifests["masks"].key for entry in second.rounds]
    assert masks[0] != masks[1] == masks[2]
    calls = toys.take_calls()
    assert calls.count("masks") == 1
    assert "classifier" not in calls

    # the same command again: everything was answered and is there
    again = conta(rounds=2)
    assert (again.name, again.status, toys.take_calls()) == (second.name, "finished", [])
    assert len(asked) == 3


@pytest.mark.flow
def test_conta_flow__deployed_is_suspended_until_the_form_is_filled_in(home, toys):
    from prefect.flow_engine import run_flow
    from prefect.flow_runs import resume_flow_run

    from flows.conta import conta_flow

    config = parse_config(SMALL | {"name": "toy-review", "rounds": 1})
    made = deploy.make_deployment(conta_flow, config, home=home, cron=None).apply()
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run_from_deployment(made)
        with pytest.raises(Pause):
            run_flow(conta_flow, flow_run=flow_run)
        flow_run = client.read_flow_run(flow_run.id)
        assert flow_run.state.name == "Suspended"
        (run,) = runs.list_runs(home)
        assert (run.status, run.reason) == ("stopped", "waits for a review of round 0")
        with runs.hold_run(home, run.name):  # nobody is at work
            assert "classifier" in toys.take_calls()
        keys = flow_run.state.state_details.run_input_keyset
        described = client.read_flow_run_input(flow_run.id, keys["description"])
        assert "| round |" in described
        assert "data:image/jpeg;base64," in described
        assert "The present `seeds.threshold` is 0.15." in described

        resume_flow_run(flow_run.id, run_input={"choice": "continue", "threshold": 0.3})
        run_flow(conta_flow, flow_run=client.read_flow_run(flow_run.id))
        assert client.read_flow_run(flow_run.id).state.name == "Completed"
        client.delete_deployment(made)
    done, left = runs.list_runs(home)
    assert (done.status, left.name) == ("finished", run.name)
    assert done.config["threshold_changes"] == {"1": 0.3}
    calls = toys.take_calls()
    assert "masks" in calls
    assert "classifier" not in calls  # it was there

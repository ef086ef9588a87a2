"""A study from its making to its end in containers, through scaling, a crash of the database and down and up."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from stack import Stack, docker, eventually, inspect, logs, run

pytestmark = [pytest.mark.containers, pytest.mark.hostile, pytest.mark.slow, pytest.mark.timeout(1500)]

STUDY = "quickstart"
TRIALS = (16, 160)
"""The second, on a machine so fast that the first study ends before it has seen all."""


def counts(stack: Stack) -> dict[str, int]:
    return stack.study(STUDY)["counts"]


def ended(stack: Stack) -> int:
    found = counts(stack)
    return found["complete"] + found["pruned"] + found["failed"]


def at_work(container: str) -> bool:
    """It has registered as a worker."""
    return f", study {STUDY}" in logs(container)


def scale(stack: Stack, workers: int) -> None:
    stack.up("--no-recreate", "--scale", f"worker={workers}", "worker")
    assert len(stack.containers("worker")) == workers


def all_registered(stack: Stack) -> None:
    """Each container that there is now has been at work."""
    there = stack.containers("worker")
    eventually(lambda: all(map(at_work, there)), f"{len(there)} workers at work")


def crash_database(stack: Stack) -> None:
    """Kill the server's first process from outside, as the kernel would; its restart policy brings it back."""
    [database] = stack.containers("db")
    before = inspect(database)
    run("kill", "-9", str(before["State"]["Pid"]))

    def back() -> bool:
        now = inspect(database)
        return (
            now["RestartCount"] > before["RestartCount"]
            and now["State"].get("Health", {}).get("Status") == "healthy"
        )

    eventually(back, "the database is back")


@pytest.fixture
def study_under_way(make_stack: Callable[..., Stack]) -> Stack:
    """Three containers at work on a study that has gone through a scaling and a crash of its database."""
    for trials in TRIALS:
        stack = make_stack()
        made = stack.cli("study", "create", STUDY, "--set", f"budget.trials={trials}")
        assert f"study {STUDY} made" in made
        stack.up("--scale", "worker=3")
        all_registered(stack)
        scale(stack, 1)
        scale(stack, 3)
        all_registered(stack)
        before = counts(stack)
        crash_database(stack)
        if before["running"] and ended(stack) < trials:
            return stack
        stack.remove()
    raise AssertionError("no study lasts long enough here")


def test_three_containers_finish_a_study(study_under_way: Stack) -> None:
    stack = study_under_way
    eventually(lambda: stack.get("/healthz")[0] == 200, "the dashboard is healthy")
    trials = stack.study(STUDY)["spec"]["budget"]["trials"]
    workers = stack.containers("worker")
    assert len(workers) == 3

    eventually(
        lambda: not any(inspect(one)["State"]["Running"] for one in workers),
        "the workers have finished",
        1200,
    )
    assert [inspect(one)["State"]["ExitCode"] for one in workers] == [0, 0, 0]
    found = stack.study(STUDY)
    assert found["completed_at"]
    assert ended(stack) == trials
    assert not found["counts"]["failed"]
    stack.cli("study", "verify", STUDY)

    front = json.loads(stack.cli("study", "front", STUDY, "--json"))["front"]
    assert front
    assert stack.get("/dashboard")[0] == 200
    [summary] = json.loads(stack.get("/api/studies")[1])["study_summaries"]
    assert summary["study_name"] == STUDY
    study = json.loads(stack.get(f"/api/studies/{summary['study_id']}")[1])
    # Three workers that end, and two that were scaled away: more than one had a part in it.
    hosts = {
        fact["value"] for trial in study["trials"] for fact in trial["user_attrs"] if fact["key"] == "host"
    }
    assert len(hosts) > 1
    best = {(trial["values"][0], trial["values"][1]) for trial in study["best_trials"]}
    assert {(point["validation_accuracy"]["mean"], point["projection_dim"]) for point in front} <= best

    # Workers have left in peace: none was killed when its time to stop ran out.
    assert not [line for one in workers for line in logs(one).splitlines() if "Traceback" in line]

    stack.compose("down")
    assert not stack.all_containers()
    assert json.loads(stack.cli("study", "front", STUDY, "--json"))["front"] == front
    stack.up("--scale", "worker=3")
    workers = stack.containers("worker")
    eventually(
        lambda: not any(inspect(one)["State"]["Running"] for one in workers), "they see that it is complete"
    )
    assert [inspect(one)["State"]["ExitCode"] for one in workers] == [0, 0, 0]
    stack.cli("study", "verify", STUDY)


def test_worker_comes_back_until_its_study_is_made(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    stack.up("db", "migrate", "worker")
    [worker] = stack.containers("worker")
    eventually(lambda: inspect(worker)["RestartCount"] > 0, "it has come back")
    assert STUDY in logs(worker)
    stack.cli(
        "study",
        "create",
        STUDY,
        "--set",
        "budget.trials=2",
        "--set",
        "budget.epochs=1",
        "--set",
        "budget.rungs=[]",
    )
    eventually(lambda: stack.study(STUDY)["completed_at"], "the study is complete")
    eventually(lambda: not inspect(worker)["State"]["Running"], "it has ended")
    assert inspect(worker)["State"]["ExitCode"] == 0


def test_containers_can_write_only_where_they_should(make_stack: Callable[..., Stack]) -> None:
    """Also what is inside: no root, and no role but its own."""
    stack = make_stack()
    stack.up("dashboard")
    [dashboard] = stack.containers("dashboard")
    eventually(lambda: stack.get("/healthz")[0] == 200, "the dashboard is healthy")
    tried = docker(
        "exec", dashboard, "python3", "-c", "import os; print(os.getuid(), os.listdir('/run/secrets'))"
    )
    assert tried.split(" ", 1) == ["10001", "['reader_password']\n"]
    for path in ("/opt/headsearch/x", "/var/lib/headsearch/x", "/etc/x"):
        wrote = docker("exec", dashboard, "python3", "-c", f"open({path!r}, 'w')", check=False)
        assert not wrote
    bound = inspect(dashboard)["HostConfig"]["PortBindings"]["8080/tcp"]
    assert [binding["HostIp"] for binding in bound] == ["127.0.0.1"]

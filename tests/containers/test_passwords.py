"""Passwords are in their files, and nowhere where others could read them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from stack import Stack, docker, eventually, inspect, logs, run

pytestmark = [pytest.mark.containers, pytest.mark.hostile, pytest.mark.slow, pytest.mark.timeout(1500)]

BLOCK = 1 << 22


def processes(stack: Stack) -> dict[str, str]:
    """Command lines and environments of all processes in a stack's containers, as root on the host sees them."""
    found = {}
    for container in stack.all_containers():
        if not inspect(container)["State"]["Running"]:
            continue
        for line in docker("top", container, "-eo", "pid").splitlines()[1:]:
            for part in ("cmdline", "environ"):
                try:
                    found[f"{container} {line} {part}"] = Path(f"/proc/{line.strip()}/{part}").read_text(
                        errors="replace"
                    )
                except OSError:  # it has ended, or we are not root
                    continue
    return found


def in_image(image: str, needles: list[str]) -> list[str]:
    """Which of `needles` are in the files of an image's layers."""
    wanted, found, kept = [needle.encode() for needle in needles], set(), b""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout
        while block := saving.stdout.read(BLOCK):
            kept = kept[-256:] + block
            found |= {needle for needle in wanted if needle in kept}
    assert saving.returncode == 0
    return [needle.decode() for needle in found]


def test_passwords_are_nowhere_but_in_their_files(make_stack: Callable[..., Stack], image: str) -> None:
    stack = make_stack()
    stack.cli("study", "create", "quickstart", "--set", "budget.trials=500")
    stack.up("--scale", "worker=2")
    workers = stack.containers("worker")
    eventually(lambda: all("study quickstart" in logs(one) for one in workers), "two are at work")
    eventually(lambda: stack.get("/api/studies")[0] == 200, "the dashboard shows studies")
    containers = stack.all_containers()
    assert len(containers) == 5

    shown = {
        "ps": run("ps", "-eww", "-o", "args"),
        "compose config": stack.compose("config"),
        "compose logs": stack.compose("logs", "--no-color"),
        "image": docker("image", "inspect", image),
        "history": docker("history", "--no-trunc", image),
        "dashboard": stack.get("/api/studies")[1],
        "study": stack.cli("study", "show", "quickstart", "--json"),
        **{f"inspect {one}": docker("inspect", one) for one in containers},
        **{f"logs {one}": logs(one) for one in containers},
        **{f"env {one}": docker("exec", one, "env", check=False) for one in containers},
        **processes(stack),
    }
    for role, password in stack.passwords.items():
        assert not [where for where, text in shown.items() if password in text], f"password of {role}"
    # The search itself works: what is known to be there is found.
    assert "headsearch_worker@db" in shown[f"env {workers[0]}"]
    assert "HEADSEARCH_DATABASE_PASSWORD_FILE" in shown[f"inspect {workers[0]}"]
    assert any("headsearch_worker@db" in text for where, text in shown.items() if where.endswith("environ"))

    # Of a source file in a layer, so that layers are searched and not packed.
    known = "Passwords that stand in files, such as secrets that containers mount."
    assert in_image(image, [known, *stack.passwords.values()]) == [known]


def test_each_container_has_the_secrets_of_its_role_alone(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    stack.up("worker", "dashboard")
    has = {
        service: {
            Path(mount["Destination"]).name
            for mount in inspect(stack.containers(service)[0])["Mounts"]
            if mount["Destination"].startswith("/run/secrets/")
        }
        for service in ("db", "dashboard", "worker")
    }
    assert has == {"db": {"owner_password"}, "dashboard": {"reader_password"}, "worker": {"worker_password"}}
    for mount in inspect(stack.containers("worker")[0])["Mounts"]:
        assert mount["RW"] is (mount["Destination"] in ("/var/lib/headsearch", "/run/headsearch")), mount


def test_new_password_stops_no_worker(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    stack.cli("study", "create", "quickstart", "--set", "budget.trials=500")
    stack.up("worker")
    [worker] = stack.containers("worker")
    eventually(lambda: "study quickstart" in logs(worker), "it is at work")
    stack.change_password("worker")
    stack.up("migrate")
    # As if the cable had been cut: the worker must connect anew, and does so with the new password.
    told = logs(worker)
    ended = stack.sql(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'headsearch_worker'"
    )
    assert int(ended) > 0
    eventually(lambda: "epoch" in logs(worker)[len(told) :], "it goes on")
    eventually(
        lambda: (
            int(stack.sql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'headsearch_worker'")) > 0
        ),
        "it is connected",
    )
    assert inspect(worker)["RestartCount"] == 0
    assert inspect(worker)["State"]["Running"]

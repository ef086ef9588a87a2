"""Workers in containers that see the same GPUs: each has one alone, whatever becomes of the others."""

from __future__ import annotations

import random
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stack import ROOT, Stack, docker, eventually, inspect, logs

sys.path.append(str(ROOT / "tests" / "runtime"))
from fake_nvidia import FakeNvidia, gpus
from gpu_holder import SHARED

pytestmark = [pytest.mark.containers, pytest.mark.hostile, pytest.mark.slow, pytest.mark.timeout(1500)]

STUDY = "quickstart"
GPUS = [gpu.uuid for gpu in gpus(4)]
LEASE = re.compile(r"lease of .*?(GPU-[0-9a-f-]+)")
HOLDERS = 8
EVENTS = 200


@pytest.fixture
def four_gpus(open_folder_factory) -> Iterator[Path]:
    """A folder with an nvidia-smi that lists four."""
    with open_folder_factory("headsearch-gpus-") as folder:
        FakeNvidia(folder).show(gpus(4))
        yield folder


def leases(stack: Stack) -> dict[str, str]:
    """GPUs of running workers, by container."""
    return {
        container: found[-1]
        for container in stack.containers("worker", running=True)
        if (found := LEASE.findall(logs(container)))
    }


def devices(stack: Stack, of: str) -> set[str]:
    """GPUs that the database knows of, as what trials were trained on, or workers train on."""
    return {
        found
        for row in stack.study(STUDY)[of]
        for found in re.findall(r"GPU-[0-9a-f-]+", row["device"] or "")
    }


def test_six_workers_have_four_gpus_and_two_wait(make_stack: Callable[..., Stack], four_gpus: Path) -> None:
    files = [ROOT / "tests" / "containers" / "compose.fake-gpus.yaml"]
    stack = make_stack(
        files, FAKE_NVIDIA=str(four_gpus), PRETENDED=str(ROOT / "tests" / "runtime" / "pretended")
    )
    # It outlives this test.
    stack.cli("study", "create", STUDY, "--set", "budget.trials=500")
    stack.up("--scale", "worker=6")
    workers = stack.containers("worker")

    def settled() -> bool:
        waiting = [one for one in workers if "waiting for a GPU: 4 GPUs, all taken by" in logs(one)]
        return len(leases(stack)) == 4 and len(set(waiting) - set(leases(stack))) == 2

    eventually(settled, "four work and two wait")
    held = leases(stack)
    assert sorted(held.values()) == sorted(GPUS)
    eventually(lambda: all(f", study {STUDY}" in logs(one) for one in held), "four are at work")
    assert not any(f", study {STUDY}" in logs(one) for one in workers if one not in held)
    eventually(lambda: devices(stack, "trials") == set(GPUS), "the database knows the GPU of each trial")
    assert devices(stack, "workers") == set(GPUS)

    [victim, *_] = held
    docker("kill", "--signal", "KILL", victim)
    after = eventually(lambda: len(now := leases(stack)) == 4 and now, "its GPU has been handed on")
    assert sorted(after.values()) == sorted(GPUS)
    [heir] = set(after) - set(held)
    assert after[heir] == held[victim]


def test_no_slot_is_ever_shared(image: str, volume: str, four_gpus: Path) -> None:
    """Containers that take leases alone are killed and started at random.

    They share the host's network namespace, where each holder of a slot binds a name that the kernel gives to one
    process only: a second one would end with an exit code of its own.
    """
    locks, names = _locks(), _names(HOLDERS)
    try:
        for name in names:
            _create(name, image, four_gpus, locks, "--volume", f"{volume}:/run/headsearch")
        _kill_and_start(names)
        codes = {name: inspect(name)["State"]["ExitCode"] for name in names}
        assert SHARED not in codes.values()
        assert not [name for name in names if "shared" in logs(name)]
    finally:
        docker("rm", "-f", *names)


def test_without_a_shared_volume_slots_are_shared_and_it_is_noticed(image: str, four_gpus: Path) -> None:
    locks, names = _locks(), _names(2)
    try:
        for name in names:
            _create(name, image, four_gpus, locks, "--tmpfs", "/run/headsearch:mode=1777")
            docker("start", name)
            eventually(lambda name=name: logs(name), "it has said something")
        eventually(lambda: not inspect(names[1])["State"]["Running"], "the second has noticed")
        assert inspect(names[1])["State"]["ExitCode"] == SHARED
        assert inspect(names[0])["State"]["Running"]
    finally:
        docker("rm", "-f", *names)


def _locks() -> str:
    """A folder of locks whose name, which witnesses have, is no other test's."""
    return f"/run/headsearch/{secrets.token_hex(4)}"


def _names(count: int) -> list[str]:
    return [f"hs-test-holder-{secrets.token_hex(4)}" for _ in range(count)]


def _create(name: str, image: str, nvidia: Path, locks: str, *options: str) -> None:
    """A container that takes a lease and keeps it."""
    docker(
        "create", "--name", name, "--network", "host", "--read-only", "--cap-drop", "ALL",
        "--env", f"HEADSEARCH_GPU_LOCKS={locks}",
        "--env", "PATH=/opt/fake/bin:/opt/headsearch/bin:/usr/local/bin:/usr/bin:/bin",
        "--volume", f"{nvidia}:/opt/fake:ro",
        "--volume", f"{ROOT / 'tests' / 'runtime' / 'gpu_holder.py'}:/opt/gpu_holder.py:ro",
        *options,
        "--entrypoint", "python3", image, "/opt/gpu_holder.py", "cuda",
    )  # fmt: skip


def _kill_and_start(names: list[str]) -> None:
    """Random events; now and then, as many hold a GPU as there are GPUs or containers that run."""
    draw = random.Random(0)
    heard = dict.fromkeys(names, 0)
    running: set[str] = set()
    events = 0

    def holding() -> set[str]:
        return {
            match
            for name in running
            for match in re.findall(r'"uuid": "(GPU-[^"]+)"', logs(name)[heard[name] :])
        }

    while events < EVENTS:
        some = draw.sample(names, draw.randint(1, 4))
        if killed := [name for name in some if name in running]:
            docker("kill", "--signal", "KILL", *killed)
            running.difference_update(killed)
        if started := [name for name in some if name not in killed]:
            heard |= {name: len(logs(name)) for name in started}
            docker("start", *started)
            running.update(started)
        events += len(some)
        if draw.random() < 0.2:
            wanted = min(len(GPUS), len(running))
            eventually(
                lambda wanted=wanted: len(holding()) == wanted, f"{wanted} hold a GPU after {events} events"
            )
    assert all(inspect(name)["State"]["Running"] for name in running), "a holder ended by itself"

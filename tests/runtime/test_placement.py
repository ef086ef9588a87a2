"""Workers and GPUs, in real processes with a fake nvidia-smi: who gets which, who waits, who takes over."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from embedded import wait_until
from fake_nvidia import NO_DEVICES, NO_DRIVER, FakeGpu, FakeNvidia, gpus
from gpu_holder import Nursery

from headsearch.core import device as devices
from headsearch.cores import usable_cores
from headsearch.errors import InputError, WorldError
from headsearch.runtime import placement
from headsearch.runtime.launcher import default_workers
from headsearch.runtime.placement import Place, check_device, find_place, gpu_places, settled
from headsearch.runtime.signals import Drain

LIMIT = 60.0
"""Seconds for what takes less than one on an idle machine."""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A fake nvidia-smi, for us and for the processes we start, and a folder of locks."""
    fake = FakeNvidia(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for name in ("HEADSEARCH_GPU_SLOTS", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what a lease sets is unset after the test
        monkeypatch.delenv(name)
    return fake


@pytest.fixture
def start(fake, tmp_path):
    """Starts holders; all are gone after the test."""
    nursery, started = Nursery(tmp_path, dict(os.environ)), []

    def starting(device="cuda"):
        started.append(nursery.start(device))
        return started[-1]

    yield starting
    for holder in started:
        if holder.alive:
            holder.end()
    nursery.close()


@pytest.fixture
def place(fake):
    """Finds a place in this process, and gives the lease back after the test."""
    found = []

    def placing(device, drain=None):
        lines = []
        found.append(find_place(device, drain or Drain(), lines.append))
        return found[-1], lines

    yield placing
    for one in found:
        if one and one.lease:
            one.lease.release()


def settle(holders, count):
    """Wait until so many hold a lease and the others have said that they wait; returns both."""

    def settled():
        waiting = [holder for holder in holders if not holder.got and "waiting" in holder.said]
        return len(holders) - len(waiting) == count and sum(bool(holder.got) for holder in holders) == count

    wait_until(settled, LIMIT)
    return [one for one in holders if one.got], [one for one in holders if not one.got]


def test_six_processes_get_four_gpus_and_two_wait_until_one_is_killed(fake, tmp_path):
    """Each started as a program of its own."""
    shown = gpus(4)
    fake.show(shown)
    script = Path(__file__).with_name("gpu_holder.py")
    logs = [tmp_path / f"{number}.log" for number in range(6)]
    processes = []
    for log in logs:
        with log.open("w") as file:
            processes.append(subprocess.Popen([sys.executable, script, "cuda"], stdout=file, stderr=file))
    try:
        wait_until(lambda: sum('"uuid"' in log.read_text() for log in logs) == 4, LIMIT)
        wait_until(lambda: sum("waiting" in log.read_text() for log in logs) >= 2, LIMIT)
        said = [log.read_text() for log in logs]
        held = [number for number in range(6) if '"uuid"' in said[number]]
        uuids = {gpu.uuid: sum(f'"uuid": "{gpu.uuid}"' in text for text in said) for gpu in shown}
        assert set(uuids.values()) == {1}, said
        for number in set(range(6)) - set(held):
            line = said[number].splitlines()[0]
            assert line.startswith("waiting for a GPU: 4 GPUs, all taken by "), line
            names = line.removeprefix("waiting for a GPU: 4 GPUs, all taken by ").split(", ")
            assert {name.split(":")[1] for name in names} == {str(processes[n].pid) for n in held}
        processes[held[0]].kill()
        wait_until(lambda: sum('"uuid"' in log.read_text() for log in logs) == 5, LIMIT)
        assert not any("shared" in log.read_text() for log in logs)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(LIMIT) for process in processes]
        assert Counter(codes) == {0: 5, -signal.SIGKILL: 1}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_a_worker_with_a_lease_sees(fake, start):
    fake.show(gpus(2))
    (holder,), _ = settle([start()], 1)
    uuid = FakeGpu(0).uuid
    assert holder.said.splitlines()[0] == f"lease of NVIDIA A100-SXM4-40GB {uuid}"
    assert holder.got == {
        "device": "cuda", "uuid": uuid, "slot": 0, "visible": uuid, "order": "PCI_BUS_ID", "torch": False,
    }  # fmt: skip


def test_auto_takes_leases_too_and_cpu_none(fake, start):
    fake.show(gpus(1))
    on_cpu = start("cpu")
    wait_until(lambda: on_cpu.got is not None, LIMIT)
    assert on_cpu.got["device"] == "cpu"
    assert on_cpu.got["uuid"] is None
    held, waiting = settle([start("auto"), start("auto")], 1)
    assert held[0].got["uuid"] == FakeGpu(0).uuid
    held[0].end(signal.SIGTERM)
    wait_until(lambda: waiting[0].got is not None, LIMIT)


def test_a_device_by_its_index_is_waited_for_while_others_are_free(fake, start):
    fake.show(gpus(3))
    held, waiting = settle([start("cuda:1"), start("cuda:1")], 1)
    assert held[0].got["uuid"] == FakeGpu(1).uuid
    assert f"waiting for a GPU: NVIDIA A100-SXM4-40GB {FakeGpu(1).uuid}, all taken" in waiting[0].said
    held[0].end()
    wait_until(lambda: waiting[0].got is not None, LIMIT)
    assert waiting[0].got["uuid"] == FakeGpu(1).uuid


def test_slots_and_mig_devices(fake, start, monkeypatch):
    shown = [FakeGpu(0, mig=("3g.20gb", "1g.5gb")), FakeGpu(1)]
    fake.show(shown)
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "2")
    nursery = Nursery(fake.bin, dict(os.environ))
    holders = [nursery.start() for _ in range(7)]
    try:
        held, waiting = settle(holders, 6)
        places = [shown[0].mig_uuid(0), shown[0].mig_uuid(1), shown[1].uuid]
        assert Counter(one.got["uuid"] for one in held) == dict.fromkeys(places, 2)
        assert {one.got["visible"] for one in held} == set(places)
        assert "waiting for a GPU: 3 GPUs for 2 workers each, all taken by" in waiting[0].said
    finally:
        for holder in holders:
            holder.end()
        nursery.close()


@pytest.mark.parametrize(
    ("variable", "uuids"),
    [
        ("2,0", [FakeGpu(2).uuid, FakeGpu(0).uuid]),
        (FakeGpu(3).uuid, [FakeGpu(3).uuid]),
        (FakeGpu(1).uuid[:10] + ",0", [FakeGpu(1).uuid, FakeGpu(0).uuid]),
    ],
)
def test_only_what_the_variable_names_is_taken(fake, start, monkeypatch, tmp_path, variable, uuids):
    fake.show(gpus(4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    nursery = Nursery(fake.bin, dict(os.environ))
    holders = []
    try:
        for count in range(1, len(uuids) + 1):
            holders.append(nursery.start())
            settle(holders, count)
        assert [holder.got["uuid"] for holder in holders] == uuids
        holders.append(nursery.start())
        settle(holders, len(uuids))
    finally:
        for holder in holders:
            holder.end()
        nursery.close()


def test_two_hundred_kills_and_starts(fake, start):
    """Nobody ever shares a slot, whoever dies when; a socket that bears the slot's name is the witness."""
    fake.show(gpus(4))
    chance = random.Random(5)
    alive, all_of_them, kills = [], [], 0
    for _ in range(200):
        if len(alive) < 2 or (len(alive) < 9 and chance.random() < 0.5):
            alive.append(start())
            all_of_them.append(alive[-1])
        else:
            victim = alive.pop(chance.randrange(len(alive)))
            victim.end(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            kills += 1
        # Without a look at what happens meanwhile: also at processes that just begin.
        time.sleep(chance.choice([0, 0, 0.01, 0.1]))
        held = Counter((one.got["uuid"], one.got["slot"]) for one in alive if one.got)
        assert max(held.values(), default=0) <= 1, held
    while len(alive) < 9:
        alive.append(start())
        all_of_them.append(alive[-1])
    while len(alive) > 4:
        held, waiting = settle(alive, 4)
        held[0].end()
        alive.remove(held[0])
    settle(alive, 4)
    assert all("waiting" in holder.said for holder in waiting), "five were handed on"
    said = [holder.said for holder in all_of_them]
    assert not any("shared" in text or "Traceback" in text for text in said)
    assert kills > 60
    assert sum('"uuid"' in text for text in said) > 20, "leases were taken"


def test_a_waiting_one_says_so_again_and_leaves_on_a_signal(fake, start, place, monkeypatch):
    fake.show(gpus(1))
    first, waiting = start(), start()
    settle([first, waiting], 1)
    holding, waiting = (first, waiting) if first.got else (waiting, first)
    monkeypatch.setattr(placement, "SAY_SECONDS", 0.05)
    monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)
    lines, drain = [], Drain()

    def hear(line):
        lines.append(line)
        if len(lines) == 3:
            drain.set()

    assert find_place("cuda", drain, hear) is None
    said = f"waiting for a GPU: NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}, all taken by {os.uname().nodename}:{holding.pid}"
    assert lines == [said] * 3
    waiting.end(signal.SIGTERM)
    assert "Traceback" not in waiting.said
    assert holding.alive


def test_a_study_that_needs_nobody_ends_the_waiting(fake, start):
    fake.show(gpus(1))
    settle([start()], 1)
    asked = []
    assert find_place("cuda", Drain(), lambda _: None, wanted=lambda: bool(asked.append(1))) is None
    assert asked == [1]


def test_auto_without_a_gpu_is_the_cpu(fake, place, monkeypatch, tmp_path):
    assert place("auto") == (Place("cpu"), [])
    fake.say(NO_DRIVER, code=9)
    found, (line,) = place("auto")
    assert found == Place("cpu")
    assert line.startswith(
        "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA"
    )
    assert line.endswith("training on the CPU")
    fake.show(gpus(2))
    for hidden in ("", "-1", "7"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert place("auto") == (
            Place("cpu"), [f"CUDA_VISIBLE_DEVICES={hidden!r} leaves no GPU; training on the CPU"],
        )  # fmt: skip
    assert not (tmp_path / "locks").exists(), "no lease, no folder"
    # Without nvidia-smi it is torch that knows.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert place("auto") == (Place("auto"), [])
    assert place("cuda") == (Place("cuda"), [])


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:2"])
def test_a_gpu_that_is_asked_for_and_not_there(fake, place, monkeypatch, device):
    with pytest.raises(InputError, match=f"^device: {device} is not there; available: cpu$"):
        place(device)
    fake.say(NO_DRIVER, code=9)
    with pytest.raises(
        WorldError, match=f"^device: {device} is not there; nvidia-smi: NVIDIA-SMI has failed"
    ):
        place(device)
    fake.show(gpus(4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match=r"available with CUDA_VISIBLE_DEVICES='': cpu$"):
        place(device)
    fake.show(gpus(1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if device == "cuda:2":
        with pytest.raises(InputError, match=r"available: cpu, cuda:0 \(NVIDIA A100-SXM4-40GB GPU-"):
            place(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "", "auto:0", "cpu:0"])
def test_devices_that_are_none(fake, place, device):
    with pytest.raises(InputError, match="is none of auto, cpu, cuda, cuda:<index>"):
        place(device)


def test_wrong_variables_are_told_before_anything_else(fake, place, monkeypatch):
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "none")
    with pytest.raises(InputError, match="HEADSEARCH_GPU_SLOTS"):
        place("auto")
    monkeypatch.delenv("HEADSEARCH_GPU_SLOTS")
    fake.show(gpus(1))
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", "here")
    with pytest.raises(InputError, match="HEADSEARCH_GPU_LOCKS"):
        place("auto")


def test_torch_that_cannot_use_the_gpu(fake, place, monkeypatch):
    fake.show(gpus(1))
    monkeypatch.setattr(devices, "cuda_problem", lambda: "torch 9 is built without CUDA")
    line = f"torch 9 is built without CUDA, though nvidia-smi lists NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}"
    lines = []
    assert settled(place("auto")[0], "auto", lines.append) == Place("cpu")
    assert lines == [f"{line}; training on the CPU"]
    with pytest.raises(InputError, match=r"^device: cuda: torch 9 .*; install a torch built for your driver"):
        settled(place("cuda")[0], "cuda", lines.append)
    found, _ = place("cuda")  # both were given back
    monkeypatch.setattr(devices, "cuda_problem", lambda: None)
    assert settled(found, "cuda", lines.append) is found
    assert found.lease is not None
    assert settled(Place("cuda"), "cuda", lines.append) == Place("cuda")
    assert lines[1:] == [
        "no nvidia-smi on the PATH: this worker has no lease of its GPU, others may use it too"
    ]
    assert settled(Place("cpu"), "cpu", lines.append) == Place("cpu")
    assert len(lines) == 2


def test_workers_of_a_launch(fake, monkeypatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda: None)
    on_cpu = max(min(2, usable_cores()), usable_cores() // 2)
    assert default_workers("auto") == default_workers("cpu") == on_cpu
    fake.show([*gpus(3), FakeGpu(3, mig=("3g.20gb", "3g.20gb"))])
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "2")
    assert (default_workers("auto"), default_workers("cuda"), default_workers("cuda:1")) == (10, 10, 2)
    assert default_workers("cpu") == on_cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert default_workers("auto") == 4
    with pytest.raises(InputError, match="cuda:2 is not there"):
        default_workers("cuda:2")
    # One for each GPU that torch cannot use would be too many for the cores.
    monkeypatch.setattr(devices, "cuda_problem", lambda: "built without CUDA")
    assert gpu_places("auto") == 0
    assert default_workers("auto") == on_cpu


def test_a_device_is_checked_before_a_study_is_made(fake, monkeypatch):
    monkeypatch.setattr(devices, "cuda_problem", lambda: "torch 9 is built without CUDA")
    for device in ("auto", "cpu"):
        check_device(device)
    with pytest.raises(InputError, match="is not there; available: cpu"):
        check_device("cuda")
    fake.show(gpus(2))
    check_device("auto")
    with pytest.raises(
        InputError, match=r"device: cuda:1: torch 9 is built without CUDA, though nvidia-smi lists"
    ):
        check_device("cuda:1")
    monkeypatch.setattr(devices, "cuda_problem", lambda: None)
    check_device("cuda:1")
    with pytest.raises(InputError, match="cuda:2 is not there"):
        check_device("cuda:2")
    fake.say(NO_DEVICES, code=6)
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "0")
    with pytest.raises(InputError, match="HEADSEARCH_GPU_SLOTS"):
        check_device("cpu")

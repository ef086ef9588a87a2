"""Where a worker trains: on a GPU that it holds a lease of, else on the CPU.

All of it comes before torch is loaded: CUDA reads once, when it starts, which devices a process may see, and
a worker that waits for a GPU needs no memory for a library that it does not use yet.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from headsearch.errors import DatabaseError, InputError, WorldError
from headsearch.runtime.gpulocks import (
    SYSTEM_FOLDER,
    GpuLease,
    Holder,
    gpu_slots,
    hidden_from_others,
    holders,
    make_locks_folder,
    take,
)
from headsearch.runtime.gpus import ORDER, PROGRAM, VISIBLE, Gpu, Listing, listing, visible_here
from headsearch.runtime.lines import unbreakable
from headsearch.runtime.result import WorkerResult
from headsearch.runtime.signals import Drain, drain_on_signal

LOOK_SECONDS = 0.5
"""Between two looks for a free GPU."""
SAY_SECONDS = 60.0
"""Between two lines that say that there is none."""
WAITING: Final = "waiting for a GPU"
"""How these begin."""
INSTALL: Final = "install a torch built for your driver's CUDA: https://pytorch.org/get-started"
_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")


@dataclass(frozen=True)
class Place:
    """A device for torch, and the lease that goes with it."""

    device: str
    lease: GpuLease | None = None


def start_worker(
    name: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    count: int | None = None,
    parent: int | None = None,
    drained_exit_code: int = 0,
    say: Callable[[str], None],
) -> WorkerResult:
    """Wait for a GPU where `device` asks for one, then work (`worker.run_worker`).

    The lease is kept until this process ends, for as long as it has anything on the GPU. A worker may leave
    while it waits: after a signal, or because the study had ended.

    Raises:
        InputError: The device is not there, or torch cannot use it.
        WorldError: ``nvidia-smi`` fails or does not answer, locks cannot be taken; or of `run_worker`.
    """
    say = unbreakable(say)
    with drain_on_signal(say, parent=parent) as drain:
        working, drain.answer = drain.answer, "leaving"
        place = find_place(device, drain, say, wanted=partial(_wanted, name, say))
        if place is None:
            say("left without a GPU")
            return WorkerResult(0, 0, drained=drain.is_set())
        from headsearch.runtime.worker import run_worker  # loads torch

        place = settled(place, device, say)
        drain.answer = working
        return run_worker(
            name,
            device=place.device,
            threads=threads,
            count=count,
            parent=parent,
            drained_exit_code=drained_exit_code,
            say=say,
            lease=place.lease,
            drain=drain,
        )


def find_place(
    device: str, drain: Drain, say: Callable[[str], None], wanted: Callable[[], bool] = lambda: True
) -> Place | None:
    """Take a lease of a GPU and show CUDA that one alone; the CPU if ``auto`` finds no GPU.

    While all are taken, `wanted` is asked now and then. None if it says no, or `drain` was set.
    Raises InputError and WorldError as `start_worker`.
    """
    slots = gpu_slots()
    found = _look(device)
    gpus = candidates(device, found)
    if not gpus:
        if found.problem:
            say(f"{found.problem}; training on the CPU")
        elif found.gpus:
            say(f"{VISIBLE}={os.environ.get(VISIBLE)!r} leaves no GPU; training on the CPU")
        # Without nvidia-smi torch may know of a GPU all the same.
        return Place("cpu" if found.installed else device)
    folder = make_locks_folder()
    if hidden_from_others(folder):
        say(f"{SYSTEM_FOLDER} cannot be written, so other users' workers do not see this one's lease")
    said_at: float | None = None
    while not drain.is_set():
        if lease := take(gpus, slots, folder):
            os.environ |= {ORDER: "PCI_BUS_ID", VISIBLE: lease.gpu.uuid}
            say(f"lease of {lease.gpu.name} {lease}")
            return Place("cuda", lease)
        if said_at is None or time.monotonic() - said_at > SAY_SECONDS:
            said_at = time.monotonic()
            say(_waiting(gpus, slots, [who for gpu in gpus for who in holders(gpu, slots, folder)]))
            if not wanted():
                return None
        drain.wait(LOOK_SECONDS)
    return None


def candidates(device: str, found: Listing) -> tuple[Gpu, ...]:
    """The GPUs that `device` may mean here: ``cuda:1`` is the second that this process may see.

    None for ``cpu``, and for ``auto`` where there is none; none without ``nvidia-smi`` either.

    Raises:
        InputError: The name is no device's, or asks for a GPU that is not there.
        WorldError: It asks for one, and ``nvidia-smi`` fails.
    """
    named = _DEVICE.fullmatch(device)
    if named is None:
        raise InputError(f"device: {device!r} is none of auto, cpu, cuda, cuda:<index>")
    if device == "cpu" or not found.installed:
        return ()
    gpus = visible_here(found.gpus)
    if device == "auto":
        return gpus
    if found.problem:
        raise WorldError(f"device: {device} is not there; {found.problem}")
    chosen = gpus if named[1] is None else gpus[int(named[1]) : int(named[1]) + 1]
    if not chosen:
        there = ", ".join(["cpu", *(f"cuda:{index} ({gpu})" for index, gpu in enumerate(gpus))])
        limits = f" with {VISIBLE}={os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
        raise InputError(f"device: {device} is not there; available{limits}: {there}")
    return chosen


def gpu_places(device: str) -> int:
    """Workers that this machine's GPUs take at a time; 0 where `device` means the CPU.

    Raises InputError and WorldError as `candidates`.
    """
    places = gpu_slots() * len(candidates(device, _look(device)))
    if places and device == "auto":
        from headsearch.core.device import cuda_problem  # loads torch

        return 0 if cuda_problem() else places
    return places


def check_device(device: str) -> None:
    """Raise InputError or WorldError if a worker with this device would not start."""
    from headsearch.core.device import cuda_problem, find_device  # loads torch

    gpu_slots()
    if not (gpus := candidates(device, _look(device))):
        if device != "auto":
            find_device(device)
    elif device != "auto" and (problem := cuda_problem()):
        raise InputError(_unusable(device, problem, gpus[0]))


def settled(place: Place, device: str, say: Callable[[str], None]) -> Place:
    """The place once torch has had its say: ``auto`` goes to the CPU if torch cannot use the GPU.

    Raises InputError if another `device` was asked for; the lease is given back in both cases.
    """
    if place.device == "cpu":
        return place
    from headsearch.core.device import cuda_problem  # loads torch

    problem = cuda_problem()
    if place.lease is None:
        if problem is None:
            say(f"no {PROGRAM} on the PATH: this worker has no lease of its GPU, others may use it too")
        return place
    if problem is None:
        return place
    place.lease.release()
    if device != "auto":
        raise InputError(_unusable(device, problem, place.lease.gpu))
    say(f"{problem}, though {PROGRAM} lists {place.lease.gpu}; training on the CPU")
    return Place("cpu")


def _look(device: str) -> Listing:
    return Listing(installed=False) if device == "cpu" else listing()


def _unusable(device: str, problem: str, gpu: Gpu) -> str:
    return f"device: {device}: {problem}, though {PROGRAM} lists {gpu}; {INSTALL}"


def _waiting(gpus: tuple[Gpu, ...], slots: int, found: list[Holder | None]) -> str:
    # One that was given back meanwhile has nobody to name; the next look takes it.
    names = list(dict.fromkeys(str(who) for who in found if who)) or ["others"]
    count = f"{len(gpus)} GPUs" if len(gpus) > 1 else str(gpus[0])
    shared = f" for {slots} workers each" if slots > 1 else ""
    return f"{WAITING}: {count}{shared}, all taken by {', '.join(names)}"


def _wanted(name: str, say: Callable[[str], None]) -> bool:
    """The study may still have work. Raises UnknownStudyError if there is none of this name."""
    from headsearch.runtime.session import open_session
    from headsearch.search import studies

    try:
        with open_session() as session:
            ended = studies.get(session.database, name).ended
    except DatabaseError as error:
        say(f"{error}; waiting for a GPU all the same")
        return True
    if ended:
        say(f"study {name} has ended: nothing left to train")
    return not ended

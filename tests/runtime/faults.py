"""What goes wrong for real in a worker process of a test; each is put into a process before it begins."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time

import psutil

from headsearch.core import epoch as epoch_module
from headsearch.core import probe, reporting
from headsearch.errors import StorageError
from headsearch.report import publish
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.session import Session


def signal_itself(number: int, trial: int, epoch: int, step: int = 1) -> None:
    """The process has signal `number` in a step of the epoch after `epoch`, in the trial that it begins as `trial`.

    Counted from 0. A signal from outside comes at a moment of its own: between two trials, or after the last.
    """
    steps, begun = epoch_module.STEPS["joint"], -1

    def joint(batch):
        nonlocal begun
        begun += batch.number == 0
        if begun == trial and batch.number == epoch * batch.steps + step:
            os.kill(os.getpid(), number)
        return steps(batch)

    epoch_module.STEPS["joint"] = joint


def hang() -> None:
    """The second training step of heads with projection dim 2 never returns."""
    steps = epoch_module.STEPS["joint"]

    def joint(batch):
        if batch.learner.config.head.projection_dim == 2 and batch.number == 1:
            threading.Event().wait()
        return steps(batch)

    epoch_module.STEPS["joint"] = joint


def limit_memory() -> None:
    """The process may take 1 GiB more than it has after its imports."""
    most = psutil.Process().memory_info().vms + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def stay_in_c() -> None:
    """The fourth step does not come back from a C library, and no bytecode runs meanwhile."""
    steps, libc = epoch_module.STEPS["joint"], ctypes.CDLL(None)

    def joint(batch):
        if batch.number == 3:
            mutex = ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        return steps(batch)

    epoch_module.STEPS["joint"] = joint


def lose_memory_in_epoch_3() -> None:
    """Others take the memory that a trial had in its first epochs."""
    steps = epoch_module.STEPS["joint"]

    def joint(batch):
        if batch.number // batch.steps == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return steps(batch)

    epoch_module.STEPS["joint"] = joint


def lose_memory_in_the_probe() -> None:
    """Features fit into memory, their final probe does not."""

    def fit(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    probe.fit_probe = fit


def report_slowly() -> None:
    """Reports take longer than a step may."""
    measure = reporting.Reporter.measure

    def slowly(self, *arguments):
        time.sleep(7)
        return measure(self, *arguments)

    reporting.Reporter.measure = slowly


def publish_slowly() -> None:
    """The worker that completes a study is busy with its figure for a while."""
    real = publish.publish

    def slowly(*arguments):
        time.sleep(8)
        return real(*arguments)

    publish.publish = slowly


def no_room_to_revive() -> None:
    """The embedded server's folder cannot be written while the database is away."""

    def revive(_):
        raise StorageError("cannot open start.lock: No space left on device")

    Session.revive = revive


def terminate_after_report_5() -> None:
    """SIGTERM between the question whether to save and the next epoch."""
    put = LeaseKeeper.put

    def putting(self, report):
        put(self, report)
        if report.epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    LeaseKeeper.put = putting

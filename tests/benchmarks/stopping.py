"""Runs a function in a process of its own for a limited time, and ends all that it started.

The process is forked, so that what this one has imported (torch takes seconds) is there at once; nothing here may
have started CUDA or a thread pool before. It leads a session of its own. What a step starts may lead sessions of
its own too, as workers and PostgreSQL do, and outlive it: this process adopts such orphans (prctl, Linux), so that
they are found below it and killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's sys/prctl.h."""
LOOK_SECONDS = 0.02
LEAVE_SECONDS = 3.0
"""For what a step started to end by itself, and for the system to take away what was killed."""


@dataclass(frozen=True)
class Ending:
    """How it ended."""

    exit_code: int | None
    """Negative: the signal that killed it. None: it was stopped for its time."""
    seconds: float


def adopt_orphans() -> bool:
    """Become the parent of what our descendants leave behind; false where the system has no such thing."""
    return _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> bool:
    library = ctypes.CDLL(None)
    return hasattr(library, "prctl") and library.prctl(option, value, 0, 0, 0) == 0


def run_limited(call: Callable[[], int], seconds: float, log: Path) -> Ending:
    """Run `call` in a forked process, which ends with the code that it returns, for at most `seconds`.

    Its output goes to the file `log`. When this returns, no process that it started is left, but for one that
    the kernel cannot end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    others = psutil.Process().children(recursive=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(call, log)
    code: int | None = None
    try:
        while code is None and time.monotonic() - began < seconds:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(LOOK_SECONDS)
        took = time.monotonic() - began
    finally:  # also when we are asked to end
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _end_descendants(others, patience=0.0 if code is None else LEAVE_SECONDS)
    return Ending(code, took)


def _end_descendants(others: list[psutil.Process], *, patience: float) -> None:
    """Kill what is left of our descendants but `others` after `patience` seconds; wait until they are gone."""
    deadline = time.monotonic() + patience
    while _left(others) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    deadline = time.monotonic() + LEAVE_SECONDS
    while (left := _left(others)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_SECONDS)


def _left(others: list[psutil.Process]) -> list[psutil.Process]:
    """Our descendants but `others` that still run; those that ended and are ours to ask for are taken away."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if process in others:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return found


def _become(call: Callable[[], int], log: Path) -> None:
    """In the forked process: never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the runner is killed
        with log.open("ab", buffering=0) as file:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = call()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

"""Worker processes that start without importing torch again: forked from a server that has it.

What runs in them is the command line's own entry, with its signals, lines and exit codes. Tests of the
launcher and of the command line start theirs as users do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _command(
    words: list[str], environment: dict[str, str], log: str, fault: Callable[[], None] | None
) -> None:
    # A session of its own, as a shell gives a job; lines go to a file, unbuffered as in a container.
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    from headsearch.cli import app

    sys.argv = ["headsearch", *words]
    if fault is not None:
        fault()
    app.main()


class Command:
    """``headsearch WORDS`` in a process of its own; used like a subprocess."""

    def __init__(self, *words: str, fault: Callable[[], None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["headsearch.runtime.worker", "headsearch.cli.app", "processes", "faults"]
        )
        descriptor, log = tempfile.mkstemp(prefix="headsearch-test-", suffix=".log")
        os.close(descriptor)
        self.log = Path(log)
        self._process: Any = context.Process(
            target=_command, args=(list(words), dict(os.environ), log, fault)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    @property
    def said(self) -> str:
        """Everything it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"still running after {timeout} s: {self.said[-3000:]}")
        # The pipe that tells of a process's end may be closed a little before its last line is written.
        time.sleep(0.01)
        said = self.said
        self.log.unlink(missing_ok=True)
        return said, None

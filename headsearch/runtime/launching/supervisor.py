"""One worker process, started again when it dies, told to stop once.

Run as ``python -m headsearch.runtime.launching.supervisor worker --study NAME ...``, and called by the tasks
of a Slurm job. A signal that reaches us is passed on as a notice, which the worker takes as often as it
comes: Slurm signals all processes of a job at a requeue and only its first one ahead of a time limit, so
the worker may or may not have been told already.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from headsearch.errors import InputError
from headsearch.runtime.launcher import RESTARTS, SOON_SECONDS
from headsearch.runtime.signals import INTERRUPTED, NOTICES, SIGNALS

DRAINED = 143
"""Exit code of a worker that was asked to stop, as shells have it for a process that SIGTERM ended."""
_FINAL = (0, DRAINED, InputError.exit_code, INTERRUPTED)
"""Exit codes after which starting it again changes nothing, or is not wanted."""


@dataclass
class Supervisor:
    """Keeps one worker going until its study ends or somebody asks it to stop."""

    words: Sequence[str]
    """Of the command, after ``headsearch``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to ours."""
    heard: set[int] = field(default_factory=set)
    """Signals that reached us."""
    _worker: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Exit code: 0 the study has ended, DRAINED it was asked to stop, else the worker's last one."""
        restarts = 0
        with self._listening():
            while True:
                began = time.monotonic()
                code = self._once()
                if code in _FINAL:
                    return code
                if self.heard:
                    return DRAINED
                if time.monotonic() - began < SOON_SECONDS:
                    restarts += 1
                    if restarts > RESTARTS:
                        _say(f"worker died ({_how(code)}) again, not started again")
                        return code if code > 0 else 1
                _say(f"worker died ({_how(code)}), started again")

    def _once(self) -> int:
        environment = {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "headsearch", *self.words, "--drained-exit-code", str(DRAINED)]
        self._worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        if self.heard:  # while it was being started
            self._tell()
        return self._worker.wait()

    def _tell(self) -> None:
        if self._worker is not None:
            # Ends one that has not yet come to listen, and so holds no trial.
            self._worker.send_signal(NOTICES[-1])

    def _hear(self, number: int, _: Any) -> None:
        self.heard.add(number)
        self._tell()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (*SIGNALS, *NOTICES)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit {code}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  into the worker's log


if __name__ == "__main__":
    sys.exit(Supervisor(sys.argv[1:]).run())

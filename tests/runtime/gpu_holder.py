"""Processes that take a lease of a GPU as a worker does, and keep it; they load no torch.

``python gpu_holder.py cuda`` is one. It prints a worker's lines, then a JSON line with what it got. A socket whose
name is that of the slot witnesses that nobody else has it: the kernel knows names of living sockets only, and
has no part of ours in it. The exit code of a holder that meets another in its slot is 9.

`Nursery` forks many from one process that has the code loaded; each is a child of its own session.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARED = 9
WITNESS_SECONDS = 20.0
"""For the kernel to take away what a dying process had: it drops locks and names in no order."""


def hold(device: str) -> int:
    from headsearch.runtime.placement import find_place
    from headsearch.runtime.signals import drain_on_signal

    def say(line: str) -> None:
        print(line, flush=True)

    with drain_on_signal(say) as drain:
        place = find_place(device, drain, say)
        if place is None:
            return 0
        lease = place.lease
        got = {
            "device": place.device,
            "uuid": lease and lease.gpu.uuid,
            "slot": lease and lease.slot,
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "order": os.environ.get("CUDA_DEVICE_ORDER"),
            "torch": "torch" in sys.modules,
        }
        with socket.socket(socket.AF_UNIX) as witness:
            if lease and not _witnessed(witness, f"{lease.gpu.uuid} {lease.slot}"):
                say(f"shared {json.dumps(got)}")
                return SHARED
            say(json.dumps(got))
            drain.wait()
    return 0


def _witnessed(witness: socket.socket, name: str) -> bool:
    # Names of sockets are short.
    digest = hashlib.sha256(f"{os.environ['HEADSEARCH_GPU_LOCKS']} {name}".encode()).hexdigest()
    deadline = time.monotonic() + WITNESS_SECONDS
    while True:
        try:
            witness.bind(f"\0headsearch-{digest}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        else:
            return True


class Holder:
    """One holder, and what it has said so far in the file `log`."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def got(self) -> dict[str, Any] | None:
        """What it holds; None while it waits."""
        return next((json.loads(line) for line in self.said.splitlines() if line.startswith("{")), None)

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self, number: int = signal.SIGKILL, seconds: float = 60.0) -> None:
        """Send a signal and wait until the process is no more."""
        os.kill(self.pid, number)
        deadline = time.monotonic() + seconds
        while self.alive:
            assert time.monotonic() < deadline, f"it does not end: {self.said}"
            time.sleep(0.005)


class Nursery:
    """A process whose children are holders."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, device: str = "cuda") -> Holder:
        log = self._folder / f"holder-{self._count}.log"
        self._count += 1
        log.touch()
        assert self._process.stdin
        assert self._process.stdout
        print(device, log, file=self._process.stdin, flush=True)
        return Holder(int(self._process.stdout.readline()), log)

    def close(self) -> None:
        """End it; holders live on."""
        self._process.communicate()


def _nurse() -> None:
    from headsearch.runtime import placement  # loaded once for all

    placement.LOOK_SECONDS = 0.02  # so that they meet often
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for their exit codes: gone when they end
    for line in sys.stdin:
        device, log = line.split()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, path in ((0, os.devnull), (1, log), (2, log)):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
            code = 1
            try:
                code = hold(device)
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--nursery":
        _nurse()
    else:
        sys.exit(hold(sys.argv[1]))

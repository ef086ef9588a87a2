"""Workers as processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from headsearch.cores import usable_cores
from headsearch.home import logs_folder, make_folder
from headsearch.runtime.placement import gpu_places

RESTARTS = 3
"""Times for each worker of a launch that one which died soon is started again."""
SOON_SECONDS = 60.0
"""One that lived longer did some work, and may die again: that is what leases are for."""
STOP_SECONDS = 60.0
"""Beyond the drain time, for workers to save, say so and leave."""


@dataclass(frozen=True)
class ExitedWorker:
    """A worker process that ended."""

    index: int
    returncode: int
    """Negative: the signal that killed it."""
    log: Path
    restarted: bool


def default_workers(device: str = "auto") -> int:
    """One per GPU and slot; without any, one per two cores but at least two where there are two cores.

    Two single-threaded workers on two cores train more trials an hour than one with two threads.

    Raises InputError and WorldError as `placement.candidates`.
    """
    return gpu_places(device) or max(min(2, usable_cores()), usable_cores() // 2)


class LocalWorkers:
    """Starts workers of a study, restarts those that die, stops them when the block ends.

    Each has a session of its own, so that Ctrl-C in the terminal reaches them only through us, and
    leaves by itself when this process is gone. CPU cores are shared out evenly; of GPUs each takes a lease.
    """

    def __init__(
        self, study: str, workers: int, *, device: str = "auto", threads: int | None = None, home: Path
    ) -> None:
        self._study, self._count, self._device = study, workers, device
        self._threads = threads or max(1, usable_cores() // workers)
        self._logs = make_folder(logs_folder(home) / study)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started_at: dict[int, float] = {}
        self._restarts = 0

    def __enter__(self) -> Self:
        try:
            for index in range(self._count):
                self._start(index)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> int:
        """Workers that run."""
        return sum(process.poll() is None for process in self._processes.values())

    def log(self, index: int) -> Path:
        """Where worker `index` writes its lines."""
        return self._logs / f"worker-{index}.log"

    def poll(self) -> list[ExitedWorker]:
        """Workers that ended since the last call. One that died is started again, within limits."""
        exited = []
        for index, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[index]
            soon = time.monotonic() - self._started_at[index] < SOON_SECONDS
            again = code != 0 and (not soon or self._restarts < RESTARTS * self._count)
            if again:
                self._restarts += soon
                self._start(index)
            exited.append(ExitedWorker(index, code, self.log(index), again))
        return exited

    def stop(self, seconds: float = 2 * STOP_SECONDS) -> None:
        """Ask all workers to finish their epoch and leave; kill those that do not in time."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, index: int) -> None:
        command = [sys.executable, "-m", "headsearch", "worker", "--study", self._study]
        command += ["--device", self._device, "--threads", str(self._threads), "--parent", str(os.getpid())]
        # Torch reads these once, at import.
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        self._started_at[index] = time.monotonic()
        with self.log(index).open("ab") as log:
            self._processes[index] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

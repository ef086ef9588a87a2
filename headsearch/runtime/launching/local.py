"""Workers on this machine, in the background."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from headsearch.cores import usable_cores
from headsearch.errors import StorageError
from headsearch.home import home_folder, logs_folder, make_folder
from headsearch.runtime.launcher import default_workers
from headsearch.runtime.launching.engines import Plan, Wanted
from headsearch.runtime.launching.nodes import database_line
from headsearch.runtime.session import Session
from headsearch.spec import StudySpec


def check(wanted: Wanted, *, dry_run: bool) -> None:
    """Find nothing wrong: who makes the study looks at the device."""


def plan(spec: StudySpec, wanted: Wanted, *, dry_run: bool) -> Plan:  # noqa: ARG001  the same
    """Plan one supervised process a worker, which outlives this command and the terminal."""
    device = wanted.device or "auto"
    count = wanted.workers or default_workers(device)
    threads = wanted.threads or max(1, usable_cores() // count)
    words = ["worker", "--study", spec.name, "--device", device, "--threads", str(threads)]
    home = home_folder()
    logs = home / "logs" / spec.name

    def start(_: Session) -> list[str]:
        folder = make_folder(logs_folder(home) / spec.name)
        started: list[tuple[int, Path]] = []
        try:
            for index in range(count):
                started += [_start(words, threads, folder, index)]
        except OSError as error:
            for pid, _log in started:
                os.kill(pid, signal.SIGTERM)
            raise StorageError(f"cannot start a worker in {folder}: {error.strerror}") from error
        pids = " ".join(str(pid) for pid, _ in started)
        return [
            *(f"worker process {pid}, log {log}" for pid, log in started),
            f"see them: headsearch study status {spec.name}",
            f"stop them: kill {pids}",
        ]

    return Plan(
        (
            ("workers", f"{count} on this machine, in the background: headsearch {shlex.join(words)}"),
            ("database", database_line()),
            ("files", f"home {home}, logs in {logs}"),
            ("ending", "with the study; one that dies is started again, within limits; SIGTERM drains"),
        ),
        start,
    )


def _start(words: list[str], threads: int, folder: Path, index: int) -> tuple[int, Path]:
    """Start a worker in a session of its own; its log has a name that no earlier launch took."""
    command = [sys.executable, "-m", "headsearch.runtime.launching.supervisor", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    number = index
    while True:
        log = folder / f"launched-{number}.log"
        try:
            file = log.open("xb")
            break
        except FileExistsError:
            number += 1
    with file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    # It is not ours to wait for: it goes on when this command has ended.
    process.returncode = 0
    return process.pid, log

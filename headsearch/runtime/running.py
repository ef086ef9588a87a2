"""A study from its file to its front on one machine: made or resumed, worked on, watched to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headsearch.errors import HeadsearchError, UnknownStudyError, WorldError
from headsearch.runtime.launcher import STOP_SECONDS, ExitedWorker, LocalWorkers, default_workers
from headsearch.runtime.patience import patiently
from headsearch.runtime.placement import WAITING, check_device, gpu_places
from headsearch.runtime.session import Session
from headsearch.runtime.signals import drain_on_signal
from headsearch.search import imagesets, studies
from headsearch.search import snapshot as snapshots
from headsearch.search.imagesets import KnownImages
from headsearch.search.snapshot import Snapshot
from headsearch.search.studies import Study
from headsearch.spec import StudySpec

POLL_SECONDS = 0.5
READ_SHARE = 0.05
"""Of our time at most that is spent on reading snapshots, however large the study is."""


class Watcher(Protocol):
    """Whoever shows a run."""

    def start(self, snapshot: Snapshot, note: str) -> None:
        """The study before its workers; `note` says which they are."""

    def update(self, snapshot: Snapshot) -> None:
        """The study now."""

    def note(self, line: str) -> None:
        """Something that is not in the study: a worker died, the database is away."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    snapshot: Snapshot
    started: bool
    """Workers were started; false where the study was complete already."""
    interrupted: bool
    seconds: float


@dataclass(frozen=True)
class Crew:
    """Which workers to start."""

    workers: int | None = None
    """None: one per GPU and slot, else by the number of cores."""
    device: str = "auto"
    threads: int | None = None


def make_study(
    session: Session, spec: StudySpec, *, data_check: bool = True, device: str | None = None
) -> tuple[Study, bool, list[str]]:
    """Make the study, or find it if its spec is the same; also what the data check found worth a note.

    Nothing is made when the data do not fit, or when `device` is not there.

    Raises:
        StudyExistsError: One of this name has another spec.
        InputError: The data cannot be used (`preflight.check`), or the device.
        WorldError: ``nvidia-smi`` fails or does not answer.
    """
    notes: list[str] = []
    images: list[KnownImages] = []
    try:
        existing: Study | None = studies.get(session.database, spec.name)
    except UnknownStudyError:
        existing = None
    if existing is None or not existing.ended:
        if device is not None:
            check_device(device)
        if existing is None and data_check:
            from headsearch.runtime import preflight  # loads torch

            for seen, said in preflight.examine(spec, session.home):
                images.append(seen)
                notes += said
        if existing is None and data_check and spec.worker.checkpoint_store:
            from headsearch.runtime.checkpoints import check_store  # loads torch

            check_store(spec.worker.checkpoint_store)
    study, new = studies.create(session.database, spec)
    for seen in images:
        imagesets.settle(session.database, study, seen)
    return study, new, notes


def run_study(session: Session, study: Study, crew: Crew, watch: Watcher) -> RunResult:
    """Work on a study with processes of this machine until it is complete or a signal ends it.

    Raises:
        WorldError: All workers died, or the database stayed away.
    """
    began = time.monotonic()
    first = snapshots.read(session.database, study.name)
    if first.study.ended:
        return RunResult(first, started=False, interrupted=False, seconds=0.0)
    count = crew.workers or default_workers(crew.device)
    where = f"{count} worker{'s' if count > 1 else ''}, device {crew.device}"
    if crew.workers and 0 < (places := gpu_places(crew.device)) < count:
        where += f" ({count - places} wait: the GPUs here take {places} at a time, see HEADSEARCH_GPU_SLOTS)"
    with (
        drain_on_signal(watch.note) as drain,
        LocalWorkers(study.name, count, device=crew.device, threads=crew.threads, home=session.home) as pool,
    ):
        watch.start(first, f"{where}; logs in {pool.log(0).parent}")
        state, started_at, waiting = "open", time.time(), False
        while True:
            for exited in pool.poll():
                if exited.returncode:
                    watch.note(_obituary(exited))
            alive = pool.alive
            read_at = time.monotonic()
            now = patiently(session, lambda: snapshots.read(session.database, study.name), watch.note)
            read_seconds = time.monotonic() - read_at
            watch.update(now)
            if now.study.ended:
                break
            if not (now.workers or waiting) and (line := _waiting(pool.log(0), started_at)):
                waiting = True  # for other studies' workers: said once
                watch.note(f"worker 0 is {line}")
            if now.study.state != state:
                state = now.study.state
                watch.note(f"study {study.name} is {state}")
            if not alive and not drain.is_set():
                raise WorldError(
                    f"all workers ended before study {study.name} did; see {pool.log(0).parent}, "
                    "then run it again: it goes on where it is"
                )
            if drain.wait(max(POLL_SECONDS, read_seconds / READ_SHARE)):
                pool.stop(study.spec.worker.drain_seconds + STOP_SECONDS)
                now = patiently(session, lambda: snapshots.read(session.database, study.name), watch.note)
                watch.update(now)
                break
    if now.study.state == "complete":
        show_on_dashboard(session, study.name, watch)
    seconds = time.monotonic() - began
    return RunResult(now, started=True, interrupted=not now.study.ended, seconds=seconds)


def show_on_dashboard(session: Session, name: str, watch: Watcher) -> None:
    """Publish figure and note; the search is done, so a failure here is only a note."""
    from headsearch.report.publish import publish  # loads plotly

    try:
        publish(session.database, name)
    except HeadsearchError as error:
        watch.note(f"figure and note were not put on the dashboard: {error}")


def _obituary(exited: ExitedWorker) -> str:
    how = f"killed by signal {-exited.returncode}" if exited.returncode < 0 else f"exit {exited.returncode}"
    then = "started again" if exited.restarted else "not started again"
    reason = _last_line(exited.log)
    return f"worker {exited.index} died ({how}), {then}; {exited.log}{f': {reason}' if reason else ''}"


def _waiting(log: Path, since: float) -> str | None:
    """The line with which a worker says that all GPUs are taken, if that was its last one since a moment."""
    line = _last_line(log)
    return line if line.startswith(WAITING) and log.stat().st_mtime >= since else None


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4000))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:200] if lines else ""

"""Who works on a study right now, and what waits."""

from __future__ import annotations

from typing import Any

from headsearch.report.progress import counts_line
from headsearch.report.tables import Table, duration
from headsearch.search.snapshot import Snapshot, TrialRow, WorkerRow

FORGOTTEN_SECONDS = 3600.0
"""A worker that has been silent for longer is counted, and not listed."""


def waiting(snapshot: Snapshot) -> dict[str, int]:
    """Trials that wait for a worker, by why: `to_begin`, `orphaned`, `paused`."""
    return {
        "to_begin": snapshot.study.spec.trials - len(snapshot.trials) if not snapshot.study.ended else 0,
        "orphaned": snapshot.counts["orphaned"],
        "paused": snapshot.counts["paused"],
    }


def worker_lines(snapshot: Snapshot) -> list[str]:
    """A line for each worker that has not ended, and how long it has been silent."""
    return [
        f"worker {worker.worker_id} on {worker.device}, last heard {duration(worker.seconds_silent)} ago"
        + (" (lost)" if lost(snapshot, worker) else "")
        for worker in snapshot.workers
    ]


def lost(snapshot: Snapshot, worker: WorkerRow) -> bool:
    """It has been silent for longer than a lease."""
    return worker.seconds_silent > snapshot.study.spec.lease.seconds


def trial_of(snapshot: Snapshot, worker: WorkerRow) -> TrialRow | None:
    """What it trains."""
    held = (trial for trial in snapshot.trials if trial.state == "running")
    return next((trial for trial in held if trial.worker_id == worker.worker_id), None)


def status_lines(snapshot: Snapshot) -> list[str]:
    """State and counts, what waits, a table of workers, and every orphan."""
    study, epochs = snapshot.study, snapshot.study.spec.budget.epochs
    waits = waiting(snapshot)
    unheld = f"{waits['to_begin']} to begin, {waits['orphaned']} orphaned; {waits['paused']} paused at a rung"
    lines = [
        f"study {study.name} is {study.state}: {counts_line(snapshot)}",
        f"waiting for a worker: {unheld}",
    ]
    if study.state == "paused":
        lines.append(f"to go on: headsearch study resume {study.name}")
    listed = [worker for worker in snapshot.workers if worker.seconds_silent < FORGOTTEN_SECONDS]
    rows = []
    for worker in listed:
        trial = trial_of(snapshot, worker)
        rows.append(
            (
                worker.worker_id,
                worker.device,
                str(trial.number) if trial else "",
                f"{trial.epoch}/{epochs}" if trial else "",
                f"{duration(worker.seconds_silent)} ago{' (lost)' if lost(snapshot, worker) else ''}",
            )
        )
    table = Table(
        ("worker", "device", "trial", "epoch", "last heard"),
        tuple(rows),
        more=len(snapshot.workers) - len(listed),
    )
    if rows:
        lines += ["", *table.lines()]
    elif not study.ended:
        lines += ["", f"no worker: headsearch worker --study {study.name}"]
    orphans = [trial for trial in snapshot.trials if trial.state == "orphaned"]
    lines += ["", *(_orphan(trial) for trial in orphans)] if orphans else []
    return lines


def _orphan(trial: TrialRow) -> str:
    why = f"the lease of {trial.worker_id} ran out" if trial.worker_id else "given back"
    return f"trial {trial.number} orphaned at epoch {trial.epoch}: {why}; the next free worker takes it up"


def status_json(snapshot: Snapshot) -> dict[str, Any]:
    """The same as plain data."""
    workers = []
    for worker in snapshot.workers:
        trial = trial_of(snapshot, worker)
        workers.append(
            {
                **vars(worker),
                "lost": lost(snapshot, worker),
                "trial": trial.number if trial else None,
                "epoch": trial.epoch if trial else None,
            }
        )
    return {
        "study": snapshot.study.name,
        "state": snapshot.study.state,
        "counts": dict(snapshot.counts),
        "waiting": waiting(snapshot),
        "workers": workers,
        "orphaned": [trial.number for trial in snapshot.trials if trial.state == "orphaned"],
    }

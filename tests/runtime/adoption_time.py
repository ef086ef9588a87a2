"""How long a trial stands still when its worker is killed.

    python tests/runtime/adoption_time.py [--leases 2 10] [--repeats 5]

Starts an embedded PostgreSQL in a temporary folder, in memory where there is room, and a study of one long
trial of tiny epochs. One worker trains it and another waits for work; the first gets SIGKILL. Measured are the
seconds from there to the other's line ``adopted``, and to its first report in the database: an epoch that
nobody had reported. The other is then the one to kill.

A report renews the lease, and epochs are short here, so almost the whole lease is ahead when the worker dies.
With long epochs up to a third less is. A free worker looks for work twice a second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import text

from headsearch.runtime.session import Session, open_session
from headsearch.search import snapshot, studies
from headsearch.spec import StudySpec

PATIENCE_SECONDS = 120
STUDY = {
    "mode": "points",
    "points": [{"head.kind": "mlp", "head.projection_dim": 16, "head.width": 16}],
    "budget": {"epochs": 100_000},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
    },
}


@dataclass
class Worker:
    """A worker process and when it said what."""

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def start(cls, study: str) -> Worker:
        command = [sys.executable, "-m", "headsearch", "worker", "--study", study, "--threads", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        worker = cls(process)
        threading.Thread(target=worker._listen, daemon=True).start()
        return worker

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    def said(self, words: str) -> float | None:
        """When it first said so, in seconds of the epoch."""
        return next((at for at, line in self.lines if words in line), None)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--leases", type=float, nargs="+", default=[2.0, 10.0], metavar="SECONDS")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with session() as opened:
        show(f"{'lease':>6} {'repeat':>7} {'adopted':>8} {'first report':>13}   seconds after SIGKILL")
        for lease in options.leases:
            rows = list(measure(opened, lease, options.repeats))
            for repeat, row in enumerate(rows, start=1):
                show(f"{lease:6.0f} {repeat:7} {row[0]:8.2f} {row[1]:13.2f}")
            adopted, reported = (statistics.median(column) for column in zip(*rows, strict=True))
            show(f"{lease:6.0f}  median {adopted:8.2f} {reported:13.2f}")


@contextmanager
def session() -> Iterator[Session]:
    """A home and an embedded server of our own, for the workers too."""
    memory = Path("/dev/shm")
    home = tempfile.mkdtemp(prefix="headsearch-adoption-", dir=memory if memory.is_dir() else None)
    Path(home).chmod(0o755)  # PostgreSQL may run as another user
    for name in ("HEADSEARCH_DATABASE_URL", "HEADSEARCH_DATABASE_URL_FILE"):
        os.environ.pop(name, None)
    os.environ |= {"HEADSEARCH_HOME": home, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        with open_session() as opened:
            yield opened
    finally:
        shutil.rmtree(home, ignore_errors=True)


def measure(opened: Session, lease: float, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds from each kill to the line and to the report."""
    spec = STUDY | {"name": f"lease-{lease:g}", "lease": {"seconds": lease, "max_attempts": 1000}}
    study = studies.create(opened.database, StudySpec.model_validate(spec))[0]
    workers = [Worker.start(study.name)]
    try:
        wait_for(lambda: reports(opened, study) > 2)
        for _ in range(repeats):
            workers.append(Worker.start(study.name))
            yield adoption(opened, study, *workers[-2:])
    finally:
        for worker in workers:
            worker.kill()


def adoption(opened: Session, study: studies.Study, first: Worker, second: Worker) -> tuple[float, float]:
    """Kill the first worker while the second waits."""
    wait_for(lambda: len(snapshot.read(opened.database, study.name).workers) == 2)
    time.sleep(1.5)  # it has looked for work now
    attempt = snapshot.read(opened.database, study.name).trials[0].attempt
    killed = time.time()
    first.kill()
    wait_for(lambda: second.said("trial 0 adopted") and reports(opened, study, attempt) > 2)
    return (second.said("trial 0 adopted") or 0) - killed, first_report(opened, study, attempt) - killed


def reports(opened: Session, study: studies.Study, after: int = 0) -> int:
    """Reports stored in attempts after this one."""
    return int(query(opened, study, "count(*)", after))


def first_report(opened: Session, study: studies.Study, after: int) -> float:
    """When the first of them was stored, in seconds of the epoch; the server has our clock."""
    return float(query(opened, study, "extract(epoch FROM min(reported_at))", after))


def query(opened: Session, study: studies.Study, what: str, after: int) -> float:
    with opened.database.begin() as connection:
        return connection.execute(
            text(f"SELECT {what} FROM headsearch.reports WHERE study_id = :study_id AND attempt > :after"),
            {"study_id": study.study_id, "after": after},
        ).scalar_one()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"it did not happen in {PATIENCE_SECONDS} s")
        time.sleep(0.05)


def show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

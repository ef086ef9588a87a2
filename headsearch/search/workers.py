"""Workers as the database knows them: who, where, and when they last answered."""

from __future__ import annotations

import os
import secrets
import socket

from sqlalchemy import text

from headsearch import __version__
from headsearch.search.database import Database
from headsearch.search.studies import Study


def register(database: Database, study: Study, *, device: str, threads: int) -> str:
    """Enter this process; returns its id, ``host:pid:random``."""
    host = socket.gethostname()
    worker_id = f"{host}:{os.getpid()}:{secrets.token_hex(3)}"
    with database.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO headsearch.workers (worker_id, study_id, host, pid, device, threads, version) "
                "VALUES (:worker_id, :study_id, :host, :pid, :device, :threads, :version)"
            ),
            {
                "worker_id": worker_id,
                "study_id": study.study_id,
                "host": host,
                "pid": os.getpid(),
                "device": device,
                "threads": threads,
                "version": __version__,
            },
        )
    return worker_id


def beat(database: Database, worker_id: str) -> None:
    """Say that this worker answers, be it one that was taken for lost."""
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE headsearch.workers SET beat_at = clock_timestamp(), ended_at = NULL "
                "WHERE worker_id = :worker_id"
            ),
            {"worker_id": worker_id},
        )


def leave(database: Database, worker_id: str) -> None:
    """Say that this worker ends."""
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE headsearch.workers SET beat_at = clock_timestamp(), ended_at = clock_timestamp() "
                "WHERE worker_id = :worker_id"
            ),
            {"worker_id": worker_id},
        )

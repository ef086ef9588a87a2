"""What tests of the embedded server share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2

from headsearch.runtime.database import libpq_url
from headsearch.runtime.postgres import EmbeddedServer

USER_OF_SERVER = """
import sys
import tempfile
from pathlib import Path
from headsearch.runtime.postgres import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
with server.attach() as handle:
    print(server.status().pid, handle.url(), flush=True)
    sys.stdin.read()
"""


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement and commit."""
    connection = psycopg2.connect(libpq_url(url))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def kill_postmaster(server: EmbeddedServer) -> int:
    pid = server.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.status().running)
    return pid


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def spawn(state_dir: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """A process that uses the server until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", USER_OF_SERVER, str(state_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip

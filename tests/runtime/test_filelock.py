"""Locks conflict, are shared, and die with their holder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from headsearch.runtime.filelock import FileLock


def test_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    shared = [FileLock.acquire(path, shared=True) for _ in range(2)]
    assert all(shared)
    assert FileLock.acquire(path, timeout=0.05) is None
    for lock in shared:
        lock.release()
    code = "import fcntl, sys; fcntl.flock(f := open(sys.argv[1]), 2); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as holder:
        holder.stdout.readline()
        assert FileLock.acquire(path) is None
        holder.kill()
    with FileLock.acquire(path, timeout=5) as lock:
        assert lock.fd >= 0
    assert lock.fd == -1

"""The lease of a GPU between two processes: taken, seen by others, and handed on when its holder is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headsearch.runtime.gpulocks import Holder, holders
from headsearch.runtime.gpus import Gpu

HOLDER = Path(__file__).parents[1] / "runtime" / "gpu_holder.py"
PATIENCE_SECONDS = 60.0


def hand_on(gpu: Gpu, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Let one process take `gpu` and another wait for it, kill the first, and see the second take it.

    `environment` is the processes'; its PATH has the nvidia-smi. `folder` is for locks and output. Raises
    AssertionError where a part of it is not as it should be.
    """
    locks = folder / "locks"
    named = {
        "HEADSEARCH_GPU_LOCKS": str(locks),
        "HEADSEARCH_GPU_SLOTS": "1",
        "CUDA_VISIBLE_DEVICES": gpu.uuid,
    }
    began = time.monotonic()
    with holding(folder / "first.log", environment | named) as first:
        got = first.wait_for(first.got, "a lease")
        taken = time.monotonic() - began
        assert got["uuid"] == got["visible"] == gpu.uuid, got
        (seen,) = holders(gpu, 1, locks)
        assert isinstance(seen, Holder), "nobody seems to hold it"
        assert seen.pid == first.process.pid, f"{seen} is not process {first.process.pid}"
        with holding(folder / "second.log", environment | named) as second:
            second.wait_for(lambda: "waiting for a GPU" in second.said, "waiting for a GPU")
            assert second.got() is None, "two hold one GPU"
            first.process.kill()
            killed = time.monotonic()
            got = second.wait_for(second.got, "the lease of a process that was killed")
            handed = time.monotonic() - killed
            assert got["uuid"] == gpu.uuid, got
            (seen,) = holders(gpu, 1, locks)
            assert isinstance(seen, Holder), "nobody seems to hold it now"
            assert seen.pid == second.process.pid, f"{seen} is not process {second.process.pid}"
    assert holders(gpu, 1, locks) == [None], "a process that has ended holds it"
    return {"gpu": str(gpu), "taken_seconds": taken, "handed_on_seconds": handed}


class Holding:
    """A process that takes a lease and keeps it, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._log.read_text()

    def got(self) -> dict[str, Any] | None:
        """What it holds; None while it waits."""
        return next((json.loads(line) for line in self.said.splitlines() if line.startswith("{")), None)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """What `condition` comes to when it is true. AssertionError if that takes too long, or the process ends."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            ended = self.process.poll() is not None
            assert not ended, f"no {what}, it ended with {self.process.returncode}: {self.said}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_SECONDS:g} s: {self.said}"
            time.sleep(0.005)
        return found


@contextmanager
def holding(log: Path, environment: dict[str, str]) -> Iterator[Holding]:
    """Within: a process that asks for a lease; killed at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(HOLDER), "cuda"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield Holding(process, log)
    finally:
        process.kill()
        process.wait()


def with_path(first: Path | None = None) -> dict[str, str]:
    """This process's environment, with `first` before the rest of its PATH."""
    path = [str(first)] if first else []
    return os.environ | {"PATH": os.pathsep.join([*path, os.environ.get("PATH", "")])}

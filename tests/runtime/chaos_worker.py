"""A worker process that dies at a point of its work when it is told to.

An order is a file named after a point. The first worker that comes there takes the order, which only one
can, and sends itself SIGKILL. Loaded once in a fork server, so that starting a worker costs no imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headsearch.core.checkpoint import CheckpointFolder
from headsearch.runtime import worker as worker_module
from headsearch.search import claims, history, leases, outcomes
from headsearch.search.claims import Claim, Idle

POINTS = (
    "asked, not inserted",
    "claimed, not committed",
    "claimed, not begun",
    "in the middle of a checkpoint",
    "checkpoint saved, not reported",
    "report not committed",
    "reported",
    "arriving at a rung",
    "paused",
    "promoting",
    "last report stored, outcome not",
    "outcome stored, not told",
    "told, not committed",
)


class Orders:
    """Orders to die, as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def give(self, point: str) -> None:
        (self.folder / point).touch()

    def withdraw(self, point: str) -> bool:
        """True if nobody had taken it."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / point).unlink()
            return True
        return False

    def taken(self, point: str) -> bool:
        return not (self.folder / point).exists()

    def obey(self, point: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / point).rename(self.folder / f".{point}-{os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)


def work(study: str, orders_folder: str, log: str, environment: dict[str, str]) -> None:
    """Be a worker that obeys; its lines go to `log`.

    A fork server has the environment of whichever test was the first to need one.
    """
    os.environ.clear()
    os.environ.update(environment)
    orders = Orders(Path(orders_folder))
    with Path(log).open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with obedient(orders):
            worker_module.run_worker(study, device="cpu", threads=1, say=lambda line: print(line, file=file))


@contextlib.contextmanager
def obedient(orders: Orders) -> Iterator[None]:
    """Put the points into the product's functions. The process ends with the block, so nothing is put back."""

    def after(owner: Any, name: str, point: str, when: Callable[[Any], bool] = lambda _: True) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if when(result):
                orders.obey(point)
            return result

        setattr(owner, name, outer)

    def before(owner: Any, name: str, point: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            orders.obey(point)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    after(claims._Decision, "_optuna_trial", "asked, not inserted")
    after(claims._Decision, "make", "claimed, not committed", lambda found: isinstance(found, Claim))
    after(worker_module, "claim", "claimed, not begun", lambda found: not isinstance(found, Idle))
    after(CheckpointFolder, "save", "checkpoint saved, not reported")
    before(leases, "report", "report not committed")
    after(leases, "report", "reported")
    before(leases, "arrive", "arriving at a rung")
    after(leases, "arrive", "paused", lambda verdict: verdict == "paused")
    after(claims._Decision, "_promotable", "promoting", lambda number: number is not None)
    before(outcomes, "finish", "last report stored, outcome not")
    before(outcomes, "tell_decided", "outcome stored, not told")

    after(history, "end", "told, not committed")

    saving = False
    save, fsync = CheckpointFolder.save, os.fsync

    def saved(self: CheckpointFolder, state: Any) -> None:
        nonlocal saving
        saving = True
        save(self, state)
        saving = False

    def synced(descriptor: int) -> None:
        point = "in the middle of a checkpoint"
        if saving and not orders.taken(point):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            orders.obey(point)
        fsync(descriptor)

    CheckpointFolder.save = saved  # type: ignore[method-assign]
    os.fsync = synced
    yield

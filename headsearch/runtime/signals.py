"""The first SIGTERM or Ctrl-C asks a process to finish what it is at; the second ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


class Drain(threading.Event):
    """Set once a process is asked to stop; knows for how long it has been."""

    def __init__(self) -> None:
        super().__init__()
        self._since: float | None = None

    def set(self) -> None:
        """Ask to stop."""
        if self._since is None:
            self._since = time.monotonic()
        super().set()

    @property
    def seconds(self) -> float:
        """Since it was asked; 0 where it was not."""
        return time.monotonic() - self._since if self._since is not None else 0.0


@contextmanager
def drain_on_signal(say: Callable[[str], None], *, parent: int | None = None) -> Iterator[Drain]:
    """An event that the first signal sets; also set once the process `parent` is no longer ours.

    The second signal ends the process at once with exit code 130: what it held becomes an orphan, which
    another worker adopts when the lease runs out.
    """
    drain = Drain()

    def on_signal(number: int, _: FrameType | None) -> None:
        if drain.is_set():
            os._exit(INTERRUPTED)
        drain.set()
        say(
            f"{signal.Signals(number).name}: finishing this epoch, then giving the trial back; again to abort"
        )

    def watch_parent(pid: int) -> None:
        while not drain.wait(1.0):
            if os.getppid() != pid:
                drain.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    if parent is not None:
        threading.Thread(target=watch_parent, args=(parent,), name="parent", daemon=True).start()
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

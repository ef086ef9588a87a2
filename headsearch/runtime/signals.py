"""The first SIGTERM or Ctrl-C asks a process to finish what it is at; the second ends it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


@contextmanager
def drain_on_signal(say: Callable[[str], None], *, parent: int | None = None) -> Iterator[threading.Event]:
    """An event that the first signal sets; also set once the process `parent` is no longer ours.

    The second signal ends the process at once with exit code 130: what it held becomes an orphan, which
    another worker adopts when the lease runs out.
    """
    drain = threading.Event()

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

"""The first SIGTERM or Ctrl-C asks a process to finish what it is at; the second ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Drain(threading.Event):
    """Set once a process is asked to stop; knows for how long it has been."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = "finishing this epoch, then giving the trial back"
        """What the first signal makes this process do, for people."""
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

    Signals are heard by a thread, over the file descriptor that Python's C handler writes to: a handler in
    Python would wait for the main thread, which may be in a driver or a library for long, and could not set
    an event that the main thread is about to wait for.
    """
    drain = Drain()
    near, far = socket.socketpair()
    far.setblocking(False)

    def listen() -> None:
        heard = 0
        while content := near.recv(1):
            if content[0] not in SIGNALS:
                continue
            heard += 1
            if heard > 1:
                os._exit(INTERRUPTED)
            drain.set()
            say(f"{signal.Signals(content[0]).name}: {drain.answer}; again to abort")

    def watch_parent(pid: int) -> None:
        while not drain.wait(1.0):
            if os.getppid() != pid:
                drain.set()

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    if parent is not None:
        threading.Thread(target=watch_parent, args=(parent,), name="parent", daemon=True).start()
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        far.close()
        listener.join(timeout=5)
        near.close()

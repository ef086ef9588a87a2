"""The first SIGTERM or Ctrl-C asks a process to finish what it is at; the second ends it.

SIGUSR1 and SIGUSR2, which clusters send ahead of a time limit and supervisors pass on, ask too, and never end
it however often they come: whoever is told by two messengers is told once.
"""

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
NOTICES = tuple(
    getattr(signal, name)
    for name in ("SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # not on Windows
)


class Drain(threading.Event):
    """Set once a process is asked to stop; knows for how long it has been."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = "finishing this epoch, then giving the trial back"
        """What the first signal makes this process do, for people."""
        self.exit_code = 0
        """Of a process that stops because it was asked to."""
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

    The second SIGTERM or Ctrl-C ends the process at once with exit code 130: what it held becomes an orphan,
    which another worker adopts when the lease runs out.

    Signals are heard by a thread, over the file descriptor that Python's C handler writes to: a handler in
    Python would wait for the main thread, which may be in a driver or a library for long, and could not set
    an event that the main thread is about to wait for.
    """
    drain = Drain()
    near, far = socket.socketpair()
    far.setblocking(False)

    def listen() -> None:
        heard, said = 0, False
        while content := near.recv(1):
            if content[0] not in (*SIGNALS, *NOTICES):
                continue
            heard += content[0] in SIGNALS
            if heard > 1:
                os._exit(INTERRUPTED)
            drain.set()
            if not said:
                said = True
                again = "; again to abort" if heard else ""
                name = signal.Signals(content[0]).name
                say(f"{name}: {drain.answer}{again}")

    def watch_parent(pid: int) -> None:
        while not drain.wait(1.0):
            if os.getppid() != pid:
                drain.set()

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in (*SIGNALS, *NOTICES)}
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

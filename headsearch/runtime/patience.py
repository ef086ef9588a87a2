"""Waiting for a database that is away: it costs time, never a trial."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from headsearch.errors import DatabaseError, HeadsearchError
from headsearch.runtime.session import Session

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
HURRIED_SECONDS = 5.0
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0


def patiently(
    session: Session,
    call: Callable[[], T],
    say: Callable[[str], None],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    hurry: threading.Event | None = None,
) -> T:
    """Call, and call again while the database is away, with growing pauses.

    Everything called so is safe to repeat: the claim, reports and outcomes are written once however
    often they are said. Once `hurry` is set, there are five more seconds.

    Raises:
        DatabaseError: It stayed away for longer than `patience_seconds`.
    """
    hurry = hurry or threading.Event()
    deadline = time.monotonic() + patience_seconds
    wait, told, hurried = FIRST_WAIT_SECONDS, False, False
    while True:
        try:
            result = call()
        except DatabaseError as error:
            if hurry.is_set() and not hurried:
                deadline, hurried = min(deadline, time.monotonic() + HURRIED_SECONDS), True
                wait = FIRST_WAIT_SECONDS
            if not error.transient or time.monotonic() + wait > deadline:
                raise
            if not told:
                left = max(0.0, deadline - time.monotonic())
                shown = f"{left / 60:.0f} minutes" if left > 100 else f"{left:.0f} s"
                say(f"{error}; trying again for {shown}")
                told = True
            if hurried:
                time.sleep(wait)
            else:
                hurry.wait(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
            revive(session)
        else:
            if told:
                say("the database answers again")
            return result


def revive(session: Session) -> None:
    """Start the embedded server if it died; one that cannot be started is tried again later."""
    with contextlib.suppress(HeadsearchError, OSError):
        session.revive()

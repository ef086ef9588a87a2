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


class Reasons:
    """Why the database is away: each reason is said once in an outage, whenever it comes up.

    The first is often not the one that lasts: connections are cut, then the new password is refused.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told: set[str] = set()

    def tell(self, error: DatabaseError, then: str) -> None:
        """Say why, and what is done about it, unless it is known."""
        if str(error) not in self._told:
            self._told.add(str(error))
            self._say(f"{error}; {then}")

    def forget(self) -> bool:
        """Call when it answers. True if any had been told."""
        told = bool(self._told)
        self._told.clear()
        return told


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
    wait, hurried = FIRST_WAIT_SECONDS, False
    reasons = Reasons(say)
    while True:
        try:
            result = call()
        except DatabaseError as error:
            if hurry.is_set() and not hurried:
                deadline, hurried = min(deadline, time.monotonic() + HURRIED_SECONDS), True
                wait = FIRST_WAIT_SECONDS
            if not error.transient or time.monotonic() + wait > deadline:
                raise
            left = max(0.0, deadline - time.monotonic())
            shown = f"{left / 60:.0f} minutes" if left > 100 else f"{left:.0f} s"
            reasons.tell(error, f"trying again for {shown}")
            if hurried:
                time.sleep(wait)
            else:
                hurry.wait(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
            revive(session)
        else:
            if reasons.forget():
                say("the database answers again")
            return result


def revive(session: Session) -> None:
    """Start the embedded server if it died; one that cannot be started is tried again later."""
    with contextlib.suppress(HeadsearchError, OSError):
        session.revive()

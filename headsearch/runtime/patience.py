"""Waiting for a database that is away: it costs time, never a trial."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from headsearch.errors import DatabaseError, ServerError
from headsearch.runtime.session import Session

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0


def patiently(
    session: Session,
    call: Callable[[], T],
    say: Callable[[str], None],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> T:
    """Call, and call again while the database is away, with growing pauses.

    Everything called so is safe to repeat: the claim, reports and outcomes are written once however
    often they are said.

    Raises:
        DatabaseError: It stayed away for longer than `patience_seconds`.
    """
    deadline = time.monotonic() + patience_seconds
    wait, told = FIRST_WAIT_SECONDS, False
    while True:
        try:
            result = call()
        except DatabaseError as error:
            if not error.transient or time.monotonic() + wait > deadline:
                raise
            if not told:
                say(f"{error}; trying again for {patience_seconds / 60:.0f} minutes")
                told = True
            time.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
            with contextlib.suppress(DatabaseError, ServerError):
                session.revive()
        else:
            if told:
                say("the database answers again")
            return result

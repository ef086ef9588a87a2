"""Lines for people, from places where nothing may go wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def unbreakable(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` which a closed pipe, or a full disk under a log, cannot stop: training is worth more."""

    def saying(line: str) -> None:
        # RuntimeError: a signal handler that speaks while the same stream is being written to.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            say(line)

    return saying

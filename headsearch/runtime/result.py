"""What a worker says of itself when it leaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerResult:
    """What a worker did."""

    ended: int
    """Trials that it brought to an end."""
    failed: int
    """Of those, failures."""
    drained: bool
    """It was asked to stop before the study was complete."""

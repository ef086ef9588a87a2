"""How torch's threads on the CPU wait for work, decided before torch is loaded."""

from __future__ import annotations

import os
from typing import Final

SPINS: Final = "10000"
"""Looks for work before a thread sleeps: some tens of microseconds. GNU's OpenMP looks for milliseconds, on
cores that the threads which make views between two passes of the encoder want: views took three times as
long."""


def spin_briefly() -> None:
    """Set it for this process and those that it starts, unless the user has."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

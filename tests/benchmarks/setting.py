"""What a run of first_light is asked for, and what its steps share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


@dataclass(frozen=True)
class Setting:
    """The run."""

    out: Path
    """Where results go."""
    home: Path
    """HEADSEARCH_HOME of the run."""
    device: str
    smoke: bool
    """Toy sizes, to see that everything runs."""
    data: Path | None
    """CIFAR-10's images, train/<class>/*, test/<class>/*."""
    epochs: int
    """Of the published training."""
    commit: str | None = None

    @property
    def on_gpu(self) -> bool:
        """The device is a CUDA device."""
        return self.device.startswith("cuda")


class Say(Protocol):
    """Writes a row of the step that runs."""

    def __call__(self, name: str, values: Mapping[str, Any], *, failed: str = "", left_out: str = "") -> None:
        """`failed` says why a part of the step is not as it should be, `left_out` why it was not run."""


class LeftOut(Exception):
    """Raised by a step that cannot run here; its text says what is missing."""


class Clock:
    """The time that a step has left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

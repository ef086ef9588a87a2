"""What whoever iterates over a training may ask of it while it is inside an epoch."""

from __future__ import annotations

from typing import Literal, Protocol

Verdict = Literal["go on", "save", "stop"]


class Control(Protocol):
    """Asked between the steps of an epoch and after it; must answer at once, without waiting for a device."""

    def at_epoch(self, epoch: int) -> None:
        """Hear that the steps of this epoch begin."""

    def at_step(self) -> Verdict:
        """`save` has a checkpoint written in the middle of the epoch, `stop` ends the training after one.

        What it raises ends the training without a checkpoint.
        """

    def at_report(self, epoch: int) -> None:
        """Hear that the steps are done and the report begins."""

    def save_after(self, epoch: int) -> bool:
        """Say whether the checkpoint of this epoch is to be written; that of the last one always is."""


class EveryEpoch:
    """A checkpoint after every epoch and none inside."""

    def at_epoch(self, epoch: int) -> None:
        """Take no notice."""

    def at_step(self) -> Verdict:
        """Go on."""
        return "go on"

    def at_report(self, epoch: int) -> None:
        """Take no notice."""

    def save_after(self, epoch: int) -> bool:  # noqa: ARG002
        """Write it."""
        return True

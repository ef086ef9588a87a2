"""One claim's training under watch: when to save, when to stop, and what to do when it no longer moves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from headsearch.core.control import Verdict
from headsearch.errors import FailureReason, LeaseLost, TrialFailure
from headsearch.resilience import WorkerSpec
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.signals import Drain

EXIT_STUCK: Final = 75
"""Exit code of a worker whose trial was stuck: start it again (EX_TEMPFAIL of sysexits.h)."""
GRACE_SECONDS: Final = 10.0
"""Beyond a limit, for the training to notice it by itself at its next step."""
LOOK_SECONDS: Final = 0.5
ESCAPE_SECONDS: Final = 10.0
ASLEEP_SECONDS: Final = 5.0
"""Between two readings of a clock that is read twice a second."""

Escape = Callable[[FailureReason | None, str], None]
"""Gives the trial up from the watching thread: as a failure that may be tried again, or, without a reason,
as given back."""


class WakingClock:
    """Seconds that this process was awake.

    A process that is suspended (Ctrl-Z, a batch system's hold) must not find, when it wakes, that its step
    has taken an hour. Whoever reads the clock first afterwards, the training or its watch, notices the gap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asleep = 0.0
        self._read_at = time.monotonic()

    def read(self) -> float:
        """Like `time.monotonic`, less the time asleep; read it more often than every few seconds."""
        with self._lock:
            now = time.monotonic()
            if now - self._read_at > ASLEEP_SECONDS:
                self._asleep += now - self._read_at
            self._read_at = now
            return now - self._asleep


class Watch:
    """Answers a training's questions (`core.control.Control`), and looks at it from a thread of its own.

    A training that cannot answer, because a step hangs or a probe outlasts every limit, cannot be stopped
    inside this process: `escape` gives its trial up, and the process ends.
    """

    def __init__(self, spec: WorkerSpec, rungs: tuple[int, ...], keeper: LeaseKeeper, drain: Drain) -> None:
        self._spec, self._rungs, self._keeper, self._drain = spec, rungs, keeper, drain
        self._clock = WakingClock()
        self._saved_at = self._clock.read()
        self._epoch = 0
        # Read by the thread; each is replaced whole.
        self._epoch_began: float | None = None
        self._step_began: float | None = None
        self.leaving = False
        """The last epoch was saved because the trial is about to be given back."""

    def at_epoch(self, epoch: int) -> None:
        """Note that its steps begin."""
        self._epoch, self._step_began = epoch, self._clock.read()

    def at_step(self) -> Verdict:
        """Save when the last checkpoint is old, stop when the drain time is over.

        Raises:
            LeaseLost: Another worker holds the trial, so what this one would save is not wanted.
            TrialFailure: The epoch has taken too long.
        """
        now = self._step_began = self._clock.read()
        if self._keeper.lost.is_set():
            raise LeaseLost(self._keeper.loss)
        if self._drain.is_set() and self._drain.seconds > self._spec.drain_seconds:
            return "stop"
        if self._late(now):
            raise TrialFailure("epoch_time", f"epoch {self._epoch}: {self._limit()}")
        if now - self._saved_at > 60 * self._spec.checkpoint_minutes:
            self._saved_at = now
            return "save"
        return "go on"

    def at_report(self, epoch: int) -> None:  # noqa: ARG002
        """Note that no step is under way."""
        self._step_began = None

    def save_after(self, epoch: int) -> bool:
        """At the interval, at rungs, and when the trial is about to be given back.

        Raises LeaseLost as `at_step`.
        """
        if self._keeper.lost.is_set():
            raise LeaseLost(self._keeper.loss)
        now = self._clock.read()
        # Asked once: whoever leaves after this epoch must have its checkpoint.
        self.leaving = self._drain.is_set() or self._keeper.study_state != "open"
        due = (
            self.leaving
            or epoch % self._spec.checkpoint_epochs == 0
            or epoch in self._rungs
            or now - self._saved_at > 60 * self._spec.checkpoint_minutes
        )
        if due:
            self._saved_at = now
        return due

    def working(self) -> None:
        """Note that an epoch, or the final probe, begins with what it has to load."""
        self._epoch_began, self._step_began = self._clock.read(), None

    def resting(self) -> None:
        """Note that nothing is under way that limits are for."""
        self._epoch_began = self._step_began = None

    @contextmanager
    def looking(self, escape: Escape) -> Iterator[None]:
        """Look twice a second inside the block; the thread calls `escape` before it ends the process."""
        self._saved_at, self.leaving = self._clock.read(), False
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(escape, stop), name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()

    def _look(self, escape: Escape, stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            now, step_began = self._clock.read(), self._step_began
            reason: FailureReason | None = None
            if step_began is not None and now - step_began > self._spec.step_limit_seconds:
                reason, what = "hung", f"no step for {now - step_began:.0f} s"
            elif self._late(now - GRACE_SECONDS):
                reason, what = "epoch_time", self._limit()
            elif self._drain.is_set() and self._drain.seconds > self._spec.drain_seconds + GRACE_SECONDS:
                what = f"no step within {self._drain.seconds:.0f} s of the signal"
            else:
                continue
            if stop.is_set():
                return
            # A database that does not answer must not hold the process.
            attempt = threading.Thread(target=escape, args=(reason, what), name="escape", daemon=True)
            attempt.start()
            attempt.join(ESCAPE_SECONDS)
            if stop.is_set():  # it moved after all, and heard that the trial is not its own any more
                return
            os._exit(EXIT_STUCK if reason else self._drain.exit_code)

    def _late(self, now: float) -> bool:
        limit, began = self._spec.epoch_limit_minutes, self._epoch_began
        return limit is not None and began is not None and now - began > 60 * limit

    def _limit(self) -> str:
        return f"it took longer than worker.epoch_limit_minutes = {self._spec.epoch_limit_minutes:g}"

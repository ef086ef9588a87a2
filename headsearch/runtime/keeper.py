"""The thread that speaks to the database while a trial trains: renewals, the worker's beat, reports.

Training never waits for the database. A report is handed over and stored in the background; when the
database is away, reports queue in their order and are stored when it is back. They need no file of their own:
a report is in its trial's checkpoint, or is made again, the same to the bit, from the checkpoint before, so
whoever takes the trial up says what was not stored. The checkpoint may be written after the report is stored;
a report that is made again then is not stored twice.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from headsearch.errors import DatabaseError, HeadsearchError, LeaseLost
from headsearch.runtime.lines import first_line, unbreakable
from headsearch.runtime.patience import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Reasons, revive
from headsearch.runtime.session import Session
from headsearch.search import leases, workers
from headsearch.search.leases import Report
from headsearch.search.studies import Study, StudyState
from headsearch.search.work import Claim

BEATS_PER_LEASE = 3


class LeaseKeeper:
    """Keeps the lease on the current claim and stores its reports, in a thread of its own.

    The lease is renewed three times in its length, so that an epoch may be longer than it. A lease that
    went to another worker ends that and sets `lost`.
    """

    def __init__(
        self, session: Session, study: Study, worker_id: str, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._session, self._study, self._worker_id = session, study, worker_id
        self._database = session.database.brief()
        self._say = unbreakable(say)
        self._reasons = Reasons(self._say)
        self._claim: Claim | None = None
        self._queue: deque[Report] = deque()
        self._sending = False
        self._away_since: float | None = None
        self._error: DatabaseError | None = None
        # Guards what is above; `_changed` wakes whoever waits for it to change.
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.lost = threading.Event()
        self.loss = ""
        """Why the lease is lost."""
        self.study_state: StudyState = study.state
        """As last heard."""

    @contextlib.contextmanager
    def running(self) -> Iterator[LeaseKeeper]:
        """Beat inside the block."""
        self._thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            self._thread.join(timeout=5)

    @contextlib.contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew this claim inside the block, and store its reports."""
        with self._changed:
            self.lost.clear()
            self._claim, self._queue = claim, deque()
            # Only an open study gives claims; what was heard before is of another time.
            self.study_state = "open"
        try:
            yield
        finally:
            with self._changed:
                self._claim, self._queue = None, deque()
                # No statement of this claim may still be under way after the block.
                self._changed.wait_for(lambda: not self._sending, timeout=LONGEST_WAIT_SECONDS)

    def put(self, report: Report) -> None:
        """Have a report of the current claim stored."""
        with self._changed:
            self._queue.append(report)
            self._changed.notify_all()

    def check(self, patience_seconds: float) -> None:
        """See that the trial is still ours and the database not away for too long.

        Raises:
            LeaseLost: Another worker holds the trial.
            DatabaseError: It has been away for longer, or refuses what we say.
        """
        with self._changed:
            self._check(patience_seconds)

    def settle(self, patience_seconds: float, hurry: threading.Event) -> None:
        """Wait until every report is stored. Raises as `check`; at once if away while `hurry` is set."""
        with self._changed:
            while self._queue or self._sending:
                self._check(0.0 if hurry.is_set() else patience_seconds)
                self._changed.wait(0.5)
            self._check(patience_seconds)

    def _check(self, patience_seconds: float) -> None:
        if self.lost.is_set():
            raise LeaseLost(self.loss)
        if not self._thread.is_alive():
            raise DatabaseError("the thread that keeps the lease has ended", transient=False)
        if self._error is None or self._away_since is None:
            return
        away = time.monotonic() - self._away_since
        if away > patience_seconds or not self._error.transient:
            raise self._error

    def _run(self) -> None:
        interval = self._study.spec.lease.seconds / BEATS_PER_LEASE
        # Workers that are started together do not speak all at once.
        beat_at, wait = time.monotonic() + interval * random.Random().uniform(0.5, 1.0), 0.0
        while True:
            with self._changed:
                now = time.monotonic()
                ready = bool(self._queue) and wait == 0.0
                if not self._stopped and not ready:
                    self._changed.wait(max(0.0, wait or beat_at - now))
                if self._stopped:
                    return
                wait, self._sending = 0.0, True
                claim, report = self._claim, self._queue[0] if self._queue else None
            try:
                if claim is not None and report is not None:
                    self.study_state = leases.report(self._database, self._study, claim, report)
                    with self._changed:
                        if self._queue and self._queue[0] is report:
                            self._queue.popleft()
                elif time.monotonic() >= beat_at or self._away_since is not None:
                    workers.beat(self._database, self._worker_id)
                    if claim is not None and not self.lost.is_set():
                        self.study_state = leases.renew(self._database, self._study, claim)
                    beat_at = time.monotonic() + interval
                self._answered()
            except LeaseLost as error:
                self._lose(claim, error)
            except DatabaseError as error:
                wait = self._away(error)
            except Exception as error:  # noqa: BLE001 - whoever trains must hear of it, or would wait for ever
                line = f"{type(error).__name__}: {first_line(error)}"
                wait = self._away(DatabaseError(line, transient=False))
            finally:
                with self._changed:
                    self._sending = False
                    self._changed.notify_all()

    def _answered(self) -> None:
        if self._away_since is not None:
            away = time.monotonic() - self._away_since
            self._away_since = self._error = None
            self._reasons.forget()
            self._say(f"the database answers again after {away:.0f} s")

    def _away(self, error: DatabaseError) -> float:
        """Note that it is away; returns the seconds until the next try."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        self._reasons.tell(error, "training goes on, reports wait")
        self._error = error
        revive(self._session)
        return min(LONGEST_WAIT_SECONDS, max(FIRST_WAIT_SECONDS, now - self._away_since))

    def _lose(self, claim: Claim | None, error: HeadsearchError) -> None:
        with self._changed:
            if claim is self._claim:
                self._queue.clear()
                self.loss = str(error)
                self.lost.set()

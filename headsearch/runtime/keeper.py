"""The thread that renews a worker's lease while its trial trains."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from headsearch.errors import DatabaseError, LeaseLost
from headsearch.runtime.session import Session
from headsearch.search import leases, workers
from headsearch.search.claims import Claim
from headsearch.search.studies import Study

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3


class LeaseKeeper:
    """Renews the lease on the current claim three times in its length, and the worker's beat.

    Runs beside training, so that an epoch may be longer than a lease. A database that is away is tried
    again at the next beat; a lease that went to another worker ends the renewing and sets `lost`.
    """

    def __init__(self, session: Session, study: Study, worker_id: str) -> None:
        self._session, self._study, self._worker_id = session, study, worker_id
        self._claim: Claim | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[LeaseKeeper]:
        """Beat inside the block."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(timeout=5)

    @contextlib.contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew this claim inside the block."""
        self.lost.clear()
        with self._lock:
            self._claim = claim
        try:
            yield
        finally:
            # Under the lock, so that no renewal of this claim is still under way after the block.
            with self._lock:
                self._claim = None

    def _run(self) -> None:
        while not self._stop.wait(self._study.spec.lease.seconds / BEATS_PER_LEASE):
            with self._lock, contextlib.suppress(DatabaseError):
                try:
                    workers.beat(self._session.database, self._worker_id)
                    if self._claim is not None and not self.lost.is_set():
                        leases.renew(self._session.database, self._study, self._claim)
                except LeaseLost as error:
                    logger.warning("%s", error)
                    self.lost.set()

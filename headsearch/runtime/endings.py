"""How a worker parts with a trial: ended, given back, set back to be tried again, or escaped from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from headsearch.core.checkpoint import Checkpoints
from headsearch.errors import DatabaseError, FailureReason, HeadsearchError, LeaseLost
from headsearch.report import protocols
from headsearch.runtime.checkpoints import open_checkpoints
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.patience import patiently
from headsearch.runtime.session import Session
from headsearch.runtime.signals import Drain
from headsearch.search import leases, outcomes, workers
from headsearch.search.outcomes import Outcome
from headsearch.search.studies import Study
from headsearch.search.work import Claim

T = TypeVar("T")


class Endings:
    """A worker's ways to part with the trial it holds, and the count of those it brought to an end."""

    def __init__(
        self,
        session: Session,
        study: Study,
        worker_id: str,
        keeper: LeaseKeeper,
        drain: Drain,
        say: Callable[[str], None],
    ) -> None:
        self._session, self._study, self._worker_id = session, study, worker_id
        self._keeper, self._drain, self._say = keeper, drain, say
        self.patience_seconds = 60 * study.spec.worker.database_patience_minutes
        self.ended = self.failed = 0

    def patiently(self, call: Callable[[], T]) -> T:
        """Call while the database is away, for as long as the study says. Raises DatabaseError then."""
        return patiently(
            self._session, call, self._say, patience_seconds=self.patience_seconds, hurry=self._drain
        )

    def settle(self) -> None:
        """Wait until all reports are stored. Raises LeaseLost, DatabaseError."""
        self._keeper.settle(self.patience_seconds, self._drain)

    def checkpoints(self, work: Claim) -> Checkpoints:
        """Where the trial's checkpoints are, as those of this attempt."""
        return open_checkpoints(
            self._session.home,
            self._study.folder,
            work.number,
            self._study.spec.worker.checkpoint_store,
            generation=work.attempt,
        )

    def end(self, work: Claim, outcome: Outcome) -> None:
        """Tell an outcome, after all reports. Raises DatabaseError when the database stays away."""
        try:
            self.settle()
            self.patiently(
                lambda: outcomes.finish(
                    self._session.database,
                    self._study,
                    work.number,
                    work.attempt,
                    outcome,
                    worker_id=work.worker_id,
                )
            )
        except LeaseLost as error:
            self._say(f"{error}; its outcome is theirs to tell")
            return
        accuracy = outcome.facts.get("probe_accuracy")
        images = protocols.validation(self._study.spec.train_on)
        shown = f"accuracy {accuracy:.4f} ({images})" if accuracy is not None else outcome.message
        self._say(f"trial {work.number} {outcome.state}: {shown}")
        self.failed += outcome.state == "failed"
        self.ended_here(work)

    def ended_here(self, work: Claim) -> None:
        """Count a trial that has ended, and remove its checkpoints; no thread may be writing one any more."""
        self.ended += 1
        try:
            self.checkpoints(work).remove()
        except HeadsearchError as error:
            self._say(f"{error}; it is not needed any more")

    def set_back(self, work: Claim, reason: FailureReason, message: str) -> None:
        """Count it as a loss; the trial is tried again, or has failed too often."""
        self._settle_quietly()
        try:
            then = self.patiently(
                lambda: leases.set_back(
                    self._session.database, self._study, work, reason=reason, message=message
                )
            )
        except LeaseLost as error:
            self._say(f"{error}; going on with the next trial")
            return
        again = "it will be tried again" if then == "again" else "it has failed"
        self._say(f"trial {work.number}: {message}; {again}")
        if then == "failed":
            self.failed += 1
            self.ended_here(work)

    def give_back(self, work: Claim) -> bool:
        """Let others have the trial; false where it is not ours any more."""
        self._settle_quietly()
        try:
            patiently(
                self._session,
                lambda: leases.give_back(self._session.database, self._study, work),
                self._say,
                patience_seconds=5,
            )
            self._say(f"trial {work.number} given back")
        except LeaseLost as error:
            self._say(f"{error}; going on with the next trial")
            return False
        except HeadsearchError as error:
            self._say(f"trial {work.number} could not be given back ({error}); its lease will run out")
        return True

    def escape(self, work: Claim, reason: FailureReason | None, what: str) -> None:
        """Give the trial up from another thread, before this process ends.

        Does not wait for a checkpoint that is being written: it may hang with the training. Its file is of
        this attempt, and so older than any of the next one, which goes on from the checkpoint before.
        """
        self._say(f"trial {work.number}: {what}; this worker ends")
        try:
            if reason is None:
                leases.give_back(self._session.database, self._study, work)
            else:
                leases.set_back(self._session.database, self._study, work, reason=reason, message=what)
            workers.leave(self._session.database, self._worker_id)
        except HeadsearchError as error:
            self._say(f"trial {work.number} could not be given back ({error}); its lease will run out")

    def leave(self, reason: FailureReason | None, what: str) -> None:  # noqa: ARG002
        """Say, from another thread, that this process ends while it holds nothing."""
        self._say(f"{what}; this worker ends")
        try:
            workers.leave(self._session.database, self._worker_id)
        except HeadsearchError as error:
            self._say(f"{error}; this worker leaves without saying so")

    def _settle_quietly(self) -> None:
        """Store the reports that came before; whoever takes the trial up says those that are not."""
        try:
            self.settle()
        except DatabaseError as error:
            self._say(f"{error}; the last reports are not stored, and will be said again")
        except LeaseLost:
            pass  # what follows hears of it too, and says so

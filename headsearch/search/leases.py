"""What a worker says of the trial it holds: renewals, reports, pauses, giving back.

Every statement names the claim's attempt, so a worker whose trial went to another can change
nothing: it gets LeaseLost. A lease that ran out but was not taken is still its worker's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Connection, text

from headsearch.errors import FailureReason, LeaseLost
from headsearch.search import outcomes
from headsearch.search.database import Database
from headsearch.search.outcomes import Outcome
from headsearch.search.rungs import worthy
from headsearch.search.standings import standings
from headsearch.search.studies import Study, StudyState
from headsearch.search.work import Claim


@dataclass(frozen=True)
class Report:
    """What a trial says after an epoch."""

    epoch: int
    """From 1."""
    loss: float
    probe_accuracy: float
    """On the validation split, 0 to 1."""
    feature_rank: float
    projection_rank: float
    views_per_second: float
    train_seconds: float
    """Since the trial's first step, over all its workers."""
    measures: dict[str, float] = field(default_factory=dict)
    """Named numbers beside the accuracy; those that are not finite are left out."""


def describe(
    database: Database, study: Study, claim: Claim, *, projection_dim: int, head_parameters: int
) -> None:
    """Say what is known of the head before training."""
    with database.begin() as connection:
        _held(
            connection,
            study,
            claim,
            "projection_dim = :projection_dim, head_parameters = :head_parameters",
            projection_dim=projection_dim,
            head_parameters=head_parameters,
        )


def renew(database: Database, study: Study, claim: Claim) -> StudyState:
    """Extend the lease by its whole length from now, on the database's clock; returns the study's state."""
    with database.begin() as connection:
        return _held(
            connection,
            study,
            claim,
            "lease_until = clock_timestamp() + make_interval(secs => :lease)",
            lease=study.spec.lease.seconds,
        )


def report(database: Database, study: Study, claim: Claim, said: Report) -> StudyState:
    """Store a report once; saying it again changes nothing. Returns the study's state."""
    with database.begin() as connection:
        state = _held(
            connection,
            study,
            claim,
            "epoch = greatest(epoch, :epoch), "
            "lease_until = clock_timestamp() + make_interval(secs => :lease)",
            epoch=said.epoch,
            lease=study.spec.lease.seconds,
        )
        connection.execute(
            text(
                """
                INSERT INTO headsearch.reports
                    (study_id, number, epoch, loss, probe_accuracy, feature_rank, projection_rank,
                     views_per_second, train_seconds, measures, attempt)
                VALUES (:study_id, :number, :epoch, :loss, :probe_accuracy, :feature_rank,
                        :projection_rank, :views_per_second, :train_seconds, CAST(:measures AS jsonb),
                        :attempt)
                ON CONFLICT DO NOTHING
                """
            ),
            asdict(said)
            | {
                "study_id": study.study_id,
                "number": claim.number,
                "attempt": claim.attempt,
                "measures": json.dumps({k: v for k, v in said.measures.items() if math.isfinite(v)}),
            },
        )
    return state


def arrive(database: Database, study: Study, claim: Claim) -> Literal["paused", "go on", "ended"]:
    """At the rung `claim.stop_at`: pause, or by the rule `stop` go on or end.

    A trial with other seeds beside it pauses by the rule `stop` as well: only a claim, which holds the
    study's lock, can tell that all of them are there. The report of that epoch, and the checkpoint, must be
    stored before.
    """
    if study.spec.pruning.rule == "promote" or (claim.stop_at is not None and len(study.spec.seeds) > 1):
        with database.begin() as connection:
            _held(connection, study, claim, "state = 'paused', lease_until = NULL")
        return "paused"
    if claim.stop_at is None:
        return "go on"
    with database.begin() as connection:
        decided = connection.scalar(
            # Also where it is told: the answer to an end may be lost, and the rung have room by now.
            text(f"SELECT outcome IS NOT NULL FROM headsearch.trials WHERE {_CLAIMED}"),  # noqa: S608
            _names(study, claim),
        )
        best = (
            []
            if decided
            else worthy(standings(database, connection, study, claim.stop_at), study.spec.pruning.eta)
        )
        if claim.number in best:
            # Named rather than counted up, so that saying it twice passes one rung.
            _held(
                connection,
                study,
                claim,
                "rung = :passed",
                passed=study.spec.rungs.index(claim.stop_at) + 1,
            )
            return "go on"
    if decided:
        # We said so before and did not hear the answer; trials that came since change nothing.
        outcomes.tell_decided(database, study, claim.number)
        return "ended"
    outcome = Outcome(
        "pruned",
        message=f"not among the best at epoch {claim.stop_at}",
        facts={"pruned_at_epoch": claim.stop_at},
    )
    outcomes.finish(database, study, claim.number, claim.attempt, outcome, worker_id=claim.worker_id)
    return "ended"


def past_rung(study: Study, claim: Claim) -> Claim:
    """The claim of a trial that went on at its rung, with the next rung to stop at."""
    later = [rung for rung in study.spec.rungs if claim.stop_at is not None and rung > claim.stop_at]
    return replace(claim, stop_at=later[0] if later else None)


def give_back(database: Database, study: Study, claim: Claim) -> None:
    """Let another worker take the trial at once; it does not count as a loss."""
    with database.begin() as connection:
        _held(connection, study, claim, "worker_id = NULL, lease_until = clock_timestamp()")


def set_back(
    database: Database, study: Study, claim: Claim, *, reason: FailureReason, message: str
) -> Literal["again", "failed"]:
    """Count what happened as a loss: another try follows, or, after too many, the trial fails with `reason`.

    For what another worker, or a new process, may not meet: a step that hangs, memory that others took.
    """
    with database.begin() as connection:
        row = connection.execute(
            text(
                f"UPDATE headsearch.trials SET losses = losses + 1, history = history || {outcomes.EVENT}, "  # noqa: S608
                "worker_id = NULL, lease_until = clock_timestamp(), "
                "outcome = CASE WHEN losses + 1 >= :most THEN CAST(:outcome AS jsonb) ELSE outcome END "
                f"WHERE {_HELD} RETURNING outcome IS NOT NULL AS failed"
            ),
            _names(study, claim)
            | {
                "what": reason,
                "most": study.spec.lease.max_attempts,
                "outcome": outcomes.storable(Outcome("failed", reason=reason, message=message)),
            },
        ).first()
        if row is None:
            raise _loss(connection, study, claim)
    if row.failed:
        outcomes.tell_decided(database, study, claim.number)
    return "failed" if row.failed else "again"


_CLAIMED = "study_id = :study_id AND number = :number AND attempt = :attempt AND worker_id = :worker_id"
_HELD = f"{_CLAIMED} AND state = 'running'"


def _names(study: Study, claim: Claim) -> dict[str, Any]:
    return {
        "study_id": study.study_id,
        "number": claim.number,
        "attempt": claim.attempt,
        "worker_id": claim.worker_id,
    }


def _held(connection: Connection, study: Study, claim: Claim, change: str, **values: Any) -> StudyState:
    """Apply `change` to the claim's row and return the study's state, or raise LeaseLost."""
    row = connection.execute(
        text(
            f"UPDATE headsearch.trials SET {change} WHERE {_HELD} "  # noqa: S608
            "RETURNING (SELECT state FROM headsearch.studies WHERE study_id = :study_id) AS study_state"
        ),
        _names(study, claim) | values,
    ).first()
    if row is None:
        raise _loss(connection, study, claim)
    state: StudyState = row.study_state
    return state


def _loss(connection: Connection, study: Study, claim: Claim) -> LeaseLost:
    """Why the claim's row is not ours any more."""
    row = connection.execute(
        text(
            "SELECT state, outcome->>'reason' AS reason FROM headsearch.trials "
            "WHERE study_id = :study_id AND number = :number"
        ),
        _names(study, claim),
    ).first()
    if row is None:
        return LeaseLost(f"trial {claim.number}: deleted with its study")
    if row.reason == "cancelled":
        return LeaseLost(f"trial {claim.number}: cancelled")
    return LeaseLost(f"trial {claim.number}: another worker holds it now")

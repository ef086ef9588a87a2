"""What people do to a study while workers are on it: pause, resume, requeue, cancel, upgrade.

Each holds the lock that claims hold, so it falls between two claims and never into one. Workers learn of
it with their next renewal, report or claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, text

from headsearch import __version__
from headsearch.errors import InputError
from headsearch.search import outcomes, studies
from headsearch.search.database import Database, lock_claims
from headsearch.search.outcomes import Outcome
from headsearch.search.studies import Study


def pause(database: Database, name: str) -> Study:
    """Let workers give their trials back after the epoch, and begin none until the study is resumed.

    Pausing twice changes nothing.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: It has ended.
    """
    with _between_claims(database, name) as (connection, study):
        state = _state(connection, study)
        if state not in ("open", "paused"):
            raise InputError(f"study {name!r}: is {state}; only an open one can be paused")
        _set_state(connection, study, "paused")
    return studies.get(database, name)


def resume(database: Database, name: str) -> Study:
    """Open a paused or cancelled study again; what was cancelled stays so until it is requeued.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: It is complete.
    """
    with _between_claims(database, name) as (connection, study):
        if _state(connection, study) == "complete":
            raise InputError(
                f"study {name!r}: is complete; failed trials can be requeued: headsearch study requeue {name}"
            )
        _set_state(connection, study, "open")
    return studies.get(database, name)


def requeue(
    database: Database, name: str, numbers: Sequence[int] = (), *, reason: str | None = None
) -> list[int]:
    """Have failed trials trained again, under new numbers; opens the study where it had ended.

    So are the seeds beside a failed one that were pruned: their point was judged, or ended, without it.

    Args:
        database: Where the study is.
        name: The study's.
        numbers: Which; none named, all that failed.
        reason: Only those that failed for it.

    Returns:
        The numbers of the trials whose points will be trained again.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: A trial is not there, or has not failed; nothing is requeued then.
    """
    with _between_claims(database, name) as (connection, study):
        rows = _rows(connection, study, numbers)
        if numbers:
            for row in rows:
                if row.state != "failed" or row.requeued:
                    state = "requeued" if row.requeued else row.state
                    raise InputError(f"trial {row.number}: is {state}; only failed trials can be requeued")
        chosen = [
            row.number
            for row in rows
            if row.state == "failed" and not row.requeued and reason in (None, row.outcome["reason"])
        ]
        if chosen:
            chosen = _with_pruned_seeds(connection, study, chosen)
            connection.execute(
                text(
                    "UPDATE headsearch.trials SET requeued = true, "  # noqa: S608
                    f"history = history || {outcomes.EVENT} "
                    "WHERE study_id = :study_id AND number = ANY(:numbers)"
                ),
                {"study_id": study.study_id, "numbers": chosen, "what": "requeued"},
            )
            if _state(connection, study) != "paused":
                _set_state(connection, study, "open")
    return chosen


def cancel(database: Database, name: str, numbers: Sequence[int] = ()) -> list[int]:
    """End trials, or the whole study: what runs fails with reason `cancelled`, what is paused is pruned.

    Workers that hold such a trial are fenced: they store nothing more of it. May be repeated if it was cut
    short.

    Args:
        database: Where the study is.
        name: The study's.
        numbers: Trials to cancel; none named, the study and all its unfinished trials.

    Returns:
        The numbers of the trials that ended so.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: The study is complete, or a trial is not there or has ended.
    """
    with _between_claims(database, name) as (connection, study):
        if _state(connection, study) == "complete":
            raise InputError(f"study {name!r}: is complete; there is nothing to cancel")
        rows = _rows(connection, study, numbers)
        for row in rows:
            if numbers and row.state not in ("running", "paused"):
                raise InputError(f"trial {row.number}: is {row.state} already")
        by_hand = Outcome("failed", reason="cancelled", message="cancelled by a person")
        before = set(outcomes.pending(connection, study.study_id))
        _decide(connection, study, by_hand, numbers)
        if not numbers:
            why = "paused at epoch %s when the study was cancelled"
            outcomes.prune_paused(connection, study.study_id, why=why)
            _set_state(connection, study, "cancelled")
        decided = outcomes.pending(connection, study.study_id)
    for number in decided:
        outcomes.tell_decided(database, study, number)
    if not numbers:
        with _between_claims(database, name) as (connection, study):
            outcomes.fail_strays(database, connection, study)
    return [number for number in decided if number not in before]


def upgrade(database: Database, name: str) -> Study:
    """Let this version's workers go on with a study of another version; its trials are then of both.

    Raises:
        UnknownStudyError: There is no such study.
    """
    with _between_claims(database, name) as (connection, study):
        connection.execute(
            text("UPDATE headsearch.studies SET version = :version WHERE study_id = :study_id"),
            {"study_id": study.study_id, "version": __version__},
        )
    return studies.get(database, name)


def check_version(study: Study) -> None:
    """Refuse to train trials of a study that another version made.

    Raises:
        InputError: It did; the message says what can be done. Patch releases change no results.
    """
    if study.version.split(".")[:2] != __version__.split(".")[:2]:
        raise InputError(
            f"study {study.name!r}: is of headsearch {study.version}, this is {__version__}, whose results "
            f"may differ: install headsearch=={study.version} here, or accept both: "
            f"headsearch study upgrade {study.name}"
        )


@contextmanager
def _between_claims(database: Database, name: str) -> Iterator[tuple[Connection, Study]]:
    """A transaction in which no claim of the study is made, and the study."""
    study = studies.get(database, name)
    with database.begin() as connection:
        lock_claims(connection, study.study_id)
        yield connection, study


def _state(connection: Connection, study: Study) -> str:
    return str(
        connection.scalar(
            text("SELECT state FROM headsearch.studies WHERE study_id = :study_id"),
            {"study_id": study.study_id},
        )
    )


def _set_state(connection: Connection, study: Study, state: str) -> None:
    connection.execute(
        text(
            "UPDATE headsearch.studies SET state = :state, "
            "completed_at = CASE WHEN :state = 'cancelled' "
            "THEN coalesce(completed_at, clock_timestamp()) END WHERE study_id = :study_id"
        ),
        {"study_id": study.study_id, "state": state},
    )


def _rows(connection: Connection, study: Study, numbers: Sequence[int]) -> list[Any]:
    """The trials of these numbers, or all. Raises InputError for a number that is not there."""
    rows = connection.execute(
        text(
            "SELECT number, state, requeued, outcome FROM headsearch.trials WHERE study_id = :study_id "
            "AND (number = ANY(:numbers) OR :all) ORDER BY number FOR UPDATE"
        ),
        {"study_id": study.study_id, "numbers": list(numbers), "all": not numbers},
    ).all()
    missing = sorted(set(numbers) - {row.number for row in rows})
    if missing:
        raise InputError(f"trial {missing[0]}: study {study.name!r} has none of this number")
    return list(rows)


def _with_pruned_seeds(connection: Connection, study: Study, numbers: Sequence[int]) -> list[int]:
    """`numbers`, and the pruned trials of the same points."""
    rows = connection.scalars(
        text(
            "SELECT number FROM headsearch.trials WHERE study_id = :study_id AND NOT requeued "
            "AND (number = ANY(:numbers) OR state = 'pruned' AND point_key IN (SELECT point_key "
            "FROM headsearch.trials WHERE study_id = :study_id AND number = ANY(:numbers))) ORDER BY number"
        ),
        {"study_id": study.study_id, "numbers": list(numbers)},
    )
    return list(rows)


def _decide(connection: Connection, study: Study, outcome: Outcome, numbers: Sequence[int]) -> None:
    """Give the trials that are undecided this outcome: running ones, and paused ones that are named."""
    connection.execute(
        text(
            "UPDATE headsearch.trials SET attempt = attempt + 1, outcome = CAST(:outcome AS jsonb) "
            "WHERE study_id = :study_id AND outcome IS NULL AND "
            "(state = 'running' AND :all OR state IN ('running', 'paused') AND number = ANY(:numbers))"
        ),
        {
            "study_id": study.study_id,
            "outcome": outcomes.storable(outcome),
            "all": not numbers,
            "numbers": list(numbers),
        },
    )

"""What becomes of a trial, decided in one place.

              claim                        tell
    (new) ----------> RUNNING (leased) -----------> COMPLETE | FAILED (reason)
                       |    ^   |   ^
          lease ran    |    |   |   |  promoted: a worker takes it up again from its checkpoint
          out, or      v    |   v   |
          given back  RUNNING   PAUSED at a rung ---- budget spent, nothing qualifies ----> PRUNED
                      (orphaned)
                       adopted by a worker, from the checkpoint;
                       after `lease.max_attempts` losses: FAILED (lost)

To Optuna, paused and orphaned trials are RUNNING; COMPLETE, PRUNED and FAIL are told once.

Telling takes three steps, each safe to repeat: the outcome is written to our row (only by the worker
whose claim is the latest), Optuna is told, our row takes its final state. A worker that dies between
them leaves an orphan with an outcome; whoever adopts it tells what was decided and trains nothing.

Nothing else in headsearch calls `tell`. A trial that another client finished or deleted meanwhile is
left as it is.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from pydantic import ValidationError
from sqlalchemy import Connection, text

from headsearch.errors import LeaseLost
from headsearch.search import history
from headsearch.search.database import Database, quietly, translated
from headsearch.search.studies import Study
from headsearch.space import Params

FinalState = Literal["complete", "pruned", "failed"]
OPTUNA_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Outcome:
    """The end of a trial."""

    state: FinalState
    values: tuple[float, ...] | None = None
    """One per objective, in the spec's order; only of a complete trial."""
    reason: str | None = None
    """Of a failure, one of `errors.FailureReason`."""
    message: str | None = None
    """One line for people."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the page and the tables show: accuracies, device, seconds, configuration."""


def finish(
    database: Database,
    study: Study,
    number: int,
    attempt: int,
    outcome: Outcome,
    *,
    worker_id: str | None = None,
) -> None:
    """End a trial that the caller holds, as `worker_id` where that is given.

    An outcome that is decided stays: saying the same again is well, saying another comes too late.

    Raises:
        LeaseLost: Another worker holds it; nothing was told.
        DatabaseError: Not reachable; call again, or leave it to whoever adopts the trial.
    """
    names = {
        "outcome": storable(outcome),
        "study_id": study.study_id,
        "number": number,
        "attempt": attempt,
        "worker_id": worker_id,
    }
    with database.begin() as connection:
        written = connection.execute(
            text(
                "UPDATE headsearch.trials SET outcome = CAST(:outcome AS jsonb) "
                "WHERE study_id = :study_id AND number = :number AND attempt = :attempt "
                "AND state = 'running' AND worker_id = coalesce(:worker_id, worker_id) "
                "AND (outcome IS NULL OR outcome = CAST(:outcome AS jsonb))"
            ),
            names,
        )
        if written.rowcount == 0:
            told = connection.scalar(
                text(
                    "SELECT finished_at IS NOT NULL AND outcome = CAST(:outcome AS jsonb) "
                    "FROM headsearch.trials WHERE study_id = :study_id AND number = :number "
                    "AND attempt = :attempt"
                ),
                names,
            )
            if told:
                return
            raise LeaseLost(f"trial {number}: another worker holds it now")
    tell_decided(database, study, number)


EVENT = (
    "jsonb_build_object('what', CAST(:what AS text), 'worker', worker_id, 'attempt', attempt, "
    "'epoch', epoch, 'at', clock_timestamp())"
)
"""SQL of an entry in a trial's history, of the row as it stands."""


def lost(history: list[dict[str, Any]], last: str, epoch: int) -> str:
    """The outcome, as our row holds it, of a trial that was lost too often, lastly by worker `last`."""
    before = [f"{event['what']} by {event['worker']} at epoch {event['epoch']}" for event in history]
    told = "; ".join([*before, f"lost by {last} at epoch {epoch}"])
    return storable(Outcome("failed", reason="lost", message=f"{len(before) + 1} times: {told}"))


def strays(connection: Connection, study: Study, *states: str) -> list[int]:
    """Optuna's ids of trials that only Optuna has, in one of `states`, the oldest first."""
    return list(
        connection.scalars(
            text(
                "SELECT trial_id FROM public.trials o WHERE study_id = :study_id "
                "AND state::text = ANY(:states) "
                "AND NOT EXISTS (SELECT 1 FROM headsearch.trials t WHERE t.trial_id = o.trial_id) "
                "ORDER BY number"
            ),
            {"study_id": study.study_id, "states": list(states)},
        )
    )


def fail_strays(database: Database, connection: Connection, study: Study) -> None:
    """End trials that only Optuna has, in a study that ends: other clients began or enqueued them."""
    with quietly(), translated():
        for trial_id in strays(connection, study, "RUNNING", "WAITING"):
            with contextlib.suppress(UpdateFinishedTrialError):
                database.storage.set_trial_state_values(trial_id, TrialState.FAIL)


def pending(connection: Connection, study_id: int) -> list[int]:
    """Numbers of the trials whose outcome is decided and not told."""
    return list(
        connection.scalars(
            text(
                "SELECT number FROM headsearch.trials WHERE study_id = :study_id AND outcome IS NOT NULL "
                "AND state IN ('running', 'paused') ORDER BY number"
            ),
            {"study_id": study_id},
        )
    )


def prune_paused(connection: Connection, study_id: int) -> list[int]:
    """Decide that all paused trials of a study end here; returns the numbers of all that are to be told."""
    connection.execute(
        text(
            """
            UPDATE headsearch.trials SET outcome = jsonb_build_object(
                'state', 'pruned', 'values', NULL, 'reason', NULL,
                'message', format('not among the best at epoch %s', epoch),
                'facts', jsonb_build_object('pruned_at_epoch', epoch))
            WHERE study_id = :study_id AND state = 'paused' AND outcome IS NULL
            """
        ),
        {"study_id": study_id},
    )
    return pending(connection, study_id)


def tell_decided(database: Database, study: Study, number: int) -> None:
    """Tell Optuna the outcome that our row has, then give the row its final state."""
    with database.begin() as connection:
        row = connection.execute(
            text(
                """
                SELECT t.trial_id, t.outcome, t.params, t.seed, t.worker_id, t.device,
                       t.projection_dim, t.head_parameters, t.losses, t.history,
                       r.epoch, r.probe_accuracy, r.views_per_second, r.train_seconds
                FROM headsearch.trials t
                LEFT JOIN LATERAL (
                    SELECT * FROM headsearch.reports
                    WHERE study_id = t.study_id AND number = t.number ORDER BY epoch DESC LIMIT 1) r ON true
                WHERE t.study_id = :study_id AND t.number = :number AND t.outcome IS NOT NULL
                AND t.state IN ('running', 'paused')
                """
            ),
            {"study_id": study.study_id, "number": number},
        ).one_or_none()
    if row is None:
        return  # told by another worker, or deleted with its study
    outcome: dict[str, Any] = row.outcome
    attributes = {
        "seed": row.seed,
        "worker": row.worker_id,
        "host": row.worker_id and row.worker_id.rsplit(":", 2)[0],
        "device": row.device,
        "epochs": row.epoch,
        "projection_dim": row.projection_dim,
        "head_parameters": row.head_parameters,
        "last_report_accuracy": row.probe_accuracy,
        "views_per_second": row.views_per_second,
        "train_seconds": row.train_seconds,
        "losses": row.losses,
        "history": row.history or None,
        "reason": outcome["reason"],
        "message": outcome["message"],
        "config": _config(study, row.params, row.seed),
    } | outcome["facts"]
    with quietly(), translated():
        try:
            with database.begin() as connection:
                history.write(
                    connection,
                    "trial_user_attributes",
                    row.trial_id,
                    {key: value for key, value in attributes.items() if value is not None},
                )
            database.storage.set_trial_state_values(
                row.trial_id, OPTUNA_STATES[outcome["state"]], outcome["values"]
            )
        except (UpdateFinishedTrialError, KeyError, ValueError):
            # Another client finished or deleted it. Its word stands in Optuna, ours in our row.
            optuna.logging.get_logger("optuna").debug("trial %d was ended elsewhere", number)
    with database.begin() as connection:
        connection.execute(
            text(
                """
                UPDATE headsearch.trials
                SET state = outcome->>'state', lease_until = NULL, finished_at = clock_timestamp()
                WHERE study_id = :study_id AND number = :number AND state IN ('running', 'paused')
                """
            ),
            {"study_id": study.study_id, "number": number},
        )


def _config(study: Study, params: Params, seed: int) -> dict[str, Any]:
    """The trial's configuration, or its bare parameters where they make none: that is why it failed."""
    try:
        return study.spec.trial_config(params, seed).model_dump(mode="json")
    except ValidationError:
        return dict(params)


def storable(outcome: Outcome) -> str:
    """The outcome as our row holds it.

    JSON that PostgreSQL takes: no NUL, no half of a surrogate pair, no number that is not finite.
    """
    tree = asdict(outcome)
    if outcome.message is not None:
        tree["message"] = outcome.message.encode("utf-8", "replace").decode().replace("\0", "")
    tree["facts"] = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in outcome.facts.items()
    }
    return json.dumps(tree, allow_nan=False)

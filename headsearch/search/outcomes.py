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

Here a trial is a run: one seed of a point. Optuna has one trial for each point, which is RUNNING until all
seeds of the point have ended, and is told once: COMPLETE with the means of its seeds, PRUNED where the point
was pruned, FAIL where a seed failed (`points.state_of`).

Telling takes two steps, each safe to repeat: the outcome is written to our row (only by the worker whose
claim is the latest); then our row takes its final state, and Optuna is told in the same transaction if it is
the last of its point. A worker that dies between them leaves an orphan with an outcome; whoever adopts it
tells what was decided and trains nothing.

Nothing else in headsearch calls `tell`. A trial that another client finished or deleted meanwhile is
left as it is.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from pydantic import ValidationError
from sqlalchemy import Connection, Row, text

from headsearch.errors import LeaseLost
from headsearch.search import history
from headsearch.search.database import Database, quietly, translated
from headsearch.search.points import mean_values, state_of, told_of_seeds
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


def strays(connection: Connection, study: Study, *states: str, left_out: str = "true") -> list[int]:
    """Optuna's ids of trials in one of `states` that no row of ours has, the oldest first.

    `left_out` is SQL that says which of our rows count.
    """
    return list(
        connection.scalars(
            text(
                "SELECT trial_id FROM public.trials o WHERE study_id = :study_id "  # noqa: S608
                "AND state::text = ANY(:states) AND NOT EXISTS ("
                f"SELECT 1 FROM headsearch.trials t WHERE t.trial_id = o.trial_id AND {left_out}) "
                "ORDER BY number"
            ),
            {"study_id": study.study_id, "states": list(states)},
        )
    )


def fail_strays(database: Database, connection: Connection, study: Study) -> None:
    """End trials of Optuna's that nothing becomes of, in a study that ends.

    Other clients began or enqueued them, or a study was cancelled before all seeds of a point were begun.
    """
    with quietly(), translated():
        for trial_id in strays(connection, study, "RUNNING", "WAITING", left_out="t.finished_at IS NULL"):
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


def prune_paused(
    connection: Connection,
    study_id: int,
    numbers: Sequence[int] | None = None,
    *,
    why: str = "not among the best at epoch %s",
) -> list[int]:
    """Decide that all paused trials of a study end here, or those of `numbers`.

    Returns the numbers of all that are to be told.
    """
    connection.execute(
        text(
            """
            UPDATE headsearch.trials SET outcome = jsonb_build_object(
                'state', 'pruned', 'values', NULL, 'reason', NULL,
                'message', format(:why, epoch),
                'facts', jsonb_build_object('pruned_at_epoch', epoch))
            WHERE study_id = :study_id AND state = 'paused' AND outcome IS NULL
            AND (:all OR number = ANY(:numbers))
            """
        ),
        {"study_id": study_id, "why": why, "all": numbers is None, "numbers": list(numbers or ())},
    )
    return pending(connection, study_id)


def tell_decided(database: Database, study: Study, number: int) -> None:
    """Give a run that is decided its final state, and tell Optuna of its point where it is the last one."""
    while True:
        with database.begin() as connection:
            runs = _runs_beside(connection, study, number)
            if not any(run.number == number and run.pending for run in runs):
                return  # told by another worker, or deleted with its study
            told = state_of([run.outcome for run in runs], len(study.spec.seeds))
            if told is not None:
                _describe(connection, study, runs)
        with database.begin() as connection:
            # One after another, so that whoever decides last sees what all others decided; and no run is
            # requeued meanwhile.
            again = _runs_beside(connection, study, number, locking=True)
            if not any(run.number == number and run.pending for run in again):
                return
            if told != state_of([run.outcome for run in again], len(study.spec.seeds)):
                continue
            if told is not None:
                # Where another client finished or deleted it, its word stands in Optuna, ours in our rows.
                values = mean_values([run.outcome for run in again]) if told == "complete" else None
                history.end(connection, again[0].trial_id, OPTUNA_STATES[told], values)
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
            return


def _runs_beside(
    connection: Connection, study: Study, number: int, *, locking: bool = False
) -> Sequence[Row[Any]]:
    """The runs of a run's point, itself among them, as the database has them now."""
    return connection.execute(
        text(
            f"""
            SELECT t.number, t.trial_id, t.outcome, t.params, t.seed, t.worker_id, t.device,
                   t.projection_dim, t.head_parameters, t.losses, t.history, t.epoch,
                   t.outcome IS NOT NULL AND t.state IN ('running', 'paused') AS pending
            FROM headsearch.trials t
            WHERE t.study_id = :study_id AND NOT t.requeued AND t.point_key = (
                SELECT point_key FROM headsearch.trials WHERE study_id = :study_id AND number = :number)
            ORDER BY t.number {"FOR UPDATE OF t" if locking else ""}
            """  # noqa: S608
        ),
        {"study_id": study.study_id, "number": number},
    ).all()


def _describe(connection: Connection, study: Study, runs: Sequence[Row[Any]]) -> None:
    """Write what Optuna's page shows of a point on its trial."""
    last = {
        row.number: row
        for row in connection.execute(
            text(
                "SELECT DISTINCT ON (number) number, epoch, probe_accuracy, views_per_second, train_seconds "
                "FROM headsearch.reports WHERE study_id = :study_id AND number = ANY(:numbers) "
                "ORDER BY number, epoch DESC"
            ),
            {"study_id": study.study_id, "numbers": [run.number for run in runs]},
        )
    }
    shown = [_shown(study, run, last.get(run.number)) for run in runs]
    if len(study.spec.seeds) == 1:
        attributes = shown[0] | runs[0].outcome["facts"]
    else:
        rows = [{"number": run.number, **one} for run, one in zip(runs, shown, strict=True)]
        attributes = told_of_seeds(rows, [run.outcome for run in runs], len(study.spec.seeds))
    history.write(
        connection,
        "trial_user_attributes",
        runs[0].trial_id,
        {key: value for key, value in attributes.items() if value is not None},
    )


def _shown(study: Study, run: Row[Any], last: Row[Any] | None) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "worker": run.worker_id,
        "host": run.worker_id and run.worker_id.rsplit(":", 2)[0],
        "device": run.device,
        "epochs": last and last.epoch,
        "projection_dim": run.projection_dim,
        "head_parameters": run.head_parameters,
        "last_report_accuracy": last and last.probe_accuracy,
        "views_per_second": last and last.views_per_second,
        "train_seconds": last and last.train_seconds,
        "losses": run.losses,
        "history": run.history or None,
        "reason": run.outcome["reason"],
        "message": run.outcome["message"],
        "config": _config(study, run.params, run.seed),
    }


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

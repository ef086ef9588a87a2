"""Claims: what a worker that is free does next, decided in one transaction.

In this order: an orphan is adopted (its lease ran out, or its worker gave it back), a paused trial
that earned its next epochs is promoted (the deepest rung first), a new trial is begun while the budget
lasts: the next seed of a point that was begun, before a new point. When nothing is left to do but
others still train, the worker waits: their reports may promote a trial, or they may die. When nothing is
left at all, the paused trials are pruned and the study is complete.

The whole decision holds an advisory lock of the study, so the budget is exact and no two workers
take the same trial however close they come. A process that dies while it holds the lock loses it with
its connection, and leaves nothing: a new trial becomes Optuna's and ours in the same transaction. A RUNNING
trial of Optuna's that our table does not know was begun by another client; the next claim for a new trial
takes that one, with its number and any parameters it has.

With several seeds the point is what earns its next epochs (`points`). Its trials wait at a rung until all of
them are there, are judged by their mean, and go on one after another, ahead of whatever else there is to do.
By the rule `stop` they are judged at the first claim after the last of them came, and end together.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Row, text

from headsearch.errors import UnknownStudyError
from headsearch.search import history, outcomes, promotions
from headsearch.search.database import Database, lock_claims, quietly, translated
from headsearch.search.feasibility import learned
from headsearch.search.history import Seen
from headsearch.search.points import INFEASIBLE, running_trial
from headsearch.search.sampling import distributions, make_sampler, propose, taught
from headsearch.search.studies import Study
from headsearch.search.work import Claim, Idle, point_key
from headsearch.space import Params
from headsearch.spec import StudySpec

MODEL_NEEDS_COMPLETE = 4
"""Complete trials before a sampler models: Optuna's TPE treats all others as bad, so with fewer it
would know only what to avoid."""

FIRST_TURN_SECONDS, LONGEST_TURN_SECONDS = 0.01, 0.2
"""Between two tries at a claim while others decide theirs."""

TOLD_AT_ONCE = 8
"""Outcomes that one claim tells before it decides again; others who are free tell the rest."""


def claim(database: Database, study: Study, worker_id: str, device: str) -> Claim | Idle:
    """Take the next piece of work for `worker_id`.

    Others wait for the lock in line. Behind a pooler they ask again and again instead, and hold no connection
    meanwhile: of its few, all would be with those who wait, and none with those who report.

    Raises:
        UnknownStudyError: The study was deleted.
        DatabaseError: Not reachable; nothing was taken, or what was taken will be an orphan.
    """
    in_line, turn = database.direct, FIRST_TURN_SECONDS
    while True:
        decided: list[int] = []
        with database.begin() as connection:
            ours = lock_claims(connection, study.study_id, wait=in_line)
            if ours:
                result = _Decision(database, connection, study, worker_id, device).make(decided)
        if not ours:
            time.sleep(turn * random.uniform(0.5, 1.5))
            turn = min(1.5 * turn, LONGEST_TURN_SECONDS)
            continue
        # Telling is safe to repeat, so it needs no lock; a claim made meanwhile stays ours.
        # A few at a time and at random, because all workers that are free have the same list.
        for number in random.sample(decided, min(len(decided), TOLD_AT_ONCE)):
            outcomes.tell_decided(database, study, number)
        if result is not None:
            return result


class _Decision:
    """One claim's queries, all under the study's lock."""

    def __init__(
        self, database: Database, connection: Connection, study: Study, worker_id: str, device: str
    ) -> None:
        self.database, self.connection, self.study = database, connection, study
        self.spec: StudySpec = study.spec
        self.worker_id = worker_id
        self.names = {
            "study_id": study.study_id,
            "worker_id": worker_id,
            "device": device,
            "lease": study.spec.lease.seconds,
        }

    def make(self, decided: list[int]) -> Claim | Idle | None:
        """The claim; None to decide again once `decided` trials are told."""
        state = self._one("SELECT state FROM headsearch.studies WHERE study_id = :study_id")
        if state is None:
            raise UnknownStudyError(f"study {self.study.name!r}: deleted while workers were on it")
        # Whoever asks for work is alive, also where it was taken for lost.
        self._execute(
            "UPDATE headsearch.workers SET ended_at = NULL, beat_at = clock_timestamp() "
            "WHERE worker_id = :worker_id AND ended_at IS NOT NULL"
        )
        if state.state == "paused":
            return Idle.HELD
        if state.state == "cancelled":
            # Whoever cancelled it may have died before telling.
            decided.extend(outcomes.pending(self.connection, self.study.study_id))
            outcomes.fail_strays(self.database, self.connection, self.study)
            return None if decided else Idle.DONE
        if state.state == "complete":
            return Idle.DONE
        orphan = self._orphan(decided)
        if orphan is not None or decided:
            return orphan
        if self.spec.pruning.rule == "stop" and len(self.spec.seeds) > 1:
            decided.extend(promotions.end_the_rest(self.database, self.connection, self.study))
            if decided:
                return None
        if (promoted := self._promotable()) is not None:
            return self._take(promoted, "promoted", "rung = rung + 1")
        if (begun := self._new()) is not None:
            return begun
        if self._one(
            "SELECT 1 FROM headsearch.trials WHERE study_id = :study_id AND state = 'running' LIMIT 1"
        ):
            return Idle.WAIT
        decided.extend(outcomes.prune_paused(self.connection, self.study.study_id))
        if decided:
            return None
        outcomes.fail_strays(self.database, self.connection, self.study)
        self._execute(
            "UPDATE headsearch.studies SET state = 'complete', completed_at = clock_timestamp() "
            "WHERE study_id = :study_id"
        )
        return Idle.COMPLETED

    def _execute(self, sql: str, **values: Any) -> Any:
        return self.connection.execute(text(sql), self.names | values)

    def _one(self, sql: str, **values: Any) -> Row[Any] | None:
        row: Row[Any] | None = self._execute(sql, **values).first()
        return row

    def _orphan(self, decided: list[int]) -> Claim | None:
        row = self._one(
            "SELECT number, losses, outcome, worker_id, epoch, history FROM headsearch.trials "
            "WHERE study_id = :study_id AND state = 'running' "
            "AND (lease_until < clock_timestamp() OR worker_id IS NULL OR worker_id = :worker_id) "
            "ORDER BY epoch DESC, number LIMIT 1 FOR UPDATE"
        )
        if row is None:
            return None
        if row.outcome is not None:
            decided.append(row.number)
            return None
        # A worker that gave its trial back took its name off it, and one that asks for work holds none:
        # the answer to its last claim was lost. Only the silent ones are losses.
        if row.worker_id in (None, self.names["worker_id"]):
            return self._take(row.number, "adopted", "losses = losses")
        self._execute(
            "UPDATE headsearch.workers SET ended_at = clock_timestamp() WHERE worker_id = :lost",
            lost=row.worker_id,
        )
        if row.losses + 1 >= self.spec.lease.max_attempts:
            self._execute(
                f"UPDATE headsearch.trials SET losses = losses + 1, history = history || {outcomes.EVENT}, "  # noqa: S608
                "attempt = attempt + 1, outcome = CAST(:outcome AS jsonb) "
                "WHERE study_id = :study_id AND number = :number",
                number=row.number,
                what="lost",
                outcome=outcomes.lost(row.history, row.worker_id, row.epoch),
            )
            decided.append(row.number)
            return None
        return self._take(
            row.number,
            "adopted",
            f"losses = losses + 1, history = history || {outcomes.EVENT}",
            what="lost",
        )

    def _take(self, number: int, origin: str, change: str, **values: Any) -> Claim:
        row = self._one(
            f"""
            UPDATE headsearch.trials SET {change}, state = 'running', attempt = attempt + 1,
                worker_id = :worker_id, device = :device,
                lease_until = clock_timestamp() + make_interval(secs => :lease)
            WHERE study_id = :study_id AND number = :number
            RETURNING number, trial_id, params, seed, attempt, epoch, rung
            """,  # noqa: S608 - `change` is one of the literals above
            number=number,
            **values,
        )
        assert row is not None  # noqa: S101 - selected under the same lock
        return self._claim(row, origin)

    def _claim(self, row: Row[Any], origin: str) -> Claim:
        rungs = self.spec.rungs
        stop_at = rungs[row.rung] if row.rung < len(rungs) else None
        return Claim(
            row.number,
            row.trial_id,
            row.params,
            row.seed,
            row.attempt,
            row.epoch,
            stop_at,
            origin,
            self.worker_id,
        )

    def _promotable(self) -> int | None:
        return promotions.next_run(self.database, self.connection, self.study)

    def _new(self) -> Claim | None:
        counts = self._one(
            "SELECT count(*) AS begun, "  # noqa: S608
            f"count(*) FILTER (WHERE epoch >= :first OR {INFEASIBLE}) AS told, "
            "(SELECT count(*) FROM public.trials o WHERE o.study_id = :study_id AND o.state = 'COMPLETE') "
            "AS complete FROM headsearch.trials WHERE study_id = :study_id AND NOT requeued",
            first=self.spec.rungs[0] if self.spec.rungs else self.spec.budget.epochs,
        )
        assert counts is not None  # noqa: S101 - an aggregate has one row
        if counts.begun >= self.spec.trials:
            return None
        several = len(self.spec.seeds) > 1
        with translated():
            notes: dict[str, Any] = {}
            fixed = self._requeued() or self._next_fixed(counts.begun)
            trial = self._optuna_trial(fixed[0] if fixed else None)
            if fixed is None:
                warmed_up = (
                    counts.told >= self.spec.sampler.startup_trials
                    and counts.complete >= MODEL_NEEDS_COMPLETE
                )
                params, seed = self._proposed(trial, notes, warmed_up=warmed_up), self.spec.seeds[0]
            else:
                params, seed = fixed
        row = self._one(
            """
            INSERT INTO headsearch.trials
                (study_id, number, trial_id, point_key, seed, params, worker_id, device, lease_until)
            VALUES (:study_id, coalesce(:number,
                        (SELECT max(number) + 1 FROM headsearch.trials WHERE study_id = :study_id), 0),
                    :trial_id, :point_key, :seed, CAST(:params AS json), :worker_id,
                    :device, clock_timestamp() + make_interval(secs => :lease))
            RETURNING number, trial_id, params, seed, attempt, epoch, rung
            """,
            # Optuna numbers points.
            number=None if several else trial.number,
            trial_id=trial._trial_id,
            point_key=point_key(params),
            seed=seed,
            params=json.dumps(params),
        )
        assert row is not None  # noqa: S101
        if fixed and several:
            # Where the point's trial was told before one of its seeds was requeued, this one takes its place.
            self._execute(
                "UPDATE headsearch.trials SET trial_id = :trial_id WHERE study_id = :study_id "
                "AND point_key = :point_key AND NOT requeued AND trial_id <> :trial_id",
                trial_id=trial._trial_id,
                point_key=point_key(params),
            )
        history.store(
            self.connection, trial._trial_id, params, distributions(self.spec), notes, but=trial.params
        )
        return self._claim(row, "new")

    def _optuna_trial(self, fixed: Params | None) -> FrozenTrial:
        """That of a point of which a seed was begun, a fresh one, or one that another client began.

        One that was left with parameters of its own serves no point that is `fixed` otherwise, and ends.
        """
        begun = fixed and len(self.spec.seeds) > 1 and running_trial(self.connection, self.study, fixed)
        if begun:
            return history.trial(self.connection, begun)
        for trial_id in outcomes.strays(self.connection, self.study, "RUNNING"):
            trial = history.trial(self.connection, trial_id)
            if fixed is None or all(fixed.get(path) == value for path, value in trial.params.items()):
                return trial
            self.database.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        return history.create(self.connection, self.study.study_id)

    def _requeued(self) -> tuple[Params, int] | None:
        """The point of a failed trial that somebody wants trained again, if none has begun it yet."""
        row = self._one(
            "SELECT params, seed FROM headsearch.trials q WHERE study_id = :study_id AND requeued "
            "AND NOT EXISTS (SELECT 1 FROM headsearch.trials t WHERE t.study_id = q.study_id "
            "AND t.point_key = q.point_key AND t.seed = q.seed AND NOT t.requeued) ORDER BY number LIMIT 1"
        )
        return None if row is None else (row.params, row.seed)

    def _begun(self, params: Params, seed: int) -> bool:
        return bool(
            self._one(
                "SELECT 1 FROM headsearch.trials WHERE study_id = :study_id AND point_key = :key "
                "AND seed = :seed AND NOT requeued",
                key=point_key(params),
                seed=seed,
            )
        )

    def _next_fixed(self, begun: int) -> tuple[Params, int] | None:
        """The next cell of a list, or the next seed of a point that a search has begun."""
        if self.spec.mode != "search":
            cells = self.spec.cells()
            # In their order, so the first that is left is nearly always the one after those begun.
            return next((cell for cell in cells[begun:] + cells[:begun] if not self._begun(*cell)), None)
        if len(self.spec.seeds) == 1:
            return None
        row = self._one(
            "SELECT (array_agg(params ORDER BY number))[1] AS params, array_agg(seed) AS seeds "
            "FROM headsearch.trials WHERE study_id = :study_id AND NOT requeued "
            "GROUP BY point_key HAVING count(*) < :seeds ORDER BY min(number) LIMIT 1",
            seeds=len(self.spec.seeds),
        )
        return row and (row.params, next(seed for seed in self.spec.seeds if seed not in row.seeds))

    def _proposed(self, trial: FrozenTrial, notes: dict[str, Any], *, warmed_up: bool) -> Params:
        sampler = make_sampler(
            self.spec.sampler, trial.number, warmed_up=warmed_up, seeds=len(self.spec.seeds)
        )
        trials = self.database.memory(self.study.study_id).read(self.connection)
        row = self._one(
            "SELECT array_agg(point_key) AS keys, "  # noqa: S608
            f"array_agg(trial_id) FILTER (WHERE {INFEASIBLE}) AS infeasible, "
            "array_agg(trial_id) FILTER (WHERE epoch > 0) AS reported "
            "FROM headsearch.trials WHERE study_id = :study_id AND NOT requeued"
        )
        assert row is not None  # noqa: S101 - an aggregate has one row
        known, infeasible = frozenset(row.keys or ()), frozenset(row.infeasible or ())
        seen = Seen(
            self.database.storage,
            self.study.study_id,
            taught(trials, infeasible, self.spec.directions),
        )
        with quietly():
            study = seen.study(self.study.name)
        feasibility = learned(self.spec, trials, infeasible, frozenset(row.reported or ()))
        params = propose(
            study, trial, self.spec.space, sampler, lambda params: point_key(params) in known, feasibility
        )
        notes.update(seen.notes)
        return params

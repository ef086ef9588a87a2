"""An audit of a study: what must hold of it at any moment, read from the database in one snapshot.

Nothing is changed. A trial whose outcome is decided and not yet told, and one whose lease ran out and waits
for adoption, are legal in an open study: they are notes, not violations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from headsearch.search import outcomes
from headsearch.search.database import Database
from headsearch.search.imagesets import known_images, strangers
from headsearch.search.points import INFEASIBLE, mean_values, state_of
from headsearch.search.sampling import distributions
from headsearch.search.studies import Study


@dataclass(frozen=True)
class Finding:
    """Something about a study that is worth a line."""

    rule: str
    """Which rule it is about, in a few words."""
    message: str
    violated: bool = True
    """False for what is legal and passes by itself."""


@dataclass(frozen=True)
class PausedTrial:
    """A trial that must have a checkpoint of this epoch."""

    number: int
    epoch: int
    attempt: int


@dataclass(frozen=True)
class Audit:
    """What was found, and the paused trials, whose checkpoints are not in the database."""

    trials: int
    reports: int
    findings: tuple[Finding, ...]
    paused: tuple[PausedTrial, ...]


def audit(database: Database, study: Study) -> Audit:
    """Check every rule that the database alone can tell. Raises DatabaseError when it is not reachable."""
    with database.begin() as connection:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        reader = _Reader(connection, study)
        findings = (
            *reader.budget(),
            *reader.optuna(),
            *reader.leases(),
            *reader.reports(),
            *reader.rungs(),
            *reader.points(),
            *reader.values(),
            *reader.copies(),
            *reader.images(),
        )
        counts = reader.one(
            "SELECT (SELECT count(*) FROM headsearch.trials WHERE study_id = :study_id) AS trials, "
            "(SELECT count(*) FROM headsearch.reports WHERE study_id = :study_id) AS reports"
        )
        paused = reader.all(
            "SELECT number, epoch, attempt FROM headsearch.trials "
            "WHERE study_id = :study_id AND state = 'paused' "
            "ORDER BY number"
        )
    return Audit(
        counts.trials,
        counts.reports,
        findings,
        tuple(PausedTrial(r.number, r.epoch, r.attempt) for r in paused),
    )


class _Reader:
    """The rules, a query each."""

    def __init__(self, connection: Connection, study: Study) -> None:
        self.connection, self.study, self.spec = connection, study, study.spec
        # In the audit's own snapshot: somebody may have opened the study again since ours was read.
        self.state: str = self.one("SELECT state FROM headsearch.studies WHERE study_id = :study_id").state
        self.closed = self.state in ("complete", "cancelled")

    def all(self, sql: str, **values: Any) -> list[Any]:
        return list(self.connection.execute(text(sql), {"study_id": self.study.study_id} | values))

    def one(self, sql: str, **values: Any) -> Any:
        return self.connection.execute(text(sql), {"study_id": self.study.study_id} | values).one()

    def budget(self) -> list[Finding]:
        """No more trials than the budget, exactly as many at the end, none of them unfinished then.

        A failed trial that was requeued does not count: its point has another.
        """
        rows = self.all(
            "SELECT state, count(*) AS n, count(outcome) AS decided FROM headsearch.trials "
            "WHERE study_id = :study_id AND NOT requeued GROUP BY state"
        )
        total, wanted = sum(row.n for row in rows), self.spec.trials
        # What was cancelled may wait to be told; whoever claims next, or cancels again, does it.
        left = sum(
            row.n - (row.decided if self.state == "cancelled" else 0)
            for row in rows
            if row.state in ("running", "paused")
        )
        found = []
        if total > wanted or (self.state == "complete" and total != wanted):
            found.append(Finding("budget", f"{total} trials, the budget is {wanted}"))
        if self.closed and left:
            found.append(
                Finding("budget", f"the study is {self.state}, and {left} of its trials have not ended")
            )
        return found

    def optuna(self) -> list[Finding]:
        """Optuna has each point once, in the state that its runs imply, and no other trial.

        A point is the runs of one trial of Optuna's that were not requeued; with one seed, each is one.
        """
        found, points, seeds = [], defaultdict(list), len(self.spec.seeds)
        for row in self.all(
            "SELECT t.number, t.trial_id, t.state, t.requeued, t.point_key, t.outcome, "
            "o.state::text AS told, o.number AS optuna_number FROM headsearch.trials t "
            "LEFT JOIN public.trials o ON o.trial_id = t.trial_id "
            "WHERE t.study_id = :study_id ORDER BY t.number"
        ):
            if row.told is None or (seeds == 1 and row.optuna_number != row.number):
                found.append(Finding("Optuna's trial", f"trial {row.number}: Optuna has none of this number"))
            elif not row.requeued:
                points[row.point_key].append(row)
        for runs in points.values():
            if len({run.trial_id for run in runs}) > 1:
                numbers = ", ".join(str(run.number) for run in runs)
                found.append(Finding("Optuna's trial", f"trials {numbers}: one point, and several in Optuna"))
            else:
                found += self._told(runs)
        strays = self.all(
            "SELECT number, state::text AS state FROM public.trials o WHERE study_id = :study_id "
            "AND NOT EXISTS (SELECT 1 FROM headsearch.trials t WHERE t.trial_id = o.trial_id) ORDER BY number"
        )
        for row in strays:
            unfinished = row.state in ("RUNNING", "WAITING")
            found.append(
                Finding(
                    "Optuna's trial",
                    f"trial {row.number} is only in Optuna ({row.state})"
                    + ("" if self.closed or not unfinished else "; the next claim takes it"),
                    violated=self.closed and unfinished,
                )
            )
        return found

    def _told(self, runs: list[Any]) -> list[Finding]:
        """That Optuna's trial of these runs is in the state that they imply."""
        row = runs[-1]
        name = f"trial {row.number}" if len(self.spec.seeds) == 1 else f"point {row.optuna_number}"
        ended = [run.outcome for run in runs if run.state in outcomes.OPTUNA_STATES]
        state = state_of(ended, len(self.spec.seeds)) if len(ended) == len(runs) else None
        told = outcomes.OPTUNA_STATES[state].name if state else "RUNNING"
        if row.told == told:
            return []
        if row.told == "FAIL" and state is None and len(ended) == len(runs):
            # Of a study that was cancelled before all seeds were begun; the next seed takes a new trial.
            return []
        untold = any(run.outcome and run.state in ("running", "paused") for run in runs)
        waiting = untold and self.state != "complete"
        what = "is decided and not told yet" if waiting else "was ended by another client"
        here = row.state if len(runs) == 1 else state or "running"
        message = f"{name} {what}: {here} here, {row.told} in Optuna"
        return [Finding("Optuna's state", message, violated=not waiting)]

    def leases(self) -> list[Finding]:
        """A lease that runs is held by a registered worker that has not ended."""
        found = []
        for row in self.all(
            "SELECT t.number, t.worker_id, t.lease_until < clock_timestamp() AS ran_out, "
            "w.worker_id IS NOT NULL AS known, w.ended_at IS NOT NULL AS ended FROM headsearch.trials t "
            "LEFT JOIN headsearch.workers w ON w.worker_id = t.worker_id "
            "WHERE t.study_id = :study_id AND t.state = 'running' ORDER BY t.number"
        ):
            if row.ran_out:
                why = "its lease ran out" if row.worker_id else "given back"
                found.append(
                    Finding(
                        "leases", f"trial {row.number}: {why}; a free worker takes it over", violated=False
                    )
                )
            elif not row.known or row.ended:
                what = "has ended" if row.known else "is not registered"
                found.append(Finding("leases", f"trial {row.number}: its worker {row.worker_id} {what}"))
        return found

    def reports(self) -> list[Finding]:
        """Each epoch is reported once, without gaps, by a holder of the trial, before its outcome."""
        found = []
        for row in self.all(
            "SELECT t.number, t.state, t.epoch, count(r.epoch) AS n, max(r.epoch) AS last, "
            "max(r.attempt) > t.attempt AS early, bool_or(r.back) AS backwards, "
            "max(r.reported_at) > t.finished_at AS late FROM headsearch.trials t "
            "LEFT JOIN (SELECT *, attempt < lag(attempt) OVER (PARTITION BY number ORDER BY epoch) AS back "
            "FROM headsearch.reports WHERE study_id = :study_id) r USING (study_id, number) "
            "WHERE t.study_id = :study_id "
            "GROUP BY t.study_id, t.number ORDER BY t.number"
        ):
            name, epochs = f"trial {row.number}", self.spec.budget.epochs
            if row.n != (row.last or 0) or row.epoch != row.n:
                found.append(
                    Finding(
                        "reports", f"{name}: {row.n} reports, the last of epoch {row.last}, at {row.epoch}"
                    )
                )
            if row.state == "complete" and row.n != epochs:
                found.append(Finding("reports", f"{name} is complete with {row.n} of {epochs} reports"))
            if row.early:
                found.append(Finding("fencing", f"{name}: a report of a claim that was never made"))
            if row.backwards:
                found.append(Finding("fencing", f"{name}: an earlier claim reported after a later one"))
            if row.late:
                found.append(Finding("reports", f"{name}: a report after its outcome"))
        return found

    def rungs(self) -> list[Finding]:
        """A trial pauses, and is pruned, at a rung; a complete one has passed all of them."""
        rungs = self.spec.rungs
        skipped = self.all(
            "SELECT number, rung FROM headsearch.trials WHERE study_id = :study_id AND state = 'complete' "
            "AND rung <> :rungs ORDER BY number",
            rungs=len(rungs),
        )
        passed = [
            Finding("rungs", f"trial {row.number} is complete, and passed {row.rung} of {len(rungs)} rungs")
            for row in skipped
        ]
        return passed + [
            Finding(
                "rungs", f"trial {row.number} is {row.state} at epoch {row.epoch}, rungs are {list(rungs)}"
            )
            for row in self.all(
                "SELECT number, state, epoch FROM headsearch.trials "
                "WHERE study_id = :study_id AND state IN ('paused', 'pruned') ORDER BY number"
            )
            if row.epoch not in rungs
        ]

    def points(self) -> list[Finding]:
        """The seeds of a point pass each rung together, and are pruned or complete together.

        Not where one failed by its configuration, was requeued, or was paused when the study was cancelled,
        and not in studies whose seeds an earlier version judged one by one.
        """
        if len(self.spec.seeds) == 1 or self.study.seeds_apart:
            return []
        found, points = [], defaultdict(list)
        for row in self.all(
            "SELECT number, point_key, state, epoch, requeued, "  # noqa: S608
            f"coalesce({INFEASIBLE}, false) AS infeasible, "
            "coalesce(outcome->>'state' = 'failed', false) AS failed, "
            "coalesce(outcome->>'message' LIKE '%when the study was cancelled', false) AS cancelled "
            "FROM headsearch.trials WHERE study_id = :study_id ORDER BY number"
        ):
            points[row.point_key].append(row)
        for runs in points.values():
            if any(run.infeasible or run.requeued or run.cancelled for run in runs):
                continue
            left = [run for run in runs if not run.failed]
            name = "trials " + ", ".join(str(run.number) for run in runs)
            for rung in self.spec.rungs:
                behind = len(runs) < len(self.spec.seeds) or any(run.epoch < rung for run in left)
                if behind and any(run.epoch > rung for run in left):
                    found.append(Finding("seeds", f"{name}: one passed epoch {rung} without the others"))
            states = {run.state for run in left}
            if self.state == "complete" and len(states) > 1:
                found.append(Finding("seeds", f"{name}: a point that is {' and '.join(sorted(states))}"))
        return found

    def values(self) -> list[Finding]:
        """A complete trial has a value for each objective, a failed one a reason."""
        found = []
        for row in self.all(
            "SELECT number, state, outcome FROM headsearch.trials WHERE study_id = :study_id "
            "AND state IN ('complete', 'failed') ORDER BY number"
        ):
            values = row.outcome.get("values") or ()
            if row.state == "complete" and len(values) != len(self.spec.objectives):
                found.append(Finding("outcome", f"trial {row.number} is complete without all its values"))
            if row.state == "failed" and not row.outcome.get("reason"):
                found.append(Finding("outcome", f"trial {row.number} failed without a reason"))
        return found

    def images(self) -> list[Finding]:
        """All complete trials were trained on the study's images."""
        rows = self.all(
            "SELECT number, params, seed, outcome->'facts'->>'data_fingerprint' AS fingerprint "
            "FROM headsearch.trials WHERE study_id = :study_id AND state = 'complete' AND NOT requeued "
            "ORDER BY number"
        )
        known = known_images(self.connection, self.study.study_id)
        return [
            Finding(
                "images",
                f"trial {one.number} was trained on other images than the study's "
                f"(fingerprint {one.fingerprint[:12]}, not {one.expected[:12]})",
            )
            for one in strangers(self.spec, known, rows)
        ]

    def copies(self) -> list[Finding]:
        """What Optuna shows of a trial, its parameters and values, is what ours says."""
        dists = distributions(self.spec)
        shown: dict[int, dict[str, float]] = {}
        for row in self.all(
            "SELECT t.number, p.param_name, p.param_value FROM headsearch.trials t "
            "JOIN public.trial_params p USING (trial_id) WHERE t.study_id = :study_id"
        ):
            shown.setdefault(row.number, {})[row.param_name] = row.param_value
        values: dict[int, list[float]] = {}
        for row in self.all(
            "SELECT o.trial_id, v.value FROM public.trials o JOIN public.trial_values v USING (trial_id) "
            "WHERE o.study_id = :study_id AND o.state = 'COMPLETE' ORDER BY o.trial_id, v.objective"
        ):
            values.setdefault(row.trial_id, []).append(row.value)
        ours_told: dict[int, list[Any]] = defaultdict(list)
        found = []
        for row in self.all(
            "SELECT number, trial_id, params, requeued, outcome FROM headsearch.trials "
            "WHERE study_id = :study_id ORDER BY number"
        ):
            ours = {
                path: dist.to_internal_repr(row.params[path])
                for path, dist in dists.items()
                if path in row.params
            }
            theirs = shown.get(row.number, {})
            # A claim that was cut short leaves some unsaid; none may contradict.
            if any(theirs[path] != ours.get(path) for path in theirs):
                found.append(Finding("Optuna's trial", f"trial {row.number}: Optuna has other parameters"))
            if not row.requeued and row.outcome and row.outcome["state"] == "complete":
                ours_told[row.trial_id].append(row)
        for trial_id, rows in ours_told.items():
            told = values.get(trial_id)
            same = not told or _close(told, mean_values([row.outcome for row in rows]))
            if not same:
                numbers = ", ".join(str(row.number) for row in rows)
                found.append(Finding("Optuna's trial", f"trial {numbers}: Optuna has other values"))
        return found


def _close(told: Sequence[float], ours: Sequence[float]) -> bool:
    """Whether they are the same, but for the rounding of a mean that the database took (migration 4)."""
    return len(told) == len(ours) and all(
        math.isclose(left, right, rel_tol=1e-12) for left, right in zip(told, ours, strict=True)
    )

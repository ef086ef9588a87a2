"""A study read at one moment, by plain SQL: a few milliseconds where Optuna's own summaries take seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Row, text

from headsearch.search.database import Database
from headsearch.search.imagesets import KnownImages, Stranger, known_images, strangers
from headsearch.search.points import INFEASIBLE, is_infeasible
from headsearch.search.studies import Study, get
from headsearch.space import Params

TrialStateName = Literal["running", "orphaned", "paused", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    number: int
    state: TrialStateName
    params: Params
    seed: int
    epoch: int
    """Epochs reported."""
    attempt: int
    losses: int
    worker_id: str | None
    device: str | None
    projection_dim: int | None
    head_parameters: int | None
    loss: float | None
    """Of the last report."""
    probe_accuracy: float | None
    """On the validation split: the final probe's of a complete trial, else the last report's."""
    test_accuracy: float | None
    """Of a complete trial."""
    feature_rank: float | None
    projection_rank: float | None
    views_per_second: float | None
    train_seconds: float | None
    values: tuple[float, ...] | None
    """One per objective, of a complete trial."""
    reason: str | None
    message: str | None
    facts: dict[str, Any]
    started_at: datetime
    finished_at: datetime | None
    point: int | None = None
    """Number of Optuna's trial, which is that of all seeds of a point."""

    @property
    def infeasible(self) -> bool:
        """It failed, and by its configuration: so would the point anywhere."""
        return self.state == "failed" and is_infeasible(self.reason, self.epoch)


@dataclass(frozen=True)
class _Told:
    """What a complete trial says of its images."""

    number: int
    params: Params
    seed: int
    fingerprint: str | None


@dataclass(frozen=True)
class WorkerRow:
    """One worker that has not ended."""

    worker_id: str
    host: str
    pid: int
    device: str
    seconds_silent: float


@dataclass(frozen=True)
class Snapshot:
    """A study with its trials and workers."""

    study: Study
    trials: tuple[TrialRow, ...]
    """By number; failed ones that were requeued are left out, their points have other trials."""
    workers: tuple[WorkerRow, ...]
    now: datetime
    """The database's clock."""
    images: tuple[KnownImages, ...] = ()
    """Those that the study is trained on."""

    @property
    def strangers(self) -> list[Stranger]:
        """Complete trials that were trained on other images."""
        rows = [
            _Told(trial.number, trial.params, trial.seed, trial.facts.get("data_fingerprint"))
            for trial in self.complete
        ]
        return strangers(self.study.spec, self.images, rows)

    @property
    def counts(self) -> Counter[str]:
        """Trials by state."""
        return Counter(trial.state for trial in self.trials)

    @property
    def epochs_trained(self) -> int:
        """Epochs reported, over all trials."""
        return sum(trial.epoch for trial in self.trials)

    @property
    def epochs_without_pruning(self) -> int:
        """Epochs of the whole budget."""
        return self.study.spec.trials * self.study.spec.budget.epochs

    @property
    def promoted(self) -> int:
        """Trials that went on past a rung."""
        rungs = self.study.spec.rungs
        return sum(1 for trial in self.trials if rungs and trial.epoch > rungs[0])

    @property
    def complete(self) -> list[TrialRow]:
        """Complete trials."""
        return [trial for trial in self.trials if trial.state == "complete"]


def read(database: Database, name: str) -> Snapshot:
    """The study of this name, now.

    Raises:
        UnknownStudyError: There is none.
    """
    study = get(database, name)
    key = {"study_id": study.study_id}
    with database.begin() as connection:
        trials = connection.execute(
            text(
                """
                SELECT t.*, o.number AS point,
                       t.state = 'running' AND t.lease_until < clock_timestamp() AS orphaned,
                       r.loss, r.probe_accuracy, r.feature_rank, r.projection_rank,
                       r.views_per_second, r.train_seconds
                FROM headsearch.trials t
                LEFT JOIN public.trials o ON o.trial_id = t.trial_id
                LEFT JOIN LATERAL (
                    SELECT * FROM headsearch.reports
                    WHERE study_id = t.study_id AND number = t.number ORDER BY epoch DESC LIMIT 1) r ON true
                WHERE t.study_id = :study_id AND NOT t.requeued ORDER BY t.number
                """
            ),
            key,
        ).all()
        workers = connection.execute(
            text(
                "SELECT worker_id, host, pid, device, "
                "extract(epoch FROM clock_timestamp() - beat_at) AS seconds_silent "
                "FROM headsearch.workers WHERE study_id = :study_id AND ended_at IS NULL "
                "ORDER BY started_at"
            ),
            key,
        ).all()
        images = known_images(connection, study.study_id)
        now = connection.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(now, datetime)  # noqa: S101
    return Snapshot(
        study,
        tuple(_trial(row) for row in trials),
        tuple(
            WorkerRow(row.worker_id, row.host, row.pid, row.device, float(row.seconds_silent))
            for row in workers
        ),
        now,
        images,
    )


def attempts(database: Database, study: Study, *, ended: bool = False) -> dict[int, int]:
    """How often each trial was claimed, of all or of those that have ended."""
    with database.begin() as connection:
        rows = connection.execute(
            text(
                "SELECT number, attempt FROM headsearch.trials WHERE study_id = :study_id "
                "AND (finished_at IS NOT NULL OR NOT :ended) ORDER BY number"
            ),
            {"study_id": study.study_id, "ended": ended},
        )
        return {row.number: row.attempt for row in rows}


@dataclass(frozen=True)
class Progress:
    """Counts of a study, for lists."""

    trials: Counter[str]
    """Trials by state; orphans count as running."""
    epochs: int
    best_accuracy: float | None
    """Of the best point: the mean of its seeds, all of them where there is such a point."""


def progress(database: Database, study: Study) -> Progress:
    """Counts without reading the trials."""
    values = {"study_id": study.study_id, "seeds": len(study.spec.seeds), "ended": study.ended}
    with database.begin() as connection:
        rows = connection.execute(
            text(
                "SELECT state, count(*) AS n, sum(epoch) AS epochs FROM headsearch.trials "
                "WHERE study_id = :study_id AND NOT requeued GROUP BY state"
            ),
            values,
        ).all()
        best = connection.scalar(
            text(
                "SELECT avg((outcome->'facts'->>'probe_accuracy')::float) "  # noqa: S608
                "FILTER (WHERE state = 'complete') AS accuracy FROM headsearch.trials "
                "WHERE study_id = :study_id AND NOT requeued GROUP BY point_key "
                f"HAVING NOT bool_or(coalesce({INFEASIBLE}, false)) AND bool_or(state = 'complete') "
                "AND (count(finished_at) = :seeds OR count(finished_at) = count(*) AND :ended) "
                "ORDER BY count(*) FILTER (WHERE state = 'complete') = :seeds DESC, accuracy DESC LIMIT 1"
            ),
            values,
        )
    return Progress(
        Counter({row.state: row.n for row in rows}),
        sum(int(row.epochs) for row in rows),
        best,
    )


def _trial(row: Row[Any]) -> TrialRow:
    outcome = row.outcome or {}
    facts: dict[str, Any] = outcome.get("facts") or {}
    values = outcome.get("values")
    return TrialRow(
        number=row.number,
        state="orphaned" if row.orphaned else row.state,
        params=row.params,
        seed=row.seed,
        epoch=row.epoch,
        attempt=row.attempt,
        losses=row.losses,
        worker_id=row.worker_id,
        device=row.device,
        projection_dim=row.projection_dim,
        head_parameters=row.head_parameters,
        loss=row.loss,
        probe_accuracy=facts.get("probe_accuracy", row.probe_accuracy),
        test_accuracy=facts.get("test_accuracy"),
        feature_rank=row.feature_rank,
        projection_rank=row.projection_rank,
        views_per_second=row.views_per_second,
        train_seconds=row.train_seconds,
        values=tuple(values) if values is not None else None,
        reason=outcome.get("reason"),
        message=outcome.get("message"),
        facts=facts,
        started_at=row.started_at,
        finished_at=row.finished_at,
        point=row.point,
    )

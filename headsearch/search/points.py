"""A point of the space with its runs, one for each seed: what is judged, and what Optuna has.

A run is a row of ``headsearch.trials``: it is claimed, paused, lost and ended by itself. A point is the
runs that share a ``point_key`` and were not requeued; of Optuna it has one trial, whose number is the
point's. In a study of one seed the two are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, text

from headsearch.search.studies import Study
from headsearch.search.work import point_key
from headsearch.space import Params

PointState = Literal["complete", "pruned", "failed"]

OF_CONFIGURATION = frozenset({"collapsed", "non_finite_loss", "unbuildable"})
"""Failures that another machine would have too; so has `out_of_memory` before the first report."""

INFEASIBLE = (
    "(outcome->>'state' = 'failed' AND ("
    "outcome->>'reason' IN ('collapsed', 'non_finite_loss', 'unbuildable') "
    "OR outcome->>'reason' = 'out_of_memory' AND epoch = 0))"
)
"""SQL of `is_infeasible`, of a row of ``headsearch.trials``."""


def is_infeasible(reason: str | None, epoch: int) -> bool:
    """Whether a run that failed for `reason` with `epoch` epochs reported failed by its configuration."""
    return reason in OF_CONFIGURATION or (reason == "out_of_memory" and epoch == 0)


@dataclass(frozen=True)
class Run:
    """One seed of a point, as a claim looks at it."""

    number: int
    rung: int
    """Rungs passed."""
    paused: bool
    """It waits at a rung, and nothing of its end is decided."""
    pruned: bool
    failed: bool
    infeasible: bool


@dataclass(frozen=True)
class Point:
    """A point's runs, in the order in which they were begun."""

    runs: tuple[Run, ...]

    @property
    def number(self) -> int:
        """Of its first run: its identity in standings."""
        return self.runs[0].number

    @property
    def rung(self) -> int:
        """Rungs that it has passed: its runs pass them together, one after another."""
        return max(run.rung for run in self.runs)

    @property
    def infeasible(self) -> bool:
        """A run failed by the configuration, so that the point is nobody's choice."""
        return any(run.infeasible for run in self.runs)

    @property
    def may_go_on(self) -> bool:
        """False where it cannot end with all its seeds: one was pruned, or shows that it does not train."""
        return not any(run.infeasible or run.pruned for run in self.runs)

    def waiting(self, rung: int) -> list[Run]:
        """Runs that wait at `rung`."""
        return [run for run in self.runs if run.paused and run.rung == rung]

    def is_whole(self, seeds: int, rung: int) -> bool:
        """All its runs have been begun, and each waits at `rung` or has ended."""
        ready = (run.failed or run.pruned or (run.paused and run.rung == rung) for run in self.runs)
        return len(self.runs) == seeds and all(ready)


def read_points(connection: Connection, study: Study) -> list[Point]:
    """All points of a study by the number of their first run. Read it under the study's lock."""
    rows = connection.execute(
        text(
            "SELECT point_key, number, rung, state = 'paused' AND outcome IS NULL AS paused, "  # noqa: S608
            "coalesce(outcome->>'state', '') AS decided, "
            f"coalesce({INFEASIBLE}, false) AS infeasible "
            "FROM headsearch.trials WHERE study_id = :study_id AND NOT requeued ORDER BY number"
        ),
        {"study_id": study.study_id},
    )
    found: dict[str, list[Run]] = {}
    for row in rows:
        found.setdefault(row.point_key, []).append(
            Run(
                row.number,
                row.rung,
                row.paused,
                row.decided == "pruned",
                row.decided == "failed",
                row.infeasible,
            )
        )
    return [Point(tuple(runs)) for runs in found.values()]


def running_trial(connection: Connection, study: Study, params: Params) -> int | None:
    """Optuna's id of the trial of a point of which a run was begun, while it runs."""
    found: int | None = connection.scalar(
        text(
            "SELECT o.trial_id FROM headsearch.trials t JOIN public.trials o USING (trial_id) "
            "WHERE t.study_id = :study_id AND t.point_key = :key AND o.state = 'RUNNING' "
            "ORDER BY o.trial_id DESC LIMIT 1"
        ),
        {"study_id": study.study_id, "key": point_key(params)},
    )
    return found


def state_of(outcomes: Sequence[dict[str, Any] | None], seeds: int) -> PointState | None:
    """What becomes of a point whose runs have these outcomes; None while one is to come.

    A point is complete with all its seeds and never with fewer, so that Optuna's values are means of equally
    many. A point of which a seed failed has failed, and teaches a sampler nothing unless the configuration
    was at fault (`sampling.taught`); its other seeds stand in our own tables, which say how many they are.
    """
    states = [outcome["state"] for outcome in outcomes if outcome is not None]
    if len(states) < seeds or len(states) < len(outcomes):
        return None
    if "failed" in states:
        return "failed"
    return "complete" if set(states) == {"complete"} else "pruned"


def mean_values(outcomes: Sequence[dict[str, Any]]) -> list[float]:
    """Each objective's mean over the runs of a complete point."""
    return [statistics.fmean(column) for column in zip(*(o["values"] for o in outcomes), strict=True)]


def told_of_seeds(
    runs: Sequence[dict[str, Any]], outcomes: Sequence[dict[str, Any]], seeds: int
) -> dict[str, Any]:
    """What Optuna's page shows of a point of several seeds: means and deviations, and each run below them.

    Args:
        runs: What the page shows of a run, by names; with `number` and `seed`.
        outcomes: Of the same runs.
        seeds: How many a point has.
    """
    complete = [outcome["facts"] for outcome in outcomes if outcome["state"] == "complete"]
    means: dict[str, float] = {}
    for name in ("probe_accuracy", "test_accuracy"):
        measured = [facts[name] for facts in complete if isinstance(facts.get(name), float)]
        if measured:
            means[name] = statistics.fmean(measured)
        if len(measured) > 1:
            means[f"{name}_std"] = statistics.stdev(measured)
    n = f"{len(complete)}" if len(complete) == seeds else f"{len(complete)} of {seeds}"
    firsts = [outcome for outcome in outcomes if outcome["state"] == "failed"] or list(outcomes)
    pruned = [o["facts"]["pruned_at_epoch"] for o in outcomes if "pruned_at_epoch" in o["facts"]]
    shared = ("projection_dim", "head_parameters", "config")
    return {
        "n": n,
        **means,
        **{name: runs[0].get(name) for name in shared},
        "reason": firsts[0]["reason"],
        "message": firsts[0]["message"],
        "pruned_at_epoch": max(pruned, default=None),
        "seeds": [
            {"state": outcome["state"]}
            | {key: value for key, value in (run | outcome["facts"]).items() if key not in shared}
            for run, outcome in zip(runs, outcomes, strict=True)
        ],
    }

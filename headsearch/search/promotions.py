"""Which paused run goes on next. Asked under the study's lock."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from headsearch.search import outcomes
from headsearch.search.database import Database
from headsearch.search.points import Point, read_points
from headsearch.search.rungs import worthy
from headsearch.search.standings import standings, standings_of_points
from headsearch.search.studies import Study


def next_run(database: Database, connection: Connection, study: Study) -> int | None:
    """The paused trial that has earned its next epochs, the deepest rung first; None if none has."""
    if len(study.spec.seeds) > 1:
        return _next_seed(database, connection, study)
    paused = {
        row.rung: set(row.numbers)
        for row in connection.execute(
            text(
                "SELECT rung, array_agg(number) AS numbers FROM headsearch.trials "
                "WHERE study_id = :study_id AND state = 'paused' AND outcome IS NULL GROUP BY rung"
            ),
            {"study_id": study.study_id},
        )
    }
    for rung in sorted(paused, reverse=True):
        stood = standings(database, connection, study, study.spec.rungs[rung])
        for number in worthy(stood, study.spec.pruning.eta):
            if number in paused[rung]:
                return number
    return None


def _next_seed(database: Database, connection: Connection, study: Study) -> int | None:
    """A run whose point has passed its rung already, else one of the best point that may pass it now."""
    points = read_points(connection, study)
    behind = [
        (-run.rung, run.number)
        for point in points
        for run in point.runs
        if run.paused and run.rung < point.rung and point.may_go_on
    ]
    if behind:
        return min(behind)[1]
    for rung in _rungs(points, reverse=True):
        waiting = {
            point.number: runs[0].number
            for point in points
            if point.may_go_on and (runs := point.waiting(rung))
        }
        for number in _worthy(database, connection, study, rung, points):
            if number in waiting:
                return waiting[number]
    return None


def end_the_rest(database: Database, connection: Connection, study: Study) -> list[int]:
    """By the rule `stop`: points that are whole at a rung and not among its best are decided to end there.

    Returns the numbers of all trials that are to be told, if there is such a point.
    """
    points, ended = read_points(connection, study), []
    for rung in _rungs(points):
        best = set(_worthy(database, connection, study, rung, points))
        for point in points:
            judged = point.rung == rung and point.is_whole(len(study.spec.seeds), rung)
            if judged and not (point.number in best and point.may_go_on):
                ended += [run.number for run in point.waiting(rung)]
    return outcomes.prune_paused(connection, study.study_id, ended) if ended else []


def _rungs(points: Sequence[Point], *, reverse: bool = False) -> list[int]:
    """At which somebody waits."""
    return sorted({run.rung for point in points for run in point.runs if run.paused}, reverse=reverse)


def _worthy(
    database: Database, connection: Connection, study: Study, rung: int, points: Sequence[Point]
) -> list[int]:
    stood = standings_of_points(database, connection, study, study.spec.rungs[rung], points)
    return worthy(stood, study.spec.pruning.eta)

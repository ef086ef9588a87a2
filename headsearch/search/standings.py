"""Points as they stood at a rung, from the reports of their runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sqlalchemy import Connection, text

from headsearch.search.database import Database
from headsearch.search.points import Point
from headsearch.search.rungs import Standing
from headsearch.search.studies import Study


def standings(database: Database, connection: Connection, study: Study, epoch: int) -> list[Standing]:
    """All trials of a study of one seed that reported `epoch`, with their objectives as they were there."""
    known = _reported(database, connection, study, epoch)
    failed = connection.scalars(
        text("SELECT number FROM headsearch.trials WHERE study_id = :study_id AND state = 'failed'"),
        {"study_id": study.study_id},
    )
    left_out = set(failed)
    return [known[number] for number in sorted(known) if number not in left_out]


def standings_of_points(
    database: Database, connection: Connection, study: Study, epoch: int, points: Sequence[Point]
) -> list[Standing]:
    """Those of `points` that all their seeds brought to `epoch`, each as the mean of its runs.

    A run that failed by no fault of the configuration is left out of the mean, and the point is judged by the
    others. One whose configuration failed is not there.
    """
    known, found = _reported(database, connection, study, epoch), []
    for point in points:
        runs = [run.number for run in point.runs if not run.failed]
        whole = len(point.runs) == len(study.spec.seeds) and runs and all(n in known for n in runs)
        if whole and not point.infeasible:
            there = [known[number] for number in runs]
            found.append(
                Standing(
                    point.number,
                    statistics.fmean(one.accuracy for one in there),
                    tuple(map(statistics.fmean, zip(*(one.costs for one in there), strict=True))),
                    there[0].group,
                )
            )
    return found


def _reported(database: Database, connection: Connection, study: Study, epoch: int) -> dict[int, Standing]:
    # What was reported never changes, so this process reads each report once.
    known = database.memory(study.study_id).standings[epoch]
    costs = [name for name in study.spec.objectives if name != "probe_accuracy"]
    group = [index for index, name in enumerate(costs) if name != "train_seconds"]
    values = {"study_id": study.study_id, "epoch": epoch, "known": list(known)}
    for number, accuracy, *rest in connection.execute(
        text(
            f"SELECT {', '.join(['number', 'probe_accuracy', *costs])} "  # noqa: S608 - names of columns
            "FROM headsearch.reports r JOIN headsearch.trials t USING (study_id, number) "
            "LEFT JOIN unnest(CAST(:known AS integer[])) AS k (known) ON known = number "
            "WHERE study_id = :study_id AND r.epoch = :epoch AND known IS NULL"
        ),
        values,
    ):
        cost = tuple(map(float, rest))
        known[number] = Standing(number, accuracy, cost, tuple(cost[index] for index in group))
    return known

"""Trials as they stood at a rung, from their reports."""

from __future__ import annotations

from sqlalchemy import Connection, text

from headsearch.search.database import Database
from headsearch.search.rungs import Standing
from headsearch.search.studies import Study


def standings(database: Database, connection: Connection, study: Study, epoch: int) -> list[Standing]:
    """All trials that reported `epoch`, with their objectives as they were there."""
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
    failed = connection.scalars(
        text("SELECT number FROM headsearch.trials WHERE study_id = :study_id AND state = 'failed'"), values
    )
    left_out = set(failed)
    return [known[number] for number in sorted(known) if number not in left_out]

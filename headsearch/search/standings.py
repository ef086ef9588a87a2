"""Trials as they stood at a rung, from their reports."""

from __future__ import annotations

from sqlalchemy import Connection, text

from headsearch.search.rungs import Standing
from headsearch.search.studies import Study


def standings(connection: Connection, study: Study, epoch: int) -> list[Standing]:
    """All trials that reported `epoch`, with their objectives as they were there."""
    rows = connection.execute(
        text(
            "SELECT r.number, r.probe_accuracy, r.train_seconds, t.projection_dim, t.head_parameters "
            "FROM headsearch.reports r JOIN headsearch.trials t USING (study_id, number) "
            "WHERE r.study_id = :study_id AND r.epoch = :epoch AND t.state <> 'failed' ORDER BY r.number"
        ),
        {"study_id": study.study_id, "epoch": epoch},
    )
    costs = [name for name in study.spec.objectives if name != "probe_accuracy"]
    known = [name for name in costs if name != "train_seconds"]
    return [
        Standing(
            row.number,
            row.probe_accuracy,
            tuple(float(getattr(row, name)) for name in costs),
            tuple(float(getattr(row, name)) for name in known),
        )
        for row in rows
    ]

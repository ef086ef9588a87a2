"""What connections to the database cost, and how many are left."""

from __future__ import annotations

import statistics
import time

from sqlalchemy import text

from headsearch.search.database import Database

ROUNDS = 5


def answer_seconds(database: Database) -> float:
    """How long the database takes to answer the least question, the median of five."""
    took = []
    with database.begin() as connection:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            connection.execute(text("SELECT 1"))
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def free_connections(database: Database) -> tuple[int, int]:
    """How many more roles without privileges may open, and how many they may have in all."""
    with database.begin() as connection:
        most, used = connection.execute(
            text(
                """
                SELECT CAST(current_setting('max_connections') AS integer)
                       - CAST(current_setting('superuser_reserved_connections') AS integer)
                       - coalesce(CAST(current_setting('reserved_connections', true) AS integer), 0),
                       (SELECT sum(numbackends) FROM pg_stat_database)
                """
            )
        ).one()
    return int(most - used), int(most)

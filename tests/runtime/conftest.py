"""Databases that the commands work on."""

from __future__ import annotations

import pytest

from headsearch.search import schema
from headsearch.search.database import Database


@pytest.fixture
def make_database(headsearch_home, postgres_server, monkeypatch):
    """Makes fresh databases; the commands work on the one made last, or named last by `use`."""
    made = []

    def make(*, migrated=True):
        address = postgres_server.address(postgres_server.create_database())
        database = Database(address.url)
        made.append(database)
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", address.url)
        if migrated:
            schema.migrate(database)
        return database

    yield make
    for database in made:
        database.close()
        postgres_server.drop_database(database.engine.url.database)


@pytest.fixture
def database(make_database):
    return make_database()

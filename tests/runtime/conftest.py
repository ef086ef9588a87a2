"""Databases that the commands work on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import team

from headsearch.runtime.postgres import EmbeddedServer
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


@pytest.fixture(scope="session")
def team_server(open_folder_factory) -> Iterator[EmbeddedServer]:
    """A server whose roles the tests may make and drop."""
    with open_folder_factory("headsearch-team-") as home:
        server = EmbeddedServer(home / "postgres")
        with server.attach():
            team.prepare(server)
            yield server


@pytest.fixture
def new_team(request, team_server, tmp_path, headsearch_home) -> Iterator[team.Team]:
    """A database that nobody has migrated, of a role that may make roles, or of the one that a test names."""
    name = f"team_{uuid.uuid4().hex[:12]}"
    yield team.make_team(team_server, getattr(request, "param", team.LAB), name, tmp_path)
    team.forget_roles(team_server, name)


@pytest.fixture
def a_team(new_team, monkeypatch) -> team.Team:
    """The same, migrated, with its roles."""
    new_team.bring_up(monkeypatch)
    return new_team

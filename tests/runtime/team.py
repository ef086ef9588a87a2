"""A database for a team: an owner, workers, readers, with passwords in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest

from headsearch.runtime import pgroles
from headsearch.runtime.database import libpq_url
from headsearch.runtime.migration import bring_up
from headsearch.runtime.postgres import EmbeddedServer
from headsearch.search.roles import READER, WORKER

LAB = "lab"
"""Owns databases and may make roles, and is no superuser, as on a server that somebody else runs."""


@dataclass
class Team:
    """One database, whose owner's and members' passwords are in files."""

    port: int
    database: str
    owner: str
    folder: Path
    passwords: dict[str, str] = field(default_factory=dict)

    def file(self, role: str) -> Path:
        return self.folder / role

    def give(self, role: str, password: str) -> Path:
        """Write the password's file; the server hears of it by `bring_up`."""
        self.passwords[role] = password
        self.file(role).write_text(f"{password}\n")
        return self.file(role)

    def url(self, role: str, *, password: bool = False) -> str:
        secret = f":{quote(self.passwords[role], safe='')}" if password else ""
        return f"postgresql+psycopg2://{role}{secret}@127.0.0.1:{self.port}/{self.database}"

    def become(self, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
        """Our environment, and that of the processes that we start."""
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", self.url(role))
        monkeypatch.setenv("HEADSEARCH_DATABASE_PASSWORD_FILE", str(self.file(role)))

    def bring_up(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """`headsearch db migrate` as the owner."""
        with monkeypatch.context() as owner:
            self.become(owner, self.owner)
            return bring_up(worker=self.file(WORKER), reader=self.file(READER))

    @contextmanager
    def connected(self, role: str) -> Iterator[Any]:
        """A cursor of a connection of this role that commits each statement."""
        connection = psycopg2.connect(libpq_url(self.url(role, password=True)))
        connection.autocommit = True
        try:
            yield connection.cursor()
        finally:
            connection.close()

    def ask(self, role: str, statement: str) -> list[tuple[Any, ...]]:
        with self.connected(role) as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def prepare(server: EmbeddedServer) -> None:
    """Make LAB, and take the embedded server's own reader away."""
    with pgroles.connected(server.url("owner")) as connection:
        cursor = connection.cursor()
        cursor.execute(f"DROP OWNED BY {READER}")
        cursor.execute(f"DROP ROLE {READER}")
        cursor.execute(f"CREATE ROLE {LAB} LOGIN CREATEROLE PASSWORD 'lab: pass\\word'")


def make_team(server: EmbeddedServer, owner: str, name: str, folder: Path) -> Team:
    """A fresh database such as CREATE DATABASE makes it, and passwords with signs in them."""
    port = server.folder.port
    assert port is not None
    with pgroles.connected(server.url("owner")) as connection:
        connection.cursor().execute(f"CREATE DATABASE {name} OWNER {owner}")
    team = Team(port, name, owner, folder)
    password = server.folder.password("owner")
    assert password is not None
    team.give(pgroles.OWNER, password)
    team.give(LAB, "lab: pass\\word")
    team.give(WORKER, "w:rk %40/@'\\ é")
    team.give(READER, "r\\:ad")
    return team


def forget_roles(server: EmbeddedServer, name: str) -> None:
    """Drop the database and then the roles, which its grants would hold."""
    with pgroles.connected(server.url("owner")) as connection:
        cursor = connection.cursor()
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        for role in (WORKER, READER):
            cursor.execute(f"DROP ROLE IF EXISTS {role}")

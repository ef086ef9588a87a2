"""What the owner of a database does once for a team, and again after an upgrade or for new passwords."""

from __future__ import annotations

from pathlib import Path

from headsearch.errors import InputError
from headsearch.passwords import read_password
from headsearch.runtime.database import URL_VARIABLE
from headsearch.runtime.session import open_session
from headsearch.search.roles import READER, WORKER, apply_grants, open_doors, set_password
from headsearch.search.schema import MIGRATIONS


def bring_up(*, worker: Path | None = None, reader: Path | None = None) -> list[str]:
    """Make or update the tables, the roles whose password files are given, and what both roles may.

    May be repeated, and from several places at once.

    Args:
        worker: File with the password of `headsearch_worker`.
        reader: File with the password of `headsearch_reader`.

    Returns:
        Lines on what is there now, and on what the roles may do that we could not take from them.

    Raises:
        InputError: A file holds no password, or the database is the embedded one, whose roles are its own.
        AccessError: The URL's role is not the owner, or may not make roles.
        DatabaseError: The database does not answer, or is of a newer headsearch.
    """
    passwords = {
        role: read_password(file, option)
        for role, file, option in (
            (WORKER, worker, "--worker-password-file"),
            (READER, reader, "--reader-password-file"),
        )
        if file is not None
    }
    with open_session() as session:
        if passwords and session.address.embedded:
            raise InputError(
                "the embedded server has roles of its own and is for this machine alone: for others, "
                f"set {URL_VARIABLE} to a server that they reach"
            )
        lines = [f"{session.address.redacted}: tables of version {len(MIGRATIONS)}"]
        # Before a role is made, whoever may not is refused.
        apply_grants(session.database)
        for role, password in passwords.items():
            new = set_password(session.database, role, password)
            lines.append(f"role {role}: {'made' if new else 'password set'}")
        for role in apply_grants(session.database):
            lines.append(f"role {role}: may do what it should")
            if not session.address.embedded:
                lines += [f"note: {door}" for door in open_doors(session.database, role)]
        return lines

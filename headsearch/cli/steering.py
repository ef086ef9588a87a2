"""Commands on a study that workers are on: status, pause, resume, requeue, cancel, upgrade."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from headsearch.cli.options import Json, Name, emit, emit_lines

KEPT = 1
Numbers = Annotated[list[int] | None, typer.Argument(metavar="[TRIAL]...", help="Trial numbers.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (status, pause, resume, requeue, cancel, upgrade):
        app.command()(command)


def status(name: Name, as_json: Json = False) -> None:
    """Show who works on a study now: workers, their trials and last beats; orphans; what waits."""
    from headsearch.report.status import status_json, status_lines
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import read

    with open_session() as session:
        snapshot = read(session.database, study_name(name))
    if as_json:
        emit(status_json(snapshot))
    else:
        emit_lines(status_lines(snapshot))


def pause(name: Name) -> None:
    """Pause a study: workers give their trials back after the epoch, stay, and wait for resume."""
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search import steering

    with open_session() as session:
        study = steering.pause(session.database, study_name(name))
    emit_lines([f"study {study.name} is paused; to go on: headsearch study resume {study.name}"])


def resume(name: Name) -> None:
    """Open a paused or cancelled study again; cancelled trials stay so until they are requeued."""
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search import steering

    with open_session() as session:
        study = steering.resume(session.database, study_name(name))
    emit_lines([f"study {study.name} is open; work on it: headsearch worker --study {study.name}"])


def requeue(
    name: Name,
    numbers: Numbers = None,
    reason: Annotated[
        str | None, typer.Option(metavar="WORD", help="Only those that failed for it, such as lost.")
    ] = None,
) -> None:
    """Have failed trials trained again, all or those named; each point gets a trial of a new number."""
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search import steering

    wanted = study_name(name)
    with open_session() as session:
        chosen = steering.requeue(session.database, wanted, numbers or [], reason=reason)
    if chosen:
        shown = ", ".join(map(str, chosen))
        emit_lines([f"requeued: trial {shown}; train the points again: headsearch worker --study {wanted}"])
    else:
        emit_lines(["no failed trial" + (f" of reason {reason}" if reason else "") + ": nothing requeued"])


def cancel(
    name: Name,
    numbers: Numbers = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cancel trials, or a whole study: what runs ends as failed, what is paused as pruned."""
    from headsearch.errors import InputError
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search import steering
    from headsearch.search.studies import get

    wanted = study_name(name)
    with open_session() as session:
        get(session.database, wanted)
        if not numbers and not yes:
            if not sys.stdin.isatty():
                raise InputError("--yes: needed where nobody can be asked")
            if not typer.confirm(f"Cancel study {wanted} and its unfinished trials?"):
                emit_lines(["nothing cancelled"])
                raise typer.Exit(KEPT)
        ended = steering.cancel(session.database, wanted, numbers or [])
    trials = f"trial {', '.join(map(str, ended))}" if ended else "no trial was unfinished"
    emit_lines([f"cancelled: {trials}" if numbers else f"study {wanted} is cancelled: {trials}"])


def upgrade(name: Name) -> None:
    """Let workers of this version go on with a study of another version of headsearch."""
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search import steering

    with open_session() as session:
        study = steering.upgrade(session.database, study_name(name))
    emit_lines([f"study {study.name} is of headsearch {study.version} from here on"])

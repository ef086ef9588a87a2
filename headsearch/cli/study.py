"""Commands on studies in the database: create, list, show, front, compare, confirm, delete, schema."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headsearch.cli.options import (
    FAILED,
    INTERRUPTED,
    Device,
    Json,
    Name,
    NoCheck,
    Overrides,
    StudyFile,
    Threads,
    Workers,
    emit,
    emit_lines,
    note,
)

if TYPE_CHECKING:
    from headsearch.search.database import Database
    from headsearch.search.snapshot import Snapshot

KEPT = 1
BROKEN = 1

app = typer.Typer(
    help="Make, list, show, steer and delete studies.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def create(study: StudyFile, overrides: Overrides = None, no_check: NoCheck = False) -> None:
    """Make a study for workers to come; an equal one that exists is kept."""
    from headsearch.report.summary import header
    from headsearch.runtime.bundled import study_file
    from headsearch.runtime.running import make_study
    from headsearch.runtime.session import open_session
    from headsearch.search.imagesets import images_of
    from headsearch.study_file import load_study

    spec = load_study(study_file(study), overrides or [])
    with open_session() as session:
        made, new, notes = make_study(session, spec, data_check=not no_check)
        for line in notes:
            note(line)
        known = images_of(session.database, made)
        emit_lines([f"{label:<11}{text}" for label, text in header(made, session.address.redacted, known)])
        emit_lines(
            [
                f"study {made.name} {'made' if new else 'exists already, with the same spec'}",
                f"work on it: headsearch worker --study {made.name}",
            ]
        )


@app.command("list")
def list_studies(as_json: Json = False) -> None:
    """List all studies, the newest first."""
    from headsearch.report.summary import listing, listing_json
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import progress
    from headsearch.search.studies import all_studies

    with open_session() as session:
        found = [(study, progress(session.database, study)) for study in all_studies(session.database)]
    if as_json:
        emit([listing_json(*one) for one in found])
    elif found:
        seen = any(study.spec.trains_on_validation for study, _ in found)
        emit_lines(listing(found).lines() + ["(seen): of validation images that were trained on"] * seen)
    else:
        emit_lines(["no study yet: headsearch run quickstart"])


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show a study: spec, counts, all trials, workers."""
    from headsearch.report.progress import counts_line
    from headsearch.report.status import worker_lines
    from headsearch.report.summary import header, study_json
    from headsearch.report.trials import trial_table
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import read

    wanted = study_name(name)
    with open_session() as session:
        snapshot, where = read(session.database, wanted), session.address.redacted
    if as_json:
        emit(study_json(snapshot))
        return
    emit_lines([f"{label:<11}{text}" for label, text in header(snapshot.study, where, snapshot.images)])
    emit_lines([counts_line(snapshot), *worker_lines(snapshot)])
    if snapshot.trials:
        emit_lines(["", *trial_table(snapshot, most=None).lines()])


@app.command()
def front(
    name: Name,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it: .html, or .png and .svg with Chrome or Chromium."),
    ] = None,
) -> None:
    """Show the front: validation accuracy, which selects, against projection dim; and test accuracy."""
    from headsearch.report.fronts import front_csv, front_json
    from headsearch.report.summary import front_lines
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import read

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv: give one of the two")
    wanted = study_name(name)
    with open_session() as session:
        snapshot = read(session.database, wanted)
    if figure is not None:
        from headsearch.report.figures import front_figure, save_figure

        save_figure(front_figure(snapshot), figure)
        note(f"drawn to {figure}")
    if as_json:
        emit(front_json(snapshot))
    elif as_csv:
        typer.echo(front_csv(snapshot), nl=False)
    elif figure is None:
        emit_lines(front_lines(snapshot))


@app.command()
def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Studies in the database, or their files.")
    ],
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    across: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="Rank studies that differ in epochs, probe, software or train_on."),
    ] = None,
) -> None:
    """Rank all points of one or several studies, each the mean of its seeds.

    Studies of different protocols, or on different images, are refused: their numbers mean different things.
    """
    from headsearch.report.comparison import (
        ACROSS,
        comparison_captions,
        comparison_csv,
        comparison_json,
        comparison_table,
    )
    from headsearch.report.comparison import (
        compare as ranked,
    )
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import read

    if as_json + as_csv + markdown > 1:
        raise typer.BadParameter("--json, --csv and --markdown: give one of the three")
    if unknown := set(across or ()) - set(ACROSS):
        raise typer.BadParameter(f"--across: {min(unknown)!r} is not one of {', '.join(ACROSS)}")
    wanted = list(dict.fromkeys(study_name(name) for name in names))
    with open_session() as session:
        snapshots = [read(session.database, name) for name in wanted]
    found = ranked(snapshots, across or ())
    table = comparison_table(snapshots, found)
    if as_json:
        emit(comparison_json(snapshots, found))
    elif as_csv:
        typer.echo(comparison_csv(snapshots, found), nl=False)
    elif markdown:
        emit_lines([table.markdown(), "", *(f"- {line}" for line in comparison_captions(snapshots))])
    else:
        lines = table.lines() if table.rows else ["no trial is complete yet"]
        emit_lines([*comparison_captions(snapshots), "", *lines])


@app.command()
def confirm(
    name: Name,
    seeds: Annotated[int, typer.Option(min=1, help="Fresh seeds for each point of the front.")] = 5,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="Train on training and validation images together.")
    ] = False,
    workers: Workers = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a study's front again with fresh seeds, before you believe it.

    Makes the study NAME-confirm-SEEDS and works on it here; interrupted, the same command goes on. With
    --all-images, NAME-confirm-SEEDS-all-images: trained on training and validation images, as papers do that
    hold none out; its test accuracy is the one to hold beside theirs, its validation accuracy says little.
    """
    from headsearch.cli.display import open_display
    from headsearch.report.confirmation import beside, confirmation
    from headsearch.report.summary import confirmed_lines, header
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.running import Crew, run_study
    from headsearch.runtime.session import open_session
    from headsearch.search import studies
    from headsearch.search.imagesets import images_of
    from headsearch.search.snapshot import read

    wanted = study_name(name)
    with open_session() as session:
        search = read(session.database, wanted)
        made, _ = studies.create(session.database, confirmation(search, seeds, all_images=all_images))
        with open_display(
            header(made, session.address.redacted, images_of(session.database, made)), quiet=False
        ) as display:
            result = run_study(session, made, Crew(workers, device, threads), display)
        compared = beside(search, _confirming(session.database, search, seeds))
        emit_lines([*confirmed_lines(result.snapshot), "", *compared])
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.snapshot.counts["failed"]:
        raise typer.Exit(FAILED)


def _confirming(database: Database, search: Snapshot, seeds: int) -> list[Snapshot]:
    """The studies that `confirm` made of the front of `search` with so many seeds."""
    from headsearch.errors import InputError
    from headsearch.report.confirmation import confirmation
    from headsearch.search.snapshot import read

    found = []
    for all_images in (False, True):
        with contextlib.suppress(InputError):  # there is none, or there can be none
            wanted = confirmation(search, seeds, all_images=all_images)
            snapshot = read(database, wanted.name)
            if snapshot.study.spec.hash == wanted.hash:
                found.append(snapshot)
    return found


@app.command()
def verify(name: Name, as_json: Json = False) -> None:
    """Audit a study: budget, states here and in Optuna, leases, reports, rungs, images, paused checkpoints.

    Exit 1 if a rule is violated. Changes nothing; may be run while workers train.
    """
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.session import open_session
    from headsearch.runtime.verifying import verify as examine

    with open_session() as session:
        verdict = examine(session, study_name(name))
    if as_json:
        emit(verdict.to_json())
    else:
        emit_lines(verdict.lines())
    if not verdict.clean:
        raise typer.Exit(BROKEN)


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while workers train its trials.")] = False,
) -> None:
    """Delete a study with its trials, curves and checkpoints."""
    from headsearch.errors import InputError
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.removal import delete_study
    from headsearch.runtime.session import open_session
    from headsearch.search.snapshot import progress
    from headsearch.search.studies import get

    wanted = study_name(name)
    with open_session() as session:
        if not (yes or sys.stdin.isatty()):
            raise InputError("--yes: needed where nobody can be asked")
        if not yes:
            trials = sum(progress(session.database, get(session.database, wanted)).trials.values())
            if not typer.confirm(f"Delete study {wanted} with {trials} trials?"):
                emit_lines(["nothing deleted"])
                raise typer.Exit(KEPT)
        delete_study(session, wanted, force=force)
    emit_lines([f"study {wanted} deleted"])


@app.command()
def schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from headsearch.study_schema import study_schema

    emit(study_schema())

"""Commands that train: run, worker, train."""

from __future__ import annotations

from typing import Annotated

import typer

from headsearch.cli.options import (
    FAILED,
    INTERRUPTED,
    Device,
    Json,
    NoCheck,
    Overrides,
    StudyFile,
    Threads,
    Workers,
    emit,
    emit_lines,
    note,
)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(run)
    app.command()(worker)
    app.command()(train)


def run(
    study: StudyFile,
    workers: Workers = None,
    device: Device = "auto",
    threads: Threads = None,
    overrides: Overrides = None,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Make or resume a study, train it here, show its front.

    Ctrl-C lets workers finish their epoch; the same command goes on from there.
    Exit codes: 0 done, 1 some trials failed, 2 wrong input, 130 interrupted.
    """
    from headsearch.cli.display import open_display
    from headsearch.report.summary import ending, ending_json, header, nothing_to_train
    from headsearch.runtime.bundled import study_file
    from headsearch.runtime.running import Crew, make_study, run_study
    from headsearch.runtime.session import open_session
    from headsearch.search.imagesets import images_of
    from headsearch.study_file import load_study

    path, given = study_file(study), overrides or []
    spec = load_study(path, given)
    with open_session() as session:
        made, _, notes = make_study(session, spec, data_check=not no_check, device=device)
        for line in notes:
            note(line)
        shown = header(made, session.address.redacted, images_of(session.database, made))
        with open_display(shown, quiet=as_json) as display:
            result = run_study(session, made, Crew(workers, device, threads), display)
        if as_json:
            emit(ending_json(result.snapshot, study, given, seconds=result.seconds))
        else:
            if not result.started:
                emit_lines([nothing_to_train(made), ""])
            elif result.interrupted:
                emit_lines(["interrupted: the same command goes on from here", ""])
            seconds = result.seconds if result.started else None
            emit_lines(ending(result.snapshot, study, given, seconds=seconds))
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.snapshot.counts["failed"]:
        raise typer.Exit(FAILED)


def worker(
    study: Annotated[str, typer.Option(metavar="NAME", help="Study in the database.")],
    device: Device = "auto",
    threads: Threads = None,
    count: Annotated[int | None, typer.Option(min=1, help="Leave after this many trials have ended.")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    drained_exit_code: Annotated[
        int,
        typer.Option(
            min=0, max=255, metavar="CODE", help="Exit code where a signal ended it, not the study."
        ),
    ] = 0,
) -> None:
    """Train trials of a study that exists, until it is complete.

    As many workers may join as there are machines; on a GPU each holds a lease, and the others wait.
    The first SIGTERM or Ctrl-C ends it after the current epoch, the second at once. SIGUSR1 and SIGUSR2 are
    taken like the first, however often they come.
    """
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.placement import start_worker

    name = study_name(study)
    result = start_worker(
        name,
        device=device,
        threads=threads,
        count=count,
        parent=parent,
        drained_exit_code=drained_exit_code,
        say=lambda line: typer.echo(line),
    )
    typer.echo(f"{result.ended} trials ended, {result.failed} of them failed")
    if result.drained and drained_exit_code:
        raise typer.Exit(drained_exit_code)


def train(
    study: StudyFile,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(min=0, help="By default the study's first.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train one point of a study, without a database.

    Parameters that are not set take their first value; training.epochs=0 measures the untrained encoder.
    """
    from headsearch.home import home_folder
    from headsearch.report.protocols import SEEN_WITH, splits, validation
    from headsearch.report.tables import duration
    from headsearch.runtime.bundled import study_file
    from headsearch.runtime.single import point_of
    from headsearch.runtime.single import train as train_point

    config = point_of(study_file(study), overrides or [], seed=seed)
    selection = validation(config.data.train_on)
    training = train_point(config, home=home_folder(), device=device, threads=threads, say=note)
    while True:
        try:
            report = next(training)
        except StopIteration as stop:
            point = stop.value
            break
        if not as_json:
            typer.echo(
                f"epoch {report.epoch}/{config.training.epochs}: loss {report.loss:.4f}, "
                f"{selection} accuracy {report.probe_accuracy:.4f}, ranks {report.feature_rank:.1f} of "
                f"features and {report.projection_rank:.1f} of projections, "
                f"{report.views_per_second:,.0f} views/s, {duration(report.train_seconds)}"
            )
    if as_json:
        emit(point.to_json())
        return
    trained, measured = point.pretrained, point.evaluation
    typer.echo(
        f"head {config.head.kind}: projection dim {trained.projection_dim}, {trained.head_parameters:,} "
        f"parameters ({trained.trainable_head_parameters:,} trained); {trained.precision} on {point.device}"
    )
    first, final = splits(config.protocol, config.data.train_on).values()
    typer.echo(
        f"linear probe, protocol {config.protocol}: accuracy {measured.probe_accuracy:.4f} on "
        f"{first} ({measured.validation_images:,} images), {measured.test_accuracy:.4f} on "
        f"{final} ({measured.test_images:,} images)"
    )
    if config.data.trains_on_validation:
        typer.echo(SEEN_WITH[config.protocol])
    for name, number in measured.details.items():
        if isinstance(number, float):
            typer.echo(f"{name.replace('_', ' ')} {number:.4g}")
    if trained.measures:
        shown = ", ".join(f"{name} {number:.4g}" for name, number in trained.measures.items())
        typer.echo(f"last report: {shown}")

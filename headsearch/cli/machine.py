"""Commands about what there is: heads, dashboard, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headsearch.cli.options import Json, emit, emit_lines

BROKEN = 1


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(heads)
    app.command()(dashboard)
    app.command()(doctor)


def heads(
    encoder: Annotated[
        str, typer.Option(metavar="NAME", help="Encoder whose features heads see.")
    ] = "resnet18",
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> None:
    """List the heads, objectives and schemes that a study can name, and the recipes.

    Use them as base.system, as a parameter `system` of a space, or as base.recipe.
    """
    from headsearch.runtime.catalogue import catalogue_json, recipe_table, system_table, systems

    found = systems(encoder)
    if as_json:
        emit(catalogue_json(found))
        return
    for table in (system_table(found), recipe_table()):
        emit_lines([table.markdown(), ""] if markdown else [*table.lines(), ""])


def dashboard(
    study: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the address of this study's page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let visitors change and delete studies.")
    ] = False,
    auth_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of user:password lines; visitors must know one.")
    ] = None,
    trusted_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Header in which an authenticating proxy in front names the user."),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="Where that proxy is; loopback unless named. May be repeated."),
    ] = None,
) -> None:
    """Serve optuna-dashboard, read-only unless asked.

    The database may be that of headsearch_reader, and without tables yet.
    """
    from headsearch.runtime.bundled import study_name
    from headsearch.runtime.dashboard import serve
    from headsearch.runtime.session import open_session
    from headsearch.runtime.visitors import read_visitors
    from headsearch.search.studies import get

    visitors = read_visitors(auth_file, trusted_header, trusted_proxy or ())
    wanted = study_name(study) if study else None
    # A page may wait for tables, one of a study cannot.
    with open_session(tables=wanted is not None) as session:
        page = f"/dashboard/studies/{get(session.database, wanted).study_id}" if wanted else "/dashboard"
        serve(
            session.address,
            host,
            port,
            writable=writable,
            visitors=visitors,
            ready=lambda url: typer.echo(f"dashboard on {url}{page} (Ctrl-C ends it)"),
        )


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and how to get the rest.

    Exit 1 if something that headsearch needs is broken.
    """
    from headsearch.runtime.doctor import examine

    findings = examine()
    if as_json:
        emit([vars(finding) for finding in findings])
    else:
        emit_lines(
            [
                f"{finding.state:<7}{finding.name:<12}{finding.text}"
                + (f" -> {finding.remedy}" if finding.remedy else "")
                for finding in findings
            ]
        )
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(BROKEN)

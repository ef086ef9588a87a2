"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

FAILED = 1
"""Exit code where some trials failed."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""

StudyFile = Annotated[
    str,
    typer.Argument(
        metavar="STUDY.toml",
        help="Study file, or a bundled one by name: quickstart, cifar10, systems, ...",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Study in the database, or its file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Override a field, such as budget.trials=40 or data.limit=5000."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:<index>.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes; by default one per GPU and slot, else one per two cores (at least 2).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not look at the data first, such as on a machine without it.")
]


def emit(data: Any) -> None:
    """Print JSON for a machine."""
    typer.echo(json.dumps(data, indent=2))


def emit_lines(lines: list[str]) -> None:
    """Print lines for people."""
    typer.echo("\n".join(lines))


def note(line: str) -> None:
    """Print what is no result on standard error."""
    typer.echo(line, err=True)

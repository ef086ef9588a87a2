"""The command ``headsearch``: its groups, and one place where errors become a line and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from headsearch import __version__
from headsearch.cli import bench, database, launch, machine, steering, study, training
from headsearch.errors import HeadsearchError
from headsearch.openmp import spin_briefly

USAGE = 2
INTERRUPTED = 130
LONGEST_NAME = 120
"""Of a path in a message, in characters."""
OF_A_PATH = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL,
}  # fmt: skip
"""Errors of the path that was given; others are the machine's."""

app = typer.Typer(
    name="headsearch",
    help="Search projection heads: accuracy against projection dim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
training.add_to(app)
bench.add_to(app)
launch.add_to(app)
steering.add_to(study.app)
app.add_typer(study.app, name="study")
machine.add_to(app)
app.add_typer(database.app, name="db")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headsearch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Search projection heads: accuracy against projection dim."""


def main() -> None:
    """Run the command line and exit."""
    spin_briefly()
    open_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The commands that load data name the files left out; once in the log is enough, in one line.
    logging.getLogger("headsearch.core.folder").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))


def open_streams() -> None:
    """Put the null device in the place of standard streams that are closed, as daemons and cron leave them.

    Else the next file that is opened takes the number, and what is printed goes into it. What a stream's
    encoding lacks is printed as a question mark.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            place = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if place != number:
                os.dup2(place, number)
                os.close(place)
            stream = os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. Errors are one line on standard error.

    0 done, 1 something failed, 2 the input cannot be used, 130 interrupted.
    """
    code = 1
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us is gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _invoke(arguments: Sequence[str]) -> int:
    try:
        code = app(args=list(arguments), prog_name="headsearch", standalone_mode=False)
    except HeadsearchError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.strerror is None:
            return _fail(f"unexpected {type(error).__name__}: {error}", 1)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        where = " -> ".join(
            name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names
        )
        code = USAGE if error.errno in OF_A_PATH else 1
        return _fail(f"{where}: {error.strerror}" if where else error.strerror, code)
    except Exception as error:  # noqa: BLE001  the last line of defence
        if hasattr(error, "format_message"):  # of the parser, whose classes are no public part of typer
            return _misused(error)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"unexpected {what}; set HEADSEARCH_DEBUG=1 to see where", 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if os.environ.get("HEADSEARCH_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _misused(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 0
    command = context.command_path if context is not None else "headsearch"
    return _fail(f"{message.rstrip('.')}; see {command} --help", USAGE)

"""A run as it goes: a live table on a terminal, a line an event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from headsearch.report import protocols
from headsearch.report.fronts import best_point
from headsearch.report.progress import counts_line, events, seconds_left
from headsearch.report.summary import best_text
from headsearch.report.tables import duration
from headsearch.report.trials import best, in_order, params_text, trial_table, varying
from headsearch.runtime.running import Watcher
from headsearch.search.snapshot import Snapshot

Header = Sequence[tuple[str, str]]
STYLES = {
    "running": "bold",
    "orphaned": "yellow",
    "paused": "cyan",
    "complete": "green",
    "pruned": "dim",
    "failed": "red",
}
LABEL_WIDTH = 11
MOST_NOTES = 4


@contextmanager
def open_display(header: Header, *, quiet: bool = False) -> Iterator[Watcher]:
    """Show a run: on standard error where standard output is for a machine (`quiet`)."""
    if quiet or not sys.stdout.isatty():
        yield PlainDisplay(header, to_errors=quiet)
        return
    display = LiveDisplay(header, Console())
    with display:
        yield display


class PlainDisplay:
    """Lines for logs."""

    def __init__(self, header: Header, *, to_errors: bool = False) -> None:
        self._header, self._err = header, to_errors
        self._last: Snapshot | None = None

    def start(self, snapshot: Snapshot, note: str) -> None:
        """Print the header."""
        for label, text in (*self._header, ("workers", note)):
            self.note(f"{label:<{LABEL_WIDTH}}{text}")
        if snapshot.trials:
            self.note(f"resumed: {counts_line(snapshot)}")
        self._last = snapshot

    def update(self, snapshot: Snapshot) -> None:
        """Print what changed."""
        if self._last is not None:
            for line in events(self._last, snapshot):
                self.note(line)
        self._last = snapshot

    def note(self, line: str) -> None:
        """Print a line now, also into a pipe."""
        typer.echo(line, err=self._err)
        (sys.stderr if self._err else sys.stdout).flush()


class LiveDisplay:
    """A table that is redrawn in place, gone when the run ends."""

    def __init__(self, header: Header, console: Console) -> None:
        self._header, self._console = list(header), console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._notes: list[str] = []
        self._first: Snapshot | None = None
        self._now: Snapshot | None = None
        self._began = time.monotonic()

    def __enter__(self) -> LiveDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        for line in self._notes:
            self._console.print(Text(line))

    def start(self, snapshot: Snapshot, note: str) -> None:
        """Begin to draw."""
        self._header.append(("workers", note))
        self._first = self._now = snapshot
        self._live.start()
        self._draw()

    def update(self, snapshot: Snapshot) -> None:
        """Draw the study now."""
        self._now = snapshot
        self._draw()

    def note(self, line: str) -> None:
        """Keep a line below the table."""
        self._notes.append(line)
        self._draw()

    def _draw(self) -> None:
        if self._first is not None and self._now is not None:
            elapsed = time.monotonic() - self._began
            shown = render(self._header, self._first, self._now, self._notes[-MOST_NOTES:], elapsed=elapsed)
            self._live.update(shown, refresh=True)


def render(
    header: Header, first: Snapshot, now: Snapshot, notes: Sequence[str] = (), *, elapsed: float
) -> RenderableType:
    """Everything that the live display shows at one moment."""
    facts = RichTable.grid(padding=(0, 1))
    facts.add_column(style="dim")
    for label, text in header:
        facts.add_row(label, Text(text, overflow="fold"))
    left = seconds_left(first, now)
    clock = f"elapsed {duration(elapsed)}" + ("" if left is None else f", about {duration(left)} left")
    facts.add_row("progress", Text(f"{counts_line(now)}; {clock}"))
    spec = now.study.spec
    top = best(now) if len(spec.seeds) == 1 else None
    if len(spec.seeds) > 1 and (point := best_point(now)) is not None:
        shown = f"{best_text(point, spec)}, {params_text(point.params, varying(spec))}"
        facts.add_row("best", Text(shown))
    if top is not None:
        seen = protocols.validation(spec.train_on)
        state = "" if top.state == "complete" else f", {top.state}"
        text = f"trial {top.number}{state}: accuracy {top.probe_accuracy or 0.0:.4f} ({seen}), "
        facts.add_row("best", Text(text + params_text(in_order(spec, top.params), varying(spec))))
    parts: list[RenderableType] = [facts]
    if now.trials:
        parts.append(_drawn(now))
    parts += [Text(line, style="yellow") for line in notes]
    return Group(*parts)


def _drawn(snapshot: Snapshot) -> RenderableType:
    table = trial_table(snapshot)
    drawn = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, right in zip(table.columns, table.right_aligned, strict=True):
        drawn.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*map(Text, row), style=STYLES.get(row[1].split(":")[0], ""))
    if not table.more:
        return drawn
    return Group(drawn, Text(f"... and {table.more} more", style="dim"))

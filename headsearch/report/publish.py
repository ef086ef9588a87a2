"""What the dashboard shows of a study beside its trials: a figure of the front and a note."""

from __future__ import annotations

import plotly.graph_objects as go
from optuna_dashboard import save_note, save_plotly_graph_object

from headsearch.report.figures import front_figure
from headsearch.report.fronts import captions, front_table
from headsearch.report.summary import failures, space_text, totals
from headsearch.search import snapshot as snapshots
from headsearch.search.database import Database, quietly, translated
from headsearch.search.snapshot import Snapshot

FIGURE_ID = "headsearch-front"
MOST_FIGURE_BYTES = 200_000
"""The dashboard sends figures again with every poll of its page."""


def publish(database: Database, name: str) -> None:
    """Save figure and note of the study `name` for the dashboard; calling it again replaces both.

    Raises:
        UnknownStudyError: There is no such study.
        DatabaseError: Not reachable.
    """
    read = snapshots.read(database, name)
    study = database.optuna_study(name)
    with quietly(), translated():
        save_plotly_graph_object(study, small_figure(read), graph_object_id=FIGURE_ID)
        save_note(study, note(read))


def small_figure(read: Snapshot) -> go.Figure:
    """Draw the front with as much detail as `MOST_FIGURE_BYTES` allow."""
    figure = front_figure(read)
    for hover, pruned in ((False, True), (False, False)):
        if len(figure.to_json()) <= MOST_FIGURE_BYTES:
            break
        figure = front_figure(read, hover=hover, pruned=pruned)
    return figure


def note(read: Snapshot) -> str:
    """Markdown: question, how it was answered, the front."""
    spec = read.study.spec
    table = front_table(read)
    facts = [
        *captions(read),
        f"space: {space_text(spec)}; seeds {', '.join(map(str, spec.seeds))}",
        totals(read),
        f"full spec hash `{spec.hash}`",
    ]
    parts = [
        f"# {spec.name}",
        spec.question,
        "\n".join(f"- {line}" for line in facts),
        "## Front",
        table.markdown() if table.rows else "No trial is complete yet.",
    ]
    if failed := failures(read):
        parts += ["## Failed", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(part for part in parts if part) + "\n"

"""The front as a picture: validation accuracy against projection dim."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from headsearch.errors import InputError, StorageError, WorldError
from headsearch.report import protocols
from headsearch.report.fronts import FrontPoint, front, groups, has_ended, points
from headsearch.report.tables import value
from headsearch.report.trials import in_order, params_text
from headsearch.search.snapshot import Snapshot, TrialRow
from headsearch.spec import StudySpec

SUFFIXES = (".html", ".png", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which people with colour blindness can tell apart."""
FEW_TICKS = 12


@dataclass(frozen=True)
class _Mark:
    """What is drawn as one point: a trial, or with several seeds the mean of a point's."""

    trial: TrialRow
    """The only one, or the first seed's."""
    label: str
    """Its trials."""
    accuracy: float
    test: float | None
    lacks_seeds: bool


def front_figure(snapshot: Snapshot, *, hover: bool = True, pruned: bool = True) -> go.Figure:
    """Draw complete points by head kind, the front as a step line, pruned ones faintly.

    A point is the mean of its seeds; one that lacks some is hollow, and has its own legend. The front is that
    of the two axes, also where the study has more objectives. `hover` writes the parameters beside each
    point, `pruned` draws pruned points at their last reports.
    """
    spec = snapshot.study.spec
    figure = go.Figure()
    complete, ended = _complete_marks(snapshot), _pruned_marks(snapshot)
    if pruned and ended:
        faint = {"color": "#888888", "size": 6, "opacity": 0.3}
        figure.add_trace(_points(spec, ended, "pruned, at its last report", faint, hover=hover))
    kinds = sorted({_head_kind(snapshot, mark.trial) for mark in complete})
    for lacking in (False, True):
        for index, kind in enumerate(kinds):
            marks = [
                mark
                for mark in complete
                if mark.lacks_seeds == lacking and _head_kind(snapshot, mark.trial) == kind
            ]
            marker: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "size": 9}
            if lacking:
                marker["symbol"] = "diamond-open"
            name = f"head: {kind}" + (", seeds missing" if lacking else "")
            if marks:
                figure.add_trace(_points(spec, marks, name, marker, hover=hover))
    if best := [point for point in front(snapshot, _axes(snapshot)) if point.projection_dim]:
        figure.add_trace(_front_line(best, protocols.validation(spec.train_on)))
    dims = sorted({mark.trial.projection_dim or 1 for mark in complete + (ended if pruned else [])})
    several = len(spec.seeds) > 1
    what = f"complete points of {len(spec.seeds)} seeds" if several else "complete trials"
    figure.update_layout(
        title=f"{spec.name}: front of {len(complete)} {what}, protocol {spec.protocol}",
        xaxis={
            "title": "projection dim (log scale)",
            "type": "log",
            **({"tickvals": dims, "ticktext": [str(dim) for dim in dims]} if len(dims) <= FEW_TICKS else {}),
        },
        yaxis={"title": f"linear-probe accuracy ({protocols.validation(spec.train_on)} split)"},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def save_figure(figure: go.Figure, path: Path) -> None:
    """Write `figure` to `path`: .html, which needs nothing else to be shown, .png or .svg.

    Raises:
        InputError: Another suffix.
        WorldError: No Chrome or Chromium for .png and .svg.
        StorageError: The file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"--figure {path}: the name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"--figure {path}: there is no folder {path.parent}")
    try:
        if suffix == ".html":
            figure.write_html(path, include_plotlyjs=True, full_html=True)
        else:
            path.write_bytes(_image(figure, suffix[1:]))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error


def _image(figure: go.Figure, kind: str) -> bytes:
    try:
        drawn: bytes = figure.to_image(format=kind, width=900, height=560, scale=2)
    except Exception as error:  # kaleido and its browser raise many kinds
        raise WorldError(
            f".{kind} needs Chrome or Chromium and the package kaleido (pip install kaleido); "
            "use a name ending in .html"
        ) from error
    return drawn


def _axes(snapshot: Snapshot) -> tuple[str, ...]:
    return tuple(n for n in snapshot.study.spec.objectives if n in ("probe_accuracy", "projection_dim"))


def _drawable(trial: TrialRow) -> bool:
    return trial.projection_dim is not None and trial.probe_accuracy is not None


def _complete_marks(snapshot: Snapshot) -> list[_Mark]:
    by_number = {trial.number: trial for trial in snapshot.trials}
    return [
        _Mark(
            first,
            _label([by_number[number] for number in point.numbers]),
            point.probe_accuracy.mean,
            None if point.test_accuracy is None else point.test_accuracy.mean,
            point.n < point.asked,
        )
        for point in points(snapshot)
        if not point.infeasible and _drawable(first := by_number[point.numbers[0]])
    ]


def _pruned_marks(snapshot: Snapshot) -> list[_Mark]:
    """Points without a complete seed of which one was pruned, at the mean of their last reports."""
    seeds, found = len(snapshot.study.spec.seeds), []
    for trials in groups(snapshot):
        left = [trial for trial in trials if trial.state == "pruned" and _drawable(trial)]
        if left and has_ended(snapshot, trials) and all(t.state in ("pruned", "failed") for t in trials):
            mean = statistics.fmean(trial.probe_accuracy or 0.0 for trial in left)
            found.append(_Mark(left[0], _label(left), mean, None, len(left) < seeds))
    return found


def _label(trials: list[TrialRow]) -> str:
    if len(trials) == 1:
        return f"trial {trials[0].number}"
    return f"trials {', '.join(str(trial.number) for trial in trials)}"


def _head_kind(snapshot: Snapshot, trial: TrialRow) -> str:
    given = trial.params.get("head.kind") or snapshot.study.spec.base.get("head", {}).get("kind")
    return str(given or snapshot.study.spec.trial_config(trial.params, trial.seed).head.kind)


def _points(
    spec: StudySpec, marks: list[_Mark], name: str, marker: dict[str, Any], *, hover: bool
) -> go.Scatter:
    text, accuracy = [mark.label for mark in marks], protocols.validation(spec.train_on)
    if hover:
        text = [
            "<br>".join(
                (
                    f"{mark.label}, {_seeds(spec, mark)}",
                    *params_text(in_order(spec, mark.trial.params)).split(),
                    f"test {value(mark.test) or 'not scored'}",
                )
            )
            for mark in marks
        ]
    return go.Scatter(
        x=[mark.trial.projection_dim for mark in marks],
        y=[round(mark.accuracy, 5) for mark in marks],
        mode="markers",
        name=name,
        marker=marker,
        text=text,
        hovertemplate=f"%{{text}}<br>dim %{{x}}, {accuracy} %{{y:.4f}}<extra></extra>",
    )


def _seeds(spec: StudySpec, mark: _Mark) -> str:
    if len(spec.seeds) == 1:
        return f"seed {mark.trial.seed}"
    n = mark.label.count(",") + 1
    return f"mean of {n}" + (f" of {len(spec.seeds)}" if mark.lacks_seeds else "") + " seeds"


def _front_line(points: list[FrontPoint], accuracy: str) -> go.Scatter:
    ordered = sorted(points, key=lambda point: point.projection_dim or 0)
    stds = [round(point.probe_accuracy.std or 0.0, 5) for point in ordered]
    return go.Scatter(
        x=[point.projection_dim for point in ordered],
        y=[round(point.probe_accuracy.mean, 5) for point in ordered],
        mode="lines+markers",
        name="front" + _said_of(ordered),
        line={"shape": "hv", "color": "#222222", "width": 2},
        marker={"symbol": "circle-open", "size": 14, "color": "#222222"},
        error_y={"type": "data", "array": stds, "visible": any(stds)},
        text=[
            ", ".join(map(str, point.numbers)) + (f", n = {point.n_text}" if point.n < point.asked else "")
            for point in ordered
        ],
        hovertemplate=f"front: trials %{{text}}<br>dim %{{x}}, {accuracy} %{{y:.4f}}<extra></extra>",
    )


def _said_of(front: list[FrontPoint]) -> str:
    if all(point.asked == 1 for point in front):
        return ""
    lacking = sum(point.n < point.asked for point in front)
    return " (mean of seeds" + (f"; {lacking} lack seeds" if lacking else "") + ")"

"""The front as a picture: validation accuracy against projection dim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from headsearch.errors import InputError, StorageError, WorldError
from headsearch.report.fronts import FrontPoint, front
from headsearch.report.tables import value
from headsearch.report.trials import in_order, params_text
from headsearch.search.snapshot import Snapshot, TrialRow
from headsearch.spec import StudySpec

SUFFIXES = (".html", ".png", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which people with colour blindness can tell apart."""
FEW_TICKS = 12


def front_figure(snapshot: Snapshot, *, hover: bool = True, pruned: bool = True) -> go.Figure:
    """Draw complete trials as points by head kind, the front as a step line, pruned ones faintly.

    The front is that of the two axes, also where the study has more objectives. `hover` writes each
    trial's parameters beside its point, `pruned` draws pruned trials at their last report.
    """
    spec = snapshot.study.spec
    figure = go.Figure()
    complete = [trial for trial in snapshot.complete if _drawable(trial)]
    ended = [trial for trial in snapshot.trials if trial.state == "pruned" and _drawable(trial)]
    if pruned and ended:
        faint = {"color": "#888888", "size": 6, "opacity": 0.3}
        figure.add_trace(_points(spec, ended, "pruned, at its last report", faint, hover=hover))
    kinds: dict[str, list[TrialRow]] = {}
    for trial in complete:
        kinds.setdefault(_head_kind(snapshot, trial), []).append(trial)
    for index, kind in enumerate(sorted(kinds)):
        marker = {"color": COLOURS[index % len(COLOURS)], "size": 9}
        figure.add_trace(_points(spec, kinds[kind], f"head: {kind}", marker, hover=hover))
    if best := [point for point in front(snapshot, _axes(snapshot)) if point.projection_dim]:
        figure.add_trace(_front_line(best))
    dims = sorted({trial.projection_dim or 1 for trial in complete + (ended if pruned else [])})
    figure.update_layout(
        title=f"{spec.name}: front of {len(complete)} complete trials, protocol {spec.protocol}",
        xaxis={
            "title": "projection dim (log scale)",
            "type": "log",
            **({"tickvals": dims, "ticktext": [str(dim) for dim in dims]} if len(dims) <= FEW_TICKS else {}),
        },
        yaxis={"title": "linear-probe accuracy (validation split)"},
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


def _head_kind(snapshot: Snapshot, trial: TrialRow) -> str:
    given = trial.params.get("head.kind") or snapshot.study.spec.base.get("head", {}).get("kind")
    return str(given or snapshot.study.spec.trial_config(trial.params, trial.seed).head.kind)


def _points(
    spec: StudySpec, trials: list[TrialRow], name: str, marker: dict[str, Any], *, hover: bool
) -> go.Scatter:
    text = [f"trial {trial.number}" for trial in trials]
    if hover:
        text = [
            "<br>".join(
                (
                    f"{label}, seed {trial.seed}",
                    *params_text(in_order(spec, trial.params)).split(),
                    f"test {value(trial.test_accuracy) or 'not scored'}",
                )
            )
            for label, trial in zip(text, trials, strict=True)
        ]
    return go.Scatter(
        x=[trial.projection_dim for trial in trials],
        y=[round(trial.probe_accuracy or 0.0, 5) for trial in trials],
        mode="markers",
        name=name,
        marker=marker,
        text=text,
        hovertemplate="%{text}<br>dim %{x}, validation %{y:.4f}<extra></extra>",
    )


def _front_line(points: list[FrontPoint]) -> go.Scatter:
    ordered = sorted(points, key=lambda point: point.projection_dim or 0)
    stds = [round(point.probe_accuracy.std or 0.0, 5) for point in ordered]
    return go.Scatter(
        x=[point.projection_dim for point in ordered],
        y=[round(point.probe_accuracy.mean, 5) for point in ordered],
        mode="lines+markers",
        name="front" + (" (mean of seeds)" if any(point.n > 1 for point in ordered) else ""),
        line={"shape": "hv", "color": "#222222", "width": 2},
        marker={"symbol": "circle-open", "size": 14, "color": "#222222"},
        error_y={"type": "data", "array": stds, "visible": any(stds)},
        text=[", ".join(map(str, point.numbers)) for point in ordered],
        hovertemplate="front: trials %{text}<br>dim %{x}, validation %{y:.4f}<extra></extra>",
    )

"""Trials as rows: which columns say something, which trials come first, which is the best."""

from __future__ import annotations

import shlex
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from headsearch.report.tables import Table, accuracy, duration, value
from headsearch.search.snapshot import Snapshot, TrialRow
from headsearch.space import Value
from headsearch.spec import StudySpec

STATES = ("running", "orphaned", "paused", "complete", "pruned", "failed")
MOST_ROWS = 20
PROJECTION_DIM = "head.projection_dim"


def varying(spec: StudySpec) -> list[str]:
    """Paths of the parameters that differ between trials, in the space's order."""
    if not spec.points:
        return [path for path, parameter in spec.space.items() if not isinstance(parameter, Value)]
    seen: dict[str, set[Any]] = defaultdict(set)
    for path in dict.fromkeys(path for point in spec.points for path in point):
        seen[path] = {repr(point.get(path)) for point in spec.points}
    return [path for path, values in seen.items() if len(values) > 1]


def shown_paths(spec: StudySpec) -> list[str]:
    """Those of `varying` that tables give a column: the projection dim has one of its own."""
    return [path for path in varying(spec) if path != PROJECTION_DIM]


def in_order(spec: StudySpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` in the space's order, which the database does not keep."""
    order = [*spec.space, *(path for point in spec.points for path in point)]
    return {path: params[path] for path in dict.fromkeys((*order, *params)) if path in params}


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or all of it where two would be the same."""
    last = Counter(path.rsplit(".", 1)[-1] for path in paths)
    return {path: short if last[short := path.rsplit(".", 1)[-1]] == 1 else path for path in paths}


def ordered(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Running first, then paused, complete, failed and pruned; the most accurate of each first."""
    rank = {state: place for place, state in enumerate(("running", "orphaned", "complete", "paused"))}
    return sorted(
        trials, key=lambda t: (rank.get(t.state, len(rank)), t.state, -(t.probe_accuracy or 0.0), t.number)
    )


def trial_table(snapshot: Snapshot, *, most: int | None = MOST_ROWS) -> Table:
    """Progress of each trial and the parameters that vary.

    Accuracy is that of the validation split, ``(seen)`` where its images were trained on.
    """
    spec = snapshot.study.spec
    paths = shown_paths(spec)
    names = short_names(paths)
    chosen = ordered(snapshot.trials)[:most] if most is not None else list(snapshot.trials)
    seeds = ("seed",) if len(spec.seeds) > 1 else ()
    accuracies = "accuracy (seen)" if spec.trains_on_validation else "accuracy"
    columns = ("trial", "state", "epoch", accuracies, "loss", "dim", "time", *seeds, *names.values())
    rows = tuple(
        (
            str(trial.number),
            trial.state if not trial.reason else f"{trial.state}: {trial.reason}",
            f"{trial.epoch}/{spec.budget.epochs}",
            accuracy(trial.probe_accuracy),
            "" if trial.loss is None else f"{trial.loss:.3f}",
            value(trial.projection_dim),
            duration(trial.train_seconds),
            *((str(trial.seed),) if seeds else ()),
            *(value(trial.params.get(path)) for path in paths),
        )
        for trial in chosen
    )
    return Table(columns, rows, more=len(snapshot.trials) - len(rows))


def best(snapshot: Snapshot) -> TrialRow | None:
    """Of a study of one seed, the complete trial of the highest validation accuracy, or else the best report.

    With several seeds the best is a point: `fronts.best_point`. Of equals, the one of the smallest projection
    dim, which is the one on the front.
    """
    measured = [t for t in snapshot.complete if t.probe_accuracy is not None] or [
        t for t in snapshot.trials if t.probe_accuracy is not None and t.state != "failed"
    ]
    return max(
        measured,
        key=lambda t: (t.probe_accuracy or 0.0, -(t.projection_dim or 0), -t.number),
        default=None,
    )


def params_text(params: Mapping[str, Any], paths: Sequence[str] | None = None) -> str:
    """``kind=mlp width=64``: the parameters at `paths`, or all."""
    names = short_names(list(params))
    return " ".join(
        f"{names[path]}={value(params[path])}" for path in params if paths is None or path in paths
    )


def overrides_of(params: Mapping[str, Any]) -> list[str]:
    """``--set`` arguments, as a shell takes them, that give a trial these parameters."""
    return [f"--set {shlex.quote(f'{path}={_toml(given)}')}" for path, given in params.items()]


def _toml(given: Any) -> str:
    if isinstance(given, bool):
        return "true" if given else "false"
    if not isinstance(given, str):
        return repr(given)
    try:
        tomllib.loads(f"value = {given}")
    except tomllib.TOMLDecodeError:
        return given  # what is not TOML is taken as text
    return f'"{given}"'


def trial_json(trial: TrialRow) -> dict[str, Any]:
    """A trial as plain data; `facts` are the ones that its last worker told."""
    facts = {key: fact for key, fact in trial.facts.items() if key not in ("probe_accuracy", "test_accuracy")}
    return {
        **vars(trial),
        "facts": facts,
        "started_at": trial.started_at.isoformat(),
        "finished_at": trial.finished_at.isoformat() if trial.finished_at else None,
    }

"""The front: points that no other point beats in every objective, each the mean of its seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headsearch.report import protocols
from headsearch.report.images import image_captions
from headsearch.report.tables import Table, value
from headsearch.report.trials import STATES, in_order, short_names, shown_paths
from headsearch.search import rungs
from headsearch.search.snapshot import Snapshot, TrialRow
from headsearch.search.studies import Study
from headsearch.space import Params
from headsearch.spec import StudySpec

FEW_IMAGES = 200
"""Validation images below which a front says how coarse its accuracies are."""


@dataclass(frozen=True)
class Measured:
    """Mean of a point's seeds and their sample standard deviation, which one seed does not have."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class FrontPoint:
    """One point of the space with all its complete trials."""

    params: Params
    numbers: tuple[int, ...]
    """Trials."""
    seeds: tuple[int, ...]
    """Of those trials."""
    probe_accuracy: Measured
    """On the validation split: what the search chose by. Of seen images where `data.train_on` says so."""
    test_accuracy: Measured | None
    """On the test split, scored once for each trial."""
    objectives: dict[str, Measured]
    """Every objective, probe_accuracy included, in the study's order."""
    projection_dim: int | None
    head_parameters: int | None
    asked: int = 1
    """Seeds that a point of the study has."""
    infeasible: bool = False
    """Another of its seeds failed by the configuration."""

    @property
    def n(self) -> int:
        """Seeds that are complete."""
        return len(self.numbers)

    @property
    def n_text(self) -> str:
        """``3``, or ``2 of 3`` where seeds are missing."""
        return str(self.n) if self.n == self.asked else f"{self.n} of {self.asked}"


def groups(snapshot: Snapshot) -> list[list[TrialRow]]:
    """The trials of each point, in the order of their first ones."""
    if len(snapshot.study.spec.seeds) == 1:
        return [[trial] for trial in snapshot.trials]
    by_point: dict[str, list[TrialRow]] = {}
    for trial in snapshot.trials:
        by_point.setdefault(json.dumps(trial.params, sort_keys=True), []).append(trial)
    return list(by_point.values())


def has_ended(snapshot: Snapshot, trials: Sequence[TrialRow]) -> bool:
    """Whether nothing is to come of a point of these trials."""
    ended = all(trial.finished_at is not None for trial in trials)
    return ended and (len(trials) >= len(snapshot.study.spec.seeds) or snapshot.study.ended)


def points(snapshot: Snapshot, *, under_way: bool = False) -> list[FrontPoint]:
    """All points that have ended with at least one complete trial, in the order of their first trials.

    With `under_way` also those of which seeds are still to be trained.
    """
    return [
        _point(trials, snapshot.study.spec)
        for trials in groups(snapshot)
        if _complete(trials) and (under_way or has_ended(snapshot, trials))
    ]


def best_point(snapshot: Snapshot) -> FrontPoint | None:
    """The point of the highest mean validation accuracy: of those with all seeds, if there are such.

    Of equals, the one of the smallest projection dim, which is the one on the front.
    """
    return max(
        (point for point in points(snapshot) if not point.infeasible),
        key=lambda p: (p.n == p.asked, p.probe_accuracy.mean, -(p.projection_dim or 0), -p.numbers[0]),
        default=None,
    )


def _complete(trials: Sequence[TrialRow]) -> list[TrialRow]:
    return [trial for trial in trials if trial.state == "complete" and trial.values is not None]


def front(snapshot: Snapshot, objectives: Sequence[str] | None = None) -> list[FrontPoint]:
    """Points that no other dominates in the means of `objectives` (default: the study's).

    Without those of which a seed failed by the configuration: another training of it may fail as well.
    Ordered by their costs, the smallest first.
    """
    chosen = tuple(objectives or snapshot.study.spec.objectives)
    found = [point for point in points(snapshot) if not point.infeasible]
    standings = [
        rungs.Standing(index, point.probe_accuracy.mean, _costs(point, chosen))
        for index, point in enumerate(found)
    ]
    best = sorted(rungs.front(standings), key=lambda one: (one.costs, -one.accuracy, one.number))
    return [found[one.number] for one in best]


def _costs(point: FrontPoint, objectives: Sequence[str]) -> tuple[float, ...]:
    return tuple(point.objectives[name].mean for name in objectives if name != "probe_accuracy")


def _point(runs: list[TrialRow], spec: StudySpec) -> FrontPoint:
    trials = _complete(runs)
    first = trials[0]
    columns = zip(*(trial.values or () for trial in trials), strict=True)
    objectives: dict[str, Measured] = {
        name: _measured(column) for name, column in zip(spec.objectives, columns, strict=True)
    }
    tested = [trial.test_accuracy for trial in trials if trial.test_accuracy is not None]
    return FrontPoint(
        params=in_order(spec, first.params),
        numbers=tuple(trial.number for trial in trials),
        seeds=tuple(trial.seed for trial in trials),
        probe_accuracy=objectives["probe_accuracy"],
        test_accuracy=_measured(tested) if tested else None,
        objectives=objectives,
        projection_dim=first.projection_dim,
        head_parameters=first.head_parameters,
        asked=len(spec.seeds),
        infeasible=any(trial.infeasible for trial in runs),
    )


def _measured(values: Sequence[float]) -> Measured:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Measured(statistics.fmean(values), std)


def front_table(snapshot: Snapshot, shown: Sequence[FrontPoint] | None = None) -> Table:
    """The front with validation and test accuracy, seeds, and the parameters that vary."""
    spec = snapshot.study.spec
    shown = front(snapshot) if shown is None else shown
    paths = shown_paths(spec)
    names = short_names(paths)
    others = [name for name in spec.objectives if name not in ("probe_accuracy", "projection_dim")]
    rows = tuple(
        (
            value(point.projection_dim),
            spread(point.probe_accuracy),
            spread(point.test_accuracy),
            point.n_text,
            *(value(point.objectives[name].mean) for name in others),
            ", ".join(map(str, point.numbers)),
            *(value(point.params.get(path)) for path in paths),
        )
        for point in shown
    )
    measured = (protocols.validation(spec.train_on), "test")
    columns = ("projection_dim", *measured, "n", *others, "trials", *names.values())
    return Table(columns, rows)


def spread(measured: Measured | None) -> str:
    """``0.9123 ± 0.0041``; the mean alone for one seed."""
    if measured is None:
        return ""
    return f"{measured.mean:.4f}" + ("" if measured.std is None else f" ± {measured.std:.4f}")


def captions(snapshot: Snapshot) -> list[str]:
    """What must be said beside every front."""
    spec, counts = snapshot.study.spec, snapshot.counts
    shown = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    lines = [
        f"study {spec.name} ({snapshot.study.state}), protocol {spec.protocol}, spec {spec.hash[:12]}",
        *protocols.said(spec),
        f"n = complete seeds of {len(spec.seeds)}"
        + ("; ± is their standard deviation" * (len(spec.seeds) > 1)),
        f"{len(snapshot.trials)} of {spec.trials} trials: {shown or 'none begun'}; {_epochs(snapshot)}",
    ]
    lines += image_captions(snapshot)
    sizes = next((t.facts for t in snapshot.complete if "validation_images" in t.facts), None)
    if sizes:
        held_out = sizes["validation_images"]
        fair = spec.protocol != "schliebitz2024" and not spec.trains_on_validation
        if held_out < FEW_IMAGES and fair:
            lines.append(
                f"one validation image is {1 / held_out:.1%}: the best of many is optimistic by more"
            )
    if len(spec.seeds) > 1:
        lines += _said_of_seeds(snapshot)
    return lines


def _said_of_seeds(snapshot: Snapshot) -> list[str]:
    """What must be said of points that lack seeds."""
    ended, lines = points(snapshot), []
    lacking = [point for point in front(snapshot) if point.n < point.asked]
    if lacking:
        shown = "; ".join(f"n = {point.n_text} at dim {value(point.projection_dim)}" for point in lacking)
        lines.append(f"some points lack seeds, and rest on those that are left: {shown}")
    infeasible = sum(point.infeasible for point in ended)
    if infeasible:
        lines.append(
            f"{infeasible} points are left out: a seed of each failed by its configuration, as others would"
        )
    begun = sum(bool(_complete(trials)) for trials in groups(snapshot)) - len(ended)
    if begun:
        lines.append(f"{begun} points are not ranked yet: seeds of them are still to be trained")
    return lines


def _epochs(snapshot: Snapshot) -> str:
    share = snapshot.epochs_trained / snapshot.epochs_without_pruning
    return f"{snapshot.epochs_trained} of {snapshot.epochs_without_pruning} epochs trained ({share:.0%})"


def front_json(snapshot: Snapshot) -> dict[str, Any]:
    """The front and what it rests on, as plain data."""
    spec = snapshot.study.spec
    return {
        **identity(snapshot.study),
        "objectives": [
            {"name": name, "direction": direction}
            for name, direction in zip(spec.objectives, spec.directions, strict=True)
        ],
        "splits": protocols.splits(spec.protocol, spec.train_on),
        "images": [vars(one) for one in snapshot.images],
        "on_other_images": [one.number for one in snapshot.strangers],
        "seeds": list(spec.seeds),
        "budget": spec.budget.model_dump(mode="json"),
        "counts": {state: snapshot.counts[state] for state in STATES},
        "epochs_trained": snapshot.epochs_trained,
        "epochs_without_pruning": snapshot.epochs_without_pruning,
        "promoted": snapshot.promoted,
        "front": [point_json(point) for point in front(snapshot)],
    }


def identity(study: Study) -> dict[str, Any]:
    """Which study, asked how."""
    return {
        "study": study.name,
        "question": study.spec.question,
        "state": study.state,
        "protocol": study.spec.protocol,
        "trained_on": study.spec.train_on,
        "spec_hash": study.spec.hash,
    }


def point_json(point: FrontPoint) -> dict[str, Any]:
    """A point as plain data."""
    return {
        "params": point.params,
        "projection_dim": point.projection_dim,
        "head_parameters": point.head_parameters,
        "trials": list(point.numbers),
        "seeds": list(point.seeds),
        "n": point.n,
        "seeds_asked": point.asked,
        "validation_accuracy": vars(point.probe_accuracy),
        "test_accuracy": vars(point.test_accuracy) if point.test_accuracy else None,
        "objectives": {name: vars(measured) for name, measured in point.objectives.items()},
    }


def front_csv(snapshot: Snapshot) -> str:
    """The front as CSV: one row a point, each with the study, its protocol and its seeds."""
    spec = snapshot.study.spec
    shown = front(snapshot)
    paths = list(dict.fromkeys(path for point in shown for path in point.params))
    others = [name for name in spec.objectives if name != "probe_accuracy"]
    measured = ["validation_accuracy", "test_accuracy", *others]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["study", "protocol", "trained_on", "spec_hash", "n", "seeds_asked", "seeds", "trials"]
        + [column for name in measured for column in (f"{name}_mean", f"{name}_std")]
        + ["head_parameters"] * ("head_parameters" not in others)
        + paths
    )
    for point in shown:
        values = [point.probe_accuracy, point.test_accuracy, *(point.objectives[name] for name in others)]
        writer.writerow(
            [spec.name, spec.protocol, spec.train_on, spec.hash, point.n, point.asked]
            + [" ".join(map(str, point.seeds)), " ".join(map(str, point.numbers))]
            + [cell for one in values for cell in ((one.mean, one.std) if one else (None, None))]
            + [point.head_parameters] * ("head_parameters" not in others)
            + [_cell(point.params.get(path)) for path in paths]
        )
    return out.getvalue()


def _cell(given: Any) -> Any:
    return str(given).lower() if isinstance(given, bool) else given

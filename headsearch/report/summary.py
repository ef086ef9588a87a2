"""How a study is introduced and how it ends, in lines and as plain data."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from headsearch import space as spaces
from headsearch.report import protocols
from headsearch.report.fronts import (
    FrontPoint,
    best_point,
    captions,
    front,
    front_json,
    front_table,
    identity,
    point_json,
    points,
    spread,
)
from headsearch.report.images import image_lines
from headsearch.report.tables import Table, accuracy, duration
from headsearch.report.trials import STATES, in_order, overrides_of, params_text, trial_json, varying
from headsearch.search.imagesets import KnownImages
from headsearch.search.snapshot import Progress, Snapshot, TrialRow
from headsearch.search.studies import Study
from headsearch.spec import StudySpec

MOST_NUMBERS = 12


def header(study: Study, database: str, images: Sequence[KnownImages] = ()) -> list[tuple[str, str]]:
    """(label, text) pairs that say what is searched, how, on which images, and where it is kept.

    `database` is an address without password.
    """
    spec = study.spec
    arrows = {"maximize": "↑", "minimize": "↓"}
    pairs = zip(spec.objectives, spec.directions, strict=True)
    goals = ", ".join(f"{name} {arrows[direction]}" for name, direction in pairs)
    lines = [("study", f"{spec.name} ({study.state}), spec {spec.hash[:12]}")]
    if spec.question:
        lines.append(("question", spec.question))
    return [
        *lines,
        ("objectives", f"{goals}; protocol {spec.protocol}"),
        *(("images", line) for line in image_lines(images)),
        *([("trained on", "training and validation images together")] if spec.trains_on_validation else []),
        ("space", space_text(spec)),
        ("search", _search_text(spec)),
        ("pruning", _pruning_text(spec)),
        (
            "budget",
            f"{spec.trials} trials of {spec.budget.epochs} epochs, seeds {', '.join(map(str, spec.seeds))}",
        ),
        ("database", database),
    ]


def nothing_to_train(study: Study) -> str:
    """Why no worker is started on a study that has ended."""
    if study.state == "cancelled":
        return f"study {study.name} is cancelled; to go on: headsearch study resume {study.name}"
    return f"study {study.name} is complete: nothing to train"


def space_text(spec: StudySpec) -> str:
    """How many parameters vary and how many points there are."""
    if spec.points:
        return f"{len(spec.points)} listed points"
    size = spaces.size(spec.space)
    count = f"{size:,} points" if size is not None else "more points than can be listed"
    return f"{len(varying(spec))} parameters, {count}"


def _search_text(spec: StudySpec) -> str:
    if spec.mode != "search":
        return f"every point ({spec.mode})"
    sampler = spec.sampler
    return f"{sampler.name}, {sampler.startup_trials} random trials first, seed {sampler.seed}"


def _pruning_text(spec: StudySpec) -> str:
    if not spec.rungs:
        return "none"
    rungs = ", ".join(map(str, spec.rungs))
    return f"{spec.pruning.rule} the best 1/{spec.pruning.eta} at epochs {rungs}"


def failures(snapshot: Snapshot) -> list[str]:
    """A line for each reason, with the trials and the first one's message."""
    groups: dict[str, list[TrialRow]] = defaultdict(list)
    for trial in snapshot.trials:
        if trial.state == "failed":
            groups[trial.reason or "error"].append(trial)
    return [f"{reason}: {_numbers(trials)}: {trials[0].message}" for reason, trials in groups.items()]


def _numbers(trials: Sequence[TrialRow]) -> str:
    shown = ", ".join(str(trial.number) for trial in trials[:MOST_NUMBERS])
    more = f" and {len(trials) - MOST_NUMBERS} more" if len(trials) > MOST_NUMBERS else ""
    return f"trial{'s' if len(trials) > 1 else ''} {shown}{more}"


def totals(snapshot: Snapshot, seconds: float | None = None) -> str:
    """One line: trials by state, time, share of epochs."""
    counts = ", ".join(f"{snapshot.counts[state]} {state}" for state in STATES if snapshot.counts[state])
    took = f" in {duration(seconds)}" if seconds is not None else ""
    share = snapshot.epochs_trained / snapshot.epochs_without_pruning
    promoted = f", {snapshot.promoted} promoted" if snapshot.study.spec.rungs else ""
    return (
        f"{len(snapshot.trials)} trials{': ' if counts else ''}{counts}{promoted}{took}; "
        f"{snapshot.epochs_trained} of {snapshot.epochs_without_pruning} epochs trained ({share:.0%})"
    )


def reproduction(spec: StudySpec, trial: TrialRow, file: str, overrides: Sequence[str] = ()) -> str:
    """The command that trains this trial alone; `overrides` are those that the study was made with.

    With the number of threads, on which a CPU's results depend.
    """
    words = [f"headsearch train {shlex.quote(file)}"]
    words += [f"--set {shlex.quote(given)}" for given in overrides]
    words += [*overrides_of(in_order(spec, trial.params)), f"--seed {trial.seed}"]
    if (trial.device or "").startswith("cpu") and "threads" in trial.facts:
        words.append(f"--device cpu --threads {trial.facts['threads']}")
    return " ".join(words)


def ending(
    snapshot: Snapshot, file: str, overrides: Sequence[str] = (), *, seconds: float | None = None
) -> list[str]:
    """The last lines of a run: front, totals, failures, and what to do next."""
    lines = [*front_lines(snapshot), "", totals(snapshot, seconds)]
    if failed := failures(snapshot):
        lines += ["failed:", *(f"  {line}" for line in failed)]
    top = best_point(snapshot)
    if top is not None:
        lines += [
            f"best: {best_text(top, snapshot.study.spec)}, {params_text(top.params)}",
            f"train it again: {reproduction(snapshot.study.spec, _first(snapshot, top), file, overrides)}",
        ]
    if snapshot.study.spec.mode != "search":
        lines.append(f"all points ranked: headsearch study compare {snapshot.study.name}")
    return [*lines, f"browse: headsearch dashboard {snapshot.study.name}"]


def best_text(point: FrontPoint, spec: StudySpec) -> str:
    """Which trials a point is, and its accuracy: the mean of its seeds."""
    measured = f"accuracy {spread(point.probe_accuracy)} ({protocols.validation(spec.train_on)}"
    if point.asked == 1:
        return f"trial {point.numbers[0]}, {measured})"
    return f"trials {', '.join(map(str, point.numbers))}, {measured}, n = {point.n_text} seeds)"


def _first(snapshot: Snapshot, point: FrontPoint) -> TrialRow:
    return next(trial for trial in snapshot.trials if trial.number == point.numbers[0])


def front_lines(snapshot: Snapshot) -> list[str]:
    """The front as a table with what must be said beside it."""
    table = front_table(snapshot)
    body = table.lines() if table.rows else ["no trial is complete yet"]
    return [*captions(snapshot), "", *body]


def confirmed_lines(snapshot: Snapshot) -> list[str]:
    """All points of a confirming study, and which of them are on its own front, where it may have one."""
    measured = sorted(points(snapshot), key=lambda point: point.projection_dim or 0)
    table = front_table(snapshot, measured)
    if snapshot.study.spec.trains_on_validation:  # which makes no front
        return [*captions(snapshot), "", *table.lines()]
    held = [str(point.projection_dim) for point in front(snapshot)]
    said = f"still on the front: {len(held)} of {len(measured)} points"
    return [
        *captions(snapshot),
        "",
        *table.lines(),
        "",
        f"{said}, projection dims {', '.join(held) or 'none'}",
    ]


def ending_json(
    snapshot: Snapshot, file: str, overrides: Sequence[str] = (), *, seconds: float | None = None
) -> dict[str, Any]:
    """The same as plain data."""
    top = best_point(snapshot)
    return {
        **front_json(snapshot),
        "seconds": seconds,
        "failures": failures(snapshot),
        "best": _best_json(snapshot, top) if top else None,
        "train_best_again": reproduction(snapshot.study.spec, _first(snapshot, top), file, overrides)
        if top
        else None,
    }


def _best_json(snapshot: Snapshot, point: FrontPoint) -> dict[str, Any]:
    """The trial, or with several seeds the point and its trials."""
    if point.asked == 1:
        return trial_json(_first(snapshot, point))
    runs = [trial_json(trial) for trial in snapshot.trials if trial.number in point.numbers]
    return {**point_json(point), "trials": runs}


def study_json(snapshot: Snapshot) -> dict[str, Any]:
    """Spec, counts, trials and workers of a study as plain data."""
    study = snapshot.study
    return {
        **identity(study),
        "created_at": study.created_at.isoformat(),
        "completed_at": study.completed_at.isoformat() if study.completed_at else None,
        "spec": study.spec.to_json(),
        "images": [vars(one) for one in snapshot.images],
        "counts": {state: snapshot.counts[state] for state in STATES},
        "epochs_trained": snapshot.epochs_trained,
        "epochs_without_pruning": snapshot.epochs_without_pruning,
        "promoted": snapshot.promoted,
        "trials": [trial_json(trial) for trial in snapshot.trials],
        "workers": [vars(worker) for worker in snapshot.workers],
    }


def listing_json(study: Study, progress: Progress) -> dict[str, Any]:
    """A study in the list of studies, as plain data."""
    return {
        **identity(study),
        "created_at": study.created_at.isoformat(),
        "completed_at": study.completed_at.isoformat() if study.completed_at else None,
        "trials": study.spec.trials,
        "counts": {state: progress.trials[state] for state in STATES if state != "orphaned"},
        "epochs_trained": progress.epochs,
        "best_accuracy": progress.best_accuracy,
    }


def listing(found: Sequence[tuple[Study, Progress]]) -> Table:
    """Studies as a table; an accuracy is ``(seen)`` where validation images were trained on."""
    rows = tuple(
        (
            study.name,
            study.state,
            f"{sum(done.trials.values())}/{study.spec.trials}",
            ", ".join(f"{done.trials[state]} {state}" for state in STATES if done.trials[state]),
            accuracy(done.best_accuracy)
            + (" (seen)" if study.spec.trains_on_validation and done.best_accuracy is not None else ""),
            f"{study.created_at:%Y-%m-%d %H:%M}",
        )
        for study, done in found
    )
    return Table(("study", "state", "trials", "by state", "best validation", "created"), rows)

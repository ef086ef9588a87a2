"""Points of one or several studies in one ranking, where that means something.

Accuracies of different protocols, or of different images, are not comparable (Schliebitz et al. 2024 train
their probe on test images, Ouyang et al. 2025 along with the encoder): such a ranking is refused. So is one
across numbers of epochs, settings of the probe, versions of the software or images trained on
(`data.train_on`), unless it is asked for by that name, and then it says so.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from headsearch.config import Protocol, flatten
from headsearch.errors import InputError
from headsearch.report import protocols
from headsearch.report.fronts import FrontPoint, points, spread
from headsearch.report.images import image_captions
from headsearch.report.tables import Table, value
from headsearch.report.trials import shown_paths
from headsearch.search.snapshot import Snapshot, TrialRow

RANKING_FREE = (
    "data.normalization",
    "data.image_size",
    "data.download",
    "data.max_unreadable_fraction",
    "data.train_on",
)
"""Fields of the data that leave the question the same, of which `space` may vary the first two; or that
`ACROSS` has."""

OFFLINE = (
    "offline_validation_accuracy",
    "offline_test_accuracy",
    "knn_validation_accuracy",
    "knn_test_accuracy",
)
"""Of protocol `ouyang2025`'s second probe, trained on the frozen encoder, and of kNN among all training
images (`probe.knn_train`)."""


ACROSS: Final = ("epochs", "probe", "software", "train_on")
"""What studies may differ in where a ranking is asked for across it."""
SOFTWARE: Final = ("torch", "python", "cuda", "cudnn")
"""Versions that a trial records; threads and GPUs may be others."""
PROBES: Final[Mapping[Protocol, frozenset[str]]] = {
    "holdout": frozenset({"penalties", "iterations"}),
    "ouyang2025": frozenset(
        {
            "online_learning_rate",
            "offline",
            "offline_learning_rate",
            "offline_batch_size",
            "offline_epochs",
        }
    ),
    "schliebitz2024": frozenset(),
}
"""Fields of `probe` that only one protocol reads; all protocols read the others."""


@dataclass(frozen=True)
class Compared:
    """One point of one study."""

    study: str
    point: FrontPoint
    measures: dict[str, float]
    """Means over its seeds: of the last report, and `train_seconds`."""


def compare(snapshots: Sequence[Snapshot], across: Collection[str] = ()) -> list[Compared]:
    """All points with a complete trial, the most accurate on the validation split first.

    `across` names what the studies may differ in, of `ACROSS`.

    Raises:
        InputError: The studies have different protocols, use different images, or differ in what is not
            among `across`.
    """
    check_comparable(snapshots, across)
    found = [
        Compared(
            snapshot.study.name,
            point,
            _measures([trial for trial in snapshot.complete if trial.number in point.numbers]),
        )
        for snapshot in snapshots
        for point in points(snapshot, under_way=True)
    ]
    return sorted(found, key=lambda one: (-one.point.probe_accuracy.mean, one.study, one.point.numbers))


def check_comparable(snapshots: Sequence[Snapshot], across: Collection[str] = ()) -> None:
    """Raise InputError unless the studies measure the same thing the same way, except `across`."""
    first = snapshots[0].study
    for other in (snapshot.study for snapshot in snapshots[1:]):
        if other.spec.protocol != first.spec.protocol:
            raise InputError(
                f"studies {first.name} (protocol {first.spec.protocol}) and {other.name} (protocol "
                f"{other.spec.protocol}): different protocols measure different things and are not ranked "
                "together; compare the studies of one protocol at a time"
            )
        ours, theirs = _data(snapshots[0]), _data_of(other.spec.base)
        for path in dict.fromkeys((*ours, *theirs)):
            if ours.get(path) != theirs.get(path):
                raise InputError(
                    f"studies {first.name} and {other.name}: {path} is {value(ours.get(path)) or 'not set'} "
                    f"in one, {value(theirs.get(path)) or 'not set'} in the other; accuracies on different "
                    "images are not ranked together"
                )
    seen: dict[tuple[Any, ...], tuple[str, str]] = {}
    for snapshot in snapshots:
        for size, images in _fingerprints(snapshot):
            name, known = seen.setdefault(size, (snapshot.study.name, images))
            if known != images and name != snapshot.study.name:
                raise InputError(
                    f"studies {name} and {snapshot.study.name}: their images differ (fingerprint "
                    f"{known[:12]} in one, {images[:12]} in the other); accuracies on different images are "
                    "not ranked together"
                )
    for name, said in differences(snapshots).items():
        if name not in across:
            raise InputError(
                f"{said}; such a ranking has to be asked for: headsearch study compare --across {name}"
            )


def differences(snapshots: Sequence[Snapshot]) -> dict[str, str]:
    """What the studies differ in, of `ACROSS`, each with a line that names the studies and their values."""
    found = {}
    for name, of in zip(ACROSS, (_epochs, _probe, _software, _train_on), strict=True):
        each = {snapshot.study.name: of(snapshot) for snapshot in snapshots}
        paths = dict.fromkeys(path for facts in each.values() for path in facts)
        lines = []
        for path in paths:
            given = {study: facts[path] for study, facts in each.items() if facts.get(path)}
            if len(set(given.values())) > 1:
                shown = ", ".join(f"{' or '.join(texts)} in {study}" for study, texts in given.items())
                lines.append(f"{path} is {shown}")
        if lines:
            found[name] = "; ".join(lines)
    return found


def _epochs(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    return {"budget.epochs": (str(snapshot.study.spec.budget.epochs),)}


def _probe(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    """Settings of the probe that the protocol reads, as the complete trials have them."""
    spec = snapshot.study.spec
    others = frozenset().union(*PROBES.values()) - PROBES[spec.protocol]
    points = {tuple(sorted(trial.params.items())): trial for trial in snapshot.complete}
    dumps = [
        spec.trial_config(trial.params, trial.seed).probe.model_dump(mode="json", exclude=set(others))
        for trial in points.values()
    ]
    return {
        f"probe.{name}": tuple(dict.fromkeys(value(dump[name]) for dump in dumps))
        for name in (dumps[0] if dumps else ())
    }


def _software(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    complete = snapshot.complete
    versions = {
        name: tuple(sorted({str(trial.facts[name]) for trial in complete if name in trial.facts}))
        for name in SOFTWARE
    }
    return {"headsearch": (snapshot.study.version,), **versions}


def _train_on(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    return {"data.train_on": (snapshot.study.spec.train_on,)}


def _fingerprints(snapshot: Snapshot) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield what each complete trial's images were, and at which size: decoded at another they differ."""
    size = flatten(snapshot.study.spec.base).get("data.image_size")
    for trial in snapshot.complete:
        if "data_fingerprint" in trial.facts:
            yield (trial.params.get("data.image_size", size),), str(trial.facts["data_fingerprint"])


def _data(snapshot: Snapshot) -> dict[str, Any]:
    return _data_of(snapshot.study.spec.base)


def _data_of(base: dict[str, Any]) -> dict[str, Any]:
    return {
        path: given
        for path, given in flatten(base).items()
        if path.startswith("data.") and path not in RANKING_FREE
    }


def _measures(trials: Sequence[TrialRow]) -> dict[str, float]:
    rows = [
        {
            **trial.facts.get("measures", {}),
            **{name: trial.facts[name] for name in OFFLINE if name in trial.facts},
            "feature_rank": trial.feature_rank,
            "projection_rank": trial.projection_rank,
            "train_seconds": trial.train_seconds,
        }
        for trial in trials
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: statistics.fmean(column) for name, column in columns.items() if column}


def comparison_table(snapshots: Sequence[Snapshot], found: Sequence[Compared]) -> Table:
    """One row a point: what it is, accuracies as mean ± standard deviation over n seeds, and measures."""
    paths = _paths(snapshots)
    several = ("study",) if len(snapshots) > 1 else ()
    trained = {snapshot.study.name: snapshot.study.spec.train_on for snapshot in snapshots}
    mixed = ("trained on",) if len(set(trained.values())) > 1 else ()
    offline = [name for name in OFFLINE if any(name in one.measures for one in found)]
    rows = tuple(
        (
            *((one.study,) if several else ()),
            *(_text(one.point.params.get(path)) for path in paths),
            value(one.point.projection_dim),
            value(one.point.head_parameters),
            *((trained[one.study],) if mixed else ()),
            spread(one.point.probe_accuracy),
            spread(one.point.test_accuracy),
            one.point.n_text,
            _number(one.measures, "knn_accuracy", ".4f"),
            _number(one.measures, "feature_rank", ".1f"),
            _number(one.measures, "projection_rank", ".1f"),
            _number(one.measures, "train_seconds", ".0f"),
            *(_number(one.measures, name, ".4f") for name in offline),
        )
        for one in found
    )
    names = [path.rsplit(".", 1)[-1] if path != "head.kind" else "head" for path in paths]
    columns = (
        *several,
        *names,
        "dim",
        "parameters",
        *mixed,
        "validation" if mixed else protocols.validation(snapshots[0].study.spec.train_on),
        "test",
        "n",
        "kNN",
        "rank h",
        "rank z",
        "s",
    )
    return Table((*columns, *(name.replace("_accuracy", "").replace("_", " ") for name in offline)), rows)


def comparison_captions(snapshots: Sequence[Snapshot]) -> list[str]:
    """What must be said beside a ranking, what the studies differ in first."""
    lines = [f"across {name}, as asked: {said}" for name, said in differences(snapshots).items()]
    for snapshot in snapshots:
        spec, counts = snapshot.study.spec, snapshot.counts
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        lines.append(
            f"study {spec.name} ({snapshot.study.state}), protocol {spec.protocol}, spec {spec.hash[:12]}: "
            f"{spec.budget.epochs} epochs, seeds {', '.join(map(str, spec.seeds))}; {states or 'no trial'}"
        )
    lines += dict.fromkeys(line for snapshot in snapshots for line in image_captions(snapshot))
    kinds = {snapshot.study.spec.train_on: snapshot for snapshot in snapshots}
    unlike = ", which is too high where validation images were trained on" * (len(kinds) > 1)
    legend = (
        f"ordered by validation accuracy{unlike}; ± is the standard deviation over n seeds; kNN accuracy and "
        "effective ranks are the last report's, on validation images; s: seconds of training"
    )
    for snapshot in kinds.values():
        about = f"study {snapshot.study.name}: " if len(kinds) > 1 else ""
        lines += [f"{about}{line}" for line in protocols.said(snapshot.study.spec)]
    return [*lines, legend]


def comparison_json(snapshots: Sequence[Snapshot], found: Sequence[Compared]) -> dict[str, Any]:
    """The ranking as plain data."""
    trained = {snapshot.study.name: snapshot.study.spec.train_on for snapshot in snapshots}
    return {
        "protocol": snapshots[0].study.spec.protocol,
        "studies": [
            {
                "study": s.study.name,
                "trained_on": s.study.spec.train_on,
                "splits": protocols.splits(s.study.spec.protocol, s.study.spec.train_on),
                "spec_hash": s.study.spec.hash,
                "seeds": list(s.study.spec.seeds),
            }
            for s in snapshots
        ],
        "across": differences(snapshots),
        "points": [
            {
                "study": one.study,
                "trained_on": trained[one.study],
                "params": one.point.params,
                "projection_dim": one.point.projection_dim,
                "head_parameters": one.point.head_parameters,
                "trials": list(one.point.numbers),
                "seeds": list(one.point.seeds),
                "n": one.point.n,
                "seeds_asked": one.point.asked,
                "validation_accuracy": vars(one.point.probe_accuracy),
                "test_accuracy": vars(one.point.test_accuracy) if one.point.test_accuracy else None,
                "measures": one.measures,
            }
            for one in found
        ],
    }


def comparison_csv(snapshots: Sequence[Snapshot], found: Sequence[Compared]) -> str:
    """The ranking as CSV, each row with its study, protocol, images trained on and seeds."""
    trained = {snapshot.study.name: snapshot.study.spec.train_on for snapshot in snapshots}
    paths = list(dict.fromkeys(path for one in found for path in one.point.params))
    names = list(dict.fromkeys(name for one in found for name in one.measures))
    protocol = snapshots[0].study.spec.protocol
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    accuracies = [f"{split}_accuracy_{part}" for split in ("validation", "test") for part in ("mean", "std")]
    writer.writerow(
        [
            "study",
            "protocol",
            "trained_on",
            "n",
            "seeds_asked",
            "seeds",
            *paths,
            "projection_dim",
            "head_parameters",
            *accuracies,
            *names,
        ]
    )
    for one in found:
        point, test = one.point, one.point.test_accuracy
        writer.writerow(
            [one.study, protocol, trained[one.study], point.n, point.asked, " ".join(map(str, point.seeds))]
            + [_text(point.params.get(path)) for path in paths]
            + [point.projection_dim, point.head_parameters]
            + [point.probe_accuracy.mean, point.probe_accuracy.std]
            + ([test.mean, test.std] if test else [None, None])
            + [one.measures.get(name) for name in names]
        )
    return out.getvalue()


def _paths(snapshots: Sequence[Snapshot]) -> list[str]:
    return list(dict.fromkeys(path for s in snapshots for path in shown_paths(s.study.spec)))


def _text(given: Any) -> str:
    # names of systems are longer than other cells may be
    return given if isinstance(given, str) else value(given)


def _number(measures: dict[str, float], name: str, form: str) -> str:
    return format(measures[name], form) if name in measures else ""

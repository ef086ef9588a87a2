"""What happened between two snapshots of a study, a line an event, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Iterator

from headsearch.report import protocols
from headsearch.report.tables import duration
from headsearch.report.trials import STATES, in_order, params_text
from headsearch.search.snapshot import Snapshot, TrialRow
from headsearch.spec import StudySpec


def events(before: Snapshot, after: Snapshot) -> list[str]:
    """Lines for what changed, in the order of trial numbers.

    Several reports of one trial between the two become the last one's line.
    """
    known = {trial.number: trial for trial in before.trials}
    return [line for trial in after.trials for line in _of_trial(known.get(trial.number), trial, after)]


def _of_trial(old: TrialRow | None, new: TrialRow, snapshot: Snapshot) -> Iterator[str]:
    spec = snapshot.study.spec
    label = f"trial {new.number}"
    if old is None:
        seed = f" seed={new.seed}" if len(spec.seeds) > 1 else ""
        yield f"{label} began: {params_text(in_order(spec, new.params))}{seed}"
    else:
        if new.losses > old.losses:
            yield f"{label} lost its worker"
        if new.attempt > old.attempt and new.state != "failed":
            passed = [rung for rung in spec.rungs if old.epoch <= rung <= new.epoch]
            # A trial may reach its rung and be promoted between two snapshots.
            promoted = old.state == "paused" or (passed and new.losses == old.losses)
            since = passed[-1] if passed and promoted else old.epoch
            yield f"{label} {'promoted: goes on' if promoted else 'taken up again'} after epoch {since}"
    if new.epoch > (old.epoch if old else 0) and new.state in ("running", "orphaned", "paused"):
        yield f"{label} epoch {new.epoch}/{spec.budget.epochs}: {_report(new, spec)}"
    if old is not None and old.state == new.state:
        return
    if new.state == "paused":
        yield f"{label} paused at epoch {new.epoch}"
    elif new.state == "orphaned":
        why = "its lease ran out" if new.worker_id else "given back by its worker"
        yield f"{label} orphaned: {why}; a free worker takes it over"
    elif new.state == "complete":
        test = "" if new.test_accuracy is None else f", test {new.test_accuracy:.4f}"
        yield (
            f"{label} complete: accuracy {new.probe_accuracy or 0.0:.4f} "
            f"({protocols.validation(spec.train_on)}){test}, "
            f"projection dim {new.projection_dim}, {duration(new.train_seconds)}"
        )
    elif new.state == "pruned":
        yield f"{label} pruned after epoch {new.epoch}/{spec.budget.epochs}"
    elif new.state == "failed":
        yield f"{label} failed ({new.reason}): {new.message}"


def _report(trial: TrialRow, spec: StudySpec) -> str:
    facts = [f"accuracy {trial.probe_accuracy or 0.0:.4f}" + " (seen)" * spec.trains_on_validation]
    if trial.loss is not None:
        facts.append(f"loss {trial.loss:.3f}")
    if trial.views_per_second is not None:
        facts.append(f"{trial.views_per_second:,.0f} views/s")
    if trial.train_seconds is not None:
        facts.append(duration(trial.train_seconds))
    return ", ".join(facts)


def expected_epochs(snapshot: Snapshot) -> float:
    """Epochs that the whole study is likely to train.

    At each rung two lists of the best 1/eta go on (`search.rungs`), which overlap: about 1.5/eta.
    """
    spec = snapshot.study.spec
    if not spec.rungs:
        return float(snapshot.epochs_without_pruning)
    share, last, epochs = 1.0, 0, 0.0
    for rung in (*spec.rungs, spec.budget.epochs):
        epochs += share * (rung - last)
        share, last = share * min(1.0, 1.5 / spec.pruning.eta), rung
    return spec.trials * epochs


def seconds_left(first: Snapshot, now: Snapshot) -> float | None:
    """Likely seconds to the end at the speed since `first`; None before the first epoch."""
    trained = now.epochs_trained - first.epochs_trained
    elapsed = (now.now - first.now).total_seconds()
    if trained <= 0 or elapsed <= 0:
        return None
    return max(0.0, expected_epochs(now) - now.epochs_trained) * elapsed / trained


def counts_line(snapshot: Snapshot) -> str:
    """``12 of 40 trials begun: 2 running, 10 complete; 96 of 480 epochs``."""
    counts = ", ".join(f"{snapshot.counts[state]} {state}" for state in STATES if snapshot.counts[state])
    return (
        f"{len(snapshot.trials)} of {snapshot.study.spec.trials} trials begun{': ' if counts else ''}"
        f"{counts}; {snapshot.epochs_trained} of at most {snapshot.epochs_without_pruning} epochs trained"
    )

"""Snapshots of studies that no database holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from headsearch.search.snapshot import Snapshot, TrialRow, WorkerRow
from headsearch.search.studies import Study
from headsearch.spec import StudySpec

BEGAN = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SPACE: dict[str, Any] = {
    "head.kind": ["mlp", "linear"],
    "head.width": {"choices": [32, 64], "when": {"head.kind": "mlp"}},
    "head.projection_dim": [2, 4, 8, 16, 32, 64],
}


def spec(**changes: Any) -> StudySpec:
    tree: dict[str, Any] = {
        "name": "made-up",
        "question": "How small?",
        "budget": {"trials": 12, "epochs": 12, "rungs": [1, 4]},
        "space": SPACE,
    }
    return StudySpec.model_validate(tree | changes)


def trial(
    number: int, state: str = "complete", dim: int | None = 8, acc: float | None = 0.5, **facts: Any
) -> TrialRow:
    ended = state in ("complete", "pruned", "failed")
    values: dict[str, Any] = {
        "number": number,
        "state": state,
        "params": {"head.kind": "linear", "head.projection_dim": dim},
        "seed": 0,
        "epoch": 12 if state == "complete" else 1,
        "attempt": 1,
        "losses": 0,
        "worker_id": "host:1:abc",
        "device": "cpu of 2 cores, 1 threads",
        "projection_dim": dim,
        "head_parameters": None if dim is None else 129 * dim,
        "loss": 5.5,
        "probe_accuracy": acc,
        "test_accuracy": None if state != "complete" or acc is None else acc - 0.01,
        "feature_rank": 20.0,
        "projection_rank": 5.0,
        "views_per_second": 2000.0,
        "train_seconds": 30.0,
        "values": None if state != "complete" else (acc, float(dim or 0)),
        "reason": None,
        "message": None,
        "facts": {},
        "started_at": BEGAN,
        "finished_at": BEGAN if ended else None,
    }
    return TrialRow(**(values | facts))


def snapshot(
    *trials: TrialRow,
    seconds: float = 60.0,
    state: str = "open",
    workers: tuple[WorkerRow, ...] = (),
    **changes: Any,
) -> Snapshot:
    study = Study(1, "made-up", spec(**changes), state, BEGAN, BEGAN if state == "complete" else None)  # type: ignore[arg-type]
    return Snapshot(study, tuple(trials), workers, BEGAN + timedelta(seconds=seconds))

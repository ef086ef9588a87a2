"""A study and a worker without training: accuracy is a formula of point, seed and epoch."""

from __future__ import annotations

import math

from headsearch.search import leases, outcomes
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.database import Database
from headsearch.search.leases import Report
from headsearch.search.outcomes import Outcome
from headsearch.search.studies import Study
from headsearch.spec import StudySpec


def make_spec(**changes) -> StudySpec:
    tree = {
        "name": "toy",
        "budget": {"trials": 12, "epochs": 9, "rungs": [1, 3]},
        "space": {
            "head.kind": ["mlp", "linear"],
            "head.width": {"low": 8, "high": 256, "log": True, "when": {"head.kind": "mlp"}},
            "head.projection_dim": [2, 4, 8, 16, 32, 64],
        },
    }
    return StudySpec.model_validate(tree | changes)


def accuracy(work: Claim, epoch: int) -> float:
    dim = work.params["head.projection_dim"]
    end = 0.4 + 0.05 * math.log2(dim) + 0.02 * math.sin(37.0 * work.params.get("head.width", 3) + work.seed)
    return end * (1 - math.exp(-epoch / 2))


def report_of(work: Claim, epoch: int) -> Report:
    return Report(epoch, 1.0 / epoch, accuracy(work, epoch), 3.0, 2.0, 100.0, float(epoch))


def outcome_of(work: Claim, epochs: int) -> Outcome:
    value = accuracy(work, epochs)
    dim = float(work.params["head.projection_dim"])
    return Outcome("complete", (value, dim), facts={"probe_accuracy": value, "test_accuracy": value - 0.01})


def train(database: Database, study: Study, work: Claim) -> str:
    """To the next rung or the end; returns what became of it."""
    dim = work.params["head.projection_dim"]
    leases.describe(database, study, work, projection_dim=dim, head_parameters=100 * dim)
    for epoch in range(1, study.spec.budget.epochs + 1):
        # As a training that goes on from its checkpoint, which says again what it said before.
        if epoch > work.epoch:
            leases.report(database, study, work, report_of(work, epoch))
        if epoch == work.stop_at:
            verdict = leases.arrive(database, study, work)
            if verdict != "go on":
                return verdict
            work = leases.past_rung(study, work)
    outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, study.spec.budget.epochs))
    return "complete"


def work_off(database: Database, study: Study, worker: str = "w") -> list[Claim]:
    """Work until nothing is left; returns all claims in order."""
    claims = []
    while True:
        work = claim(database, study, worker, "cpu")
        if work in (Idle.COMPLETED, Idle.DONE):
            return claims
        if isinstance(work, Claim):
            claims.append(work)
            train(database, study, work)

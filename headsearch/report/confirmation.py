"""Confirming a front: its points again, with seeds that took no part in choosing them.

A front is a maximum over many noisy trials, so its accuracies are a little too good (Schliebitz et al. 2024
report the best of 72 cells, chosen on the split that they score). The confirming study trains each point
of the front whole, with fresh seeds; its means say what to expect, its standard deviations how surely.
"""

from __future__ import annotations

import itertools

from headsearch.errors import InputError
from headsearch.report.fronts import front
from headsearch.search.snapshot import Snapshot
from headsearch.spec import StudySpec

LONGEST_NAME = 63


def confirmation(snapshot: Snapshot, seeds: int) -> StudySpec:
    """The study that trains the front of `snapshot` again with `seeds` seeds which its own study lacks.

    Raises:
        InputError: The study is not complete, or has no front.
    """
    spec = snapshot.study.spec
    best = front(snapshot)
    if snapshot.study.state != "complete":
        raise InputError(
            f"study {spec.name!r}: not complete yet, so its front may still change; finish it first"
        )
    if not best:
        raise InputError(f"study {spec.name!r}: no trial is complete, so there is no front to confirm")
    suffix = f"-confirm-{seeds}"
    fresh = itertools.islice((seed for seed in itertools.count() if seed not in spec.seeds), seeds)
    return StudySpec.model_validate(
        {
            "name": f"{spec.name[: LONGEST_NAME - len(suffix)]}{suffix}",
            "question": f"Does the front of {spec.name} hold with fresh seeds?",
            "mode": "points",
            "points": [point.params for point in best],
            "seeds": list(fresh),
            "objectives": spec.objectives,
            "protocol": spec.protocol,
            "budget": {"epochs": spec.budget.epochs},
            "lease": spec.lease.model_dump(),
            "worker": spec.worker.model_dump(),
            "base": spec.base,
        }
    )

"""Confirming a front: its points again, with seeds that took no part in choosing them.

A front is a maximum over many noisy trials, so its accuracies are a little too good (Schliebitz et al. 2024
report the best of 72 cells, chosen on the split that they score). The confirming study trains each point
of the front whole, with fresh seeds; its means say what to expect, its standard deviations how surely.

It trains on the training split, as the search did. Papers that hold no images out train on the whole training
data and score the test split: so does the confirming study of all images, whose test accuracy is the one to
hold beside theirs. The points were chosen before, on held-out images; it chooses nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from headsearch.config import set_path
from headsearch.errors import InputError
from headsearch.fields import explain
from headsearch.report.fronts import FrontPoint, front, points, spread
from headsearch.report.tables import Table, value
from headsearch.search.snapshot import Snapshot
from headsearch.spec import StudySpec

LONGEST_NAME = 63


def confirmation(snapshot: Snapshot, seeds: int, *, all_images: bool = False) -> StudySpec:
    """The study that trains the front of `snapshot` again with `seeds` seeds which its own study lacks.

    With `all_images` on training and validation images together.

    Raises:
        InputError: The study is not complete, or has no front, or was trained on validation images itself; or
            its trials need validation images held out.
    """
    spec = snapshot.study.spec
    best = front(snapshot)
    if spec.trains_on_validation:
        raise InputError(
            f"study {spec.name!r}: trained on validation images, too (data.train_on), so it has no front to "
            "choose points by; confirm the study that they come from"
        )
    if snapshot.study.state != "complete":
        raise InputError(
            f"study {spec.name!r}: not complete yet, so its front may still change; finish it first"
        )
    if not best:
        raise InputError(f"study {spec.name!r}: no trial is complete, so there is no front to confirm")
    suffix = f"-confirm-{seeds}" + ("-all-images" if all_images else "")
    fresh = itertools.islice((seed for seed in itertools.count() if seed not in spec.seeds), seeds)
    base: dict[str, Any] = json.loads(json.dumps(spec.base))
    if all_images:
        set_path(base, "data.train_on", "training+validation")
    tree = {
        "name": f"{spec.name[: LONGEST_NAME - len(suffix)]}{suffix}",
        "question": f"What does the front of {spec.name} reach when trained on validation images, too?"
        if all_images
        else f"Does the front of {spec.name} hold with fresh seeds?",
        "mode": "points",
        "points": [point.params for point in best],
        "seeds": list(fresh),
        "objectives": spec.objectives,
        "protocol": spec.protocol,
        "budget": {"epochs": spec.budget.epochs},
        "lease": spec.lease.model_dump(),
        "worker": spec.worker.model_dump(),
        "base": base,
    }
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"study {spec.name!r}: {explain(error, StudySpec)}") from None


def beside(search: Snapshot, confirming: Sequence[Snapshot]) -> list[str]:
    """Each confirmed point's accuracies, by what it was trained on and with which seeds.

    Those in the study `search`, which chose the points, and in the studies `confirming` that trained them
    again.
    """
    trained_again = {_key(point) for one in confirming for point in points(one)}
    found = [
        (point, place, snapshot.study.spec)
        for place, snapshot in enumerate((search, *confirming))
        for point in points(snapshot)
        if _key(point) in trained_again
    ]
    found.sort(key=lambda one: (one[0].projection_dim or 0, _key(one[0]), one[1]))
    rows = tuple(
        (
            value(point.projection_dim),
            spec.train_on,
            "fresh" if place else "search",
            spread(point.probe_accuracy) + " seen" * spec.trains_on_validation,
            spread(point.test_accuracy),
            point.n_text,
        )
        for point, place, spec in found
    )
    if not rows:
        return []
    lines = [f"seeds of the search ({search.study.name}) chose the points: figures are too high, test too"]
    if any(spec.trains_on_validation for _, _, spec in found):
        lines += [
            "seen: of images that were trained on; no estimate for new images",
            "test, training+validation: to compare with papers that hold no images out",
        ]
    table = Table(("dim", "trained on", "seeds", "validation", "test", "n"), rows)
    return ["the same points, by what they were trained on:", "", *table.lines(), "", *lines]


def _key(point: FrontPoint) -> str:
    return json.dumps(point.params, sort_keys=True)

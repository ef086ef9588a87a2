"""The rung rule: which trials of a rung earn their next epochs.

The projection dim is known before training, so a trial is not judged by it but beside it: its
domination count is the number of trials at the same rung that are no worse in every objective and
better in one. Two lists are made at a rung, each as long as the best 1/eta of its trials: by
domination count, and by rank among the trials of equal known objectives (for the default objectives:
of the same projection dim), so that every dim is served and small dims do not crowd out large ones.
A trial on either list may go on.

Why two lists: replayed on 100 synthetic studies of 52 trials with rungs 1, 3, 9 of 12 epochs and eta
2, the count alone kept 99 % of the front's hypervolume in some orders only; both lists keep it in
all, at about 60 % of the epochs (tests/search/test_rungs.py holds this).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """A trial as it stood at one rung."""

    number: int
    """Trial number."""
    accuracy: float
    """Probe accuracy reported at the rung."""
    costs: tuple[float, ...] = ()
    """The other objectives, all minimised."""
    group: tuple[float, ...] = ()
    """Objectives known before training; trials that share them compete on accuracy alone."""


def dominates(left: Standing, right: Standing) -> bool:
    """Whether `left` is no worse than `right` in every objective and better in at least one."""
    no_worse = left.accuracy >= right.accuracy and all(
        a <= b for a, b in zip(left.costs, right.costs, strict=True)
    )
    return no_worse and (left.accuracy, left.costs) != (right.accuracy, right.costs)


def front(standings: Sequence[Standing]) -> list[Standing]:
    """Those that no other dominates, in their order."""
    return [one for one in standings if not any(dominates(other, one) for other in standings)]


def worthy(standings: Sequence[Standing], eta: int) -> list[int]:
    """Numbers of the trials of a rung that may go on, the best first.

    Args:
        standings: All trials that ever reached the rung, those that went on included.
        eta: The best 1/eta of each list go on (rounded up).
    """
    count = {one.number: sum(dominates(other, one) for other in standings) for one in standings}
    by_count = sorted(standings, key=lambda one: (count[one.number], -one.accuracy, one.number))
    seen: Counter[tuple[float, ...]] = Counter()
    rank: dict[int, int] = {}
    for one in sorted(standings, key=lambda one: (-one.accuracy, count[one.number], one.number)):
        rank[one.number] = seen[one.group]
        seen[one.group] += 1
    by_group = sorted(by_count, key=lambda one: rank[one.number])
    places = math.ceil(len(standings) / eta)
    return list(dict.fromkeys(one.number for one in (*by_count[:places], *by_group[:places])))

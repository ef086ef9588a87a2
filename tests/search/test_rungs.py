"""The rung rule, alone: what it lets on, and what of the front it keeps on synthetic curves."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from headsearch.search.rungs import Standing, domination_counts, front, worthy

DIMS = (2, 4, 8, 16, 32, 64, 128, 256)
EPOCHS, RUNGS = 12, (1, 3, 9)


def at(number: int, accuracy: float, dim: int) -> Standing:
    return Standing(number, accuracy, (float(dim),), (float(dim),))


def test_domination_counts():
    assert domination_counts([]) == []
    assert domination_counts([at(0, 0.6, 8), at(1, 0.5, 8)]) == [0, 1]
    assert domination_counts([at(0, 0.5, 4), at(1, 0.5, 8)]) == [0, 1]
    assert domination_counts([at(0, 0.5, 8), at(1, 0.5, 8)]) == [0, 0]
    assert domination_counts([at(0, 0.6, 16), at(1, 0.5, 8), at(2, 0.4, 16)]) == [0, 0, 2]


def test_the_first_alone_goes_on_and_order_is_by_count():
    assert worthy([at(3, 0.1, 8)], 2) == [3]
    trio = [at(0, 0.2, 8), at(1, 0.5, 8), at(2, 0.4, 8)]
    assert worthy(trio, 2) == [1, 2]


def test_every_dim_is_served():
    """Small dims dominate all large ones here, so the count alone would let only small ones on."""
    standings = [at(i, 0.9 - i * 0.01, 2) for i in range(8)] + [
        at(8 + i, 0.3 + i * 0.01, 256) for i in range(8)
    ]
    on = set(worthy(standings, 2))
    assert 15 in on
    assert 0 in on


def test_a_better_report_never_loses_its_place():
    rng = random.Random(1)
    for _ in range(200):
        standings = [at(i, rng.random(), rng.choice(DIMS)) for i in range(rng.randint(2, 20))]
        chosen = rng.choice(worthy(standings, 2))
        raised = [
            at(s.number, s.accuracy + 0.1, int(s.costs[0])) if s.number == chosen else s for s in standings
        ]
        assert chosen in worthy(raised, 2)


def curves(rng: random.Random, trials: int, noise: float) -> tuple[list[int], list[list[float]]]:
    """Learning curves whose end depends on dim and on luck, and whose speeds differ a little."""
    dims = [rng.choice(DIMS) for _ in range(trials)]
    table = []
    for dim in dims:
        end = 0.35 + 0.28 * (1 - math.exp(-math.log2(dim) / 3)) + rng.gauss(0, 0.04)
        speed = math.exp(rng.gauss(math.log(3), 0.15))
        rise = [(1 - math.exp(-e / speed)) / (1 - math.exp(-EPOCHS / speed)) for e in range(1, EPOCHS + 1)]
        table.append([0.28 + (end - 0.28) * r + rng.gauss(0, noise) for r in rise])
    return dims, table


def hypervolume(points: list[tuple[int, float]]) -> float:
    """Area under the front over log2 of the dim, up to 512, from accuracy 0."""
    best, steps = 0.0, []
    for dim, accuracy in sorted(points):
        best = max(best, accuracy)
        steps.append((math.log2(dim), best))
    steps.append((math.log2(512), best))
    return sum((right[0] - left[0]) * left[1] for left, right in pairwise(steps))


def replay(dims: list[int], table: list[list[float]], order: list[int]) -> tuple[list[int], int]:
    """Train by the rule `promote`, one trial at a time; returns the complete trials and the epochs."""
    waiting, passed, epochs, complete = list(order), dict.fromkeys(order, 0), 0, []
    reached: list[list[int]] = [[] for _ in RUNGS]
    while True:
        chosen = None
        for rung in reversed(range(len(RUNGS))):
            standings = [at(t, table[t][RUNGS[rung] - 1], dims[t]) for t in reached[rung]]
            chosen = next((t for t in worthy(standings, 2) if passed[t] == rung), None) if standings else None
            if chosen is not None:
                passed[chosen] += 1
                break
        if chosen is None and waiting:
            chosen = waiting.pop(0)
        if chosen is None:
            return complete, epochs
        levels = (0, *RUNGS, EPOCHS)
        epochs += levels[passed[chosen] + 1] - levels[passed[chosen]]
        if passed[chosen] < len(RUNGS):
            reached[passed[chosen]].append(chosen)
        else:
            complete.append(chosen)


@pytest.mark.parametrize(("noise", "orders_that_keep_it"), [(0.0, 1.0), (0.003, 0.95)])
def test_the_front_survives_at_two_thirds_of_the_epochs(noise, orders_that_keep_it):
    kept, shares = [], []
    for seed in range(30):
        rng = random.Random(seed)
        dims, table = curves(rng, 52, noise)
        order = rng.sample(range(52), 52)
        complete, epochs = replay(dims, table, order)
        whole = hypervolume([(dims[t], table[t][-1]) for t in range(52)])
        kept.append(hypervolume([(dims[t], table[t][-1]) for t in complete]) / whole)
        shares.append(epochs / (52 * EPOCHS))
    assert sum(share >= 0.99 for share in kept) / len(kept) >= orders_that_keep_it
    assert min(kept) >= 0.98
    assert sum(shares) / len(shares) <= 2 / 3


def test_the_front_function_agrees_with_brute_force():
    rng = random.Random(2)
    standings = [at(i, rng.randint(0, 9) / 10, rng.choice(DIMS)) for i in range(40)]
    expected = [
        s
        for s in standings
        if not any(
            o.accuracy >= s.accuracy
            and o.costs[0] <= s.costs[0]
            and (o.accuracy > s.accuracy or o.costs[0] < s.costs[0])
            for o in standings
        )
    ]
    assert front(standings) == expected

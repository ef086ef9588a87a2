"""The rung rule, alone: what it lets on, and what of the front it keeps on curves of several families."""

from __future__ import annotations

import os
import random
import statistics
from pathlib import Path

import pytest
from replays import DIMS, Table, area, kept, lcbench, replay, replayed, synthetic_studies

from headsearch.search.rungs import Standing, domination_counts, front, worthy


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


def test_a_front_is_measured_above_the_worst_and_in_log2_of_the_dim():
    assert area([(2, 0.5), (8, 0.7), (16, 0.6), (32, 0.4)], 0.4) == pytest.approx(0.1 * 2 + 0.3 * 2)
    assert area([(2, 0.4), (8, 0.4)], 0.4) == 0.0
    table = Table([2, 4], [[0.5] * 4, [0.6] * 4], epochs=4, rungs=(1,))
    assert replay(table, [0, 1]) == ([0, 1], 8), "each is the only one of its dim"
    assert kept(table, [0, 1]).share == 1.0


@pytest.mark.parametrize(("noise", "keep_it"), [(0.0, 0.85), (0.003, 0.85), (0.006, 0.85)])
def test_of_most_fronts_99_percent_survive_at_two_thirds_of_the_epochs(noise, keep_it):
    """The figures of 100 studies, which the README has: `python tests/search/replays.py`."""
    found = replayed(synthetic_studies(40, noise))
    assert sum(one.share >= 0.99 for one in found) / len(found) >= keep_it
    assert min(one.share for one in found) >= 0.9
    assert statistics.fmean(one.share for one in found) >= 0.99
    assert statistics.fmean(one.epochs for one in found) <= 2 / 3
    assert all(one.share <= one.share_from_zero + 1e-12 for one in found), "the lower floor flatters"


@pytest.mark.slow
@pytest.mark.parametrize(("eight_sizes", "keep_it", "epochs"), [(True, 0.8, 0.65), (False, 0.7, 0.55)])
def test_of_most_fronts_of_lcbench_99_percent_survive(eight_sizes, keep_it, epochs):
    folder = os.environ.get("HEADSEARCH_TEST_LCBENCH")
    if not folder:
        pytest.skip("HEADSEARCH_TEST_LCBENCH names no folder with LCBench's surrogate")
    pytest.importorskip(
        "onnxruntime", reason="onnxruntime reads LCBench's surrogate: pip install onnxruntime"
    )
    found = replayed(lcbench(Path(folder), eight_sizes=eight_sizes))
    assert len(found) == 34
    assert sum(one.share >= 0.99 for one in found) / len(found) >= keep_it
    assert statistics.fmean(one.epochs for one in found) <= epochs


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

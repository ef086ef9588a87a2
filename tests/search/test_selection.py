"""What is chosen looks better than it is, and less so where whole points are chosen: a small simulation."""

from __future__ import annotations

import random
import statistics

from selection import CASES, excess, run, simulated


def test_pruning_points_and_not_seeds_halves_what_test_accuracy_exceeds_the_truth_by():
    """The figures of 1,000 studies, which the README has: `python tests/search/selection.py`."""
    found = {name: run(name, 60) for name in CASES}
    test = {name: statistics.fmean(one.test for one in ones) for name, ones in found.items()}
    validation = {name: statistics.fmean(one.validation for one in ones) for name, ones in found.items()}
    one_by_one, together = (
        test["12 points, three seeds, pruned one by one"],
        test["12 points, three seeds, pruned together"],
    )
    assert 0 < together < 0.6 * one_by_one
    assert all(validation[name] > test[name] for name in CASES)
    assert all(one.incomplete == 0 for one in found["12 points, three seeds, pruned together"])
    assert (
        statistics.fmean(one.incomplete for one in found["12 points, three seeds, pruned one by one"]) > 0.4
    )


def test_what_needs_no_choice_is_not_too_good():
    """One point alone: its figures are right in the mean."""
    found = [excess(simulated(random.Random(seed), 1, 3), together=True) for seed in range(400)]
    assert abs(statistics.fmean(one.test for one in found)) < 0.001
    assert abs(statistics.fmean(one.validation for one in found)) < 0.001

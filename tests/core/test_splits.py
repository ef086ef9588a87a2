"""Splits are stratified, disjoint, nested, and a function of the labels alone."""

from __future__ import annotations

import numpy as np
import pytest

from headsearch.core.splits import Labels, held_out, limited, stratified_order, validation_size
from headsearch.errors import DataError

BALANCED = np.repeat(np.arange(10), 500)
UNEVEN = np.repeat(np.arange(4), [10, 35, 200, 777])


def names(labels: Labels) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(labels.max() + 1))


@pytest.mark.parametrize("labels", [BALANCED, UNEVEN, np.random.default_rng(0).permutation(UNEVEN)])
def test_order_is_a_permutation_with_classes_spread_evenly(labels: Labels) -> None:
    order = stratified_order(labels)
    assert np.array_equal(np.sort(order), np.arange(len(labels)))
    shares = np.bincount(labels) / len(labels)
    for start, stop in [(0, 100), (100, 400), (317, 1003)]:
        found = np.bincount(labels[order][start:stop], minlength=len(shares))
        assert np.abs(found - shares * (stop - start)).max() <= len(shares)


def test_rows_are_shuffled_within_a_class() -> None:
    order = stratified_order(BALANCED)
    rows = order[BALANCED[order] == 3]
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.15
    other = stratified_order(BALANCED, salt=1)
    assert (order == other).mean() < 0.05


def test_the_order_never_changes() -> None:
    """Stored results rest on these splits: a change here must be meant."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    assert stratified_order(labels).tolist() == [6, 4, 2, 0, 10, 8, 9, 1, 5, 3, 7, 11]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("labels", [BALANCED, UNEVEN])
def test_validation_takes_the_share_of_each_class(labels: Labels, fraction: float) -> None:
    ordered = labels[stratified_order(labels)]
    counts = np.bincount(labels)
    if (np.rint(fraction * counts) == 0).any():
        with pytest.raises(
            DataError, match=r"data.validation_fraction: .*'class 0'.*above 0.05 and below 0.95"
        ):
            validation_size(ordered, fraction, names(labels))
        return
    size = validation_size(ordered, fraction, names(labels))
    assert size == held_out(ordered, fraction)
    kept = np.bincount(ordered[:size], minlength=len(counts))
    assert (np.abs(kept - fraction * counts) <= 0.5 + 1e-9).all()
    assert (kept > 0).all()
    assert (kept < counts).all()


def test_a_fraction_that_empties_training_is_refused() -> None:
    ordered = UNEVEN[stratified_order(UNEVEN)]
    with pytest.raises(
        DataError, match=r"data.validation_fraction: 0.99 leaves class 'class 0' without training"
    ):
        validation_size(ordered, 0.99, names(UNEVEN))


def test_a_class_with_one_image_is_refused() -> None:
    labels = np.array([0, 0, 0, 1])
    with pytest.raises(DataError, match=r"data.validation_fraction: class 'class 1' has 1 training images"):
        validation_size(labels[stratified_order(labels)], 0.5, names(labels))


def test_limits_are_even_and_nested() -> None:
    labels = UNEVEN[stratified_order(UNEVEN)]
    before: set[int] = set()
    for limit in (4, 5, 39, 40, 41, 120, 500, 1000, len(labels) - 1):
        rows = limited(labels, limit, names(labels))
        assert rows is not None
        assert len(rows) == limit
        assert (np.diff(rows) > 0).all()
        assert before < set(rows.tolist())
        before = set(rows.tolist())
        kept, there = np.bincount(labels[rows], minlength=4), np.bincount(labels)
        unfinished = kept[kept < there]  # all others gave every image they have
        assert unfinished.max() - unfinished.min() <= 1
        assert (kept <= unfinished.max()).all()


def test_a_limit_above_the_images_keeps_all_and_one_below_the_classes_is_refused() -> None:
    labels = UNEVEN[stratified_order(UNEVEN)]
    assert limited(labels, None, names(labels)) is None
    assert limited(labels, len(labels), names(labels)) is None
    with pytest.raises(DataError, match=r"data.limit: 3 is less than one image for each of the 4 classes"):
        limited(labels, 3, names(labels))

"""Which image belongs to which split: stratified, and fixed by the data alone.

All rows are first put in one order (`stratified_order`) in which every contiguous range holds the classes
in their overall proportions. A split is then a range of rows: nothing is copied, and memory-mapped images
stay on disk until they are read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headsearch.errors import DataError

Labels = NDArray[np.int64]
Rows = NDArray[np.int64]


def stratified_order(labels: Labels, *, salt: int = 0) -> Rows:
    """Permutation of the rows (N,) that spreads every class evenly, shuffled within each class.

    The shuffle is a function of the row number and `salt` only, the same on every machine and with every
    library version.
    """
    shuffled = np.lexsort((_scramble(len(labels), salt), labels))
    return shuffled[np.lexsort((labels[shuffled], _position_in_class(labels[shuffled])))].astype(np.int64)


def held_out(labels: Labels, fraction: float) -> int:
    """How many leading rows make up `fraction` of every class, rounded to whole images.

    `labels` (N,) stand in stratified order.
    """
    return int(np.count_nonzero(_position_in_class(labels) < fraction))


def validation_size(labels: Labels, fraction: float, classes: tuple[str, ...]) -> int:
    """Count the leading rows that are the validation split; the rest trains.

    Raises DataError if a class would be missing from either split.
    """
    size = held_out(labels, fraction)
    counts = np.bincount(labels, minlength=len(classes))
    kept = np.bincount(labels[:size], minlength=len(classes))
    for split, lacking in (("validation", kept == 0), ("training", kept == counts)):
        if lacking.any():
            rarest = int(np.argmin(counts))
            fewest, name = int(counts[rarest]), classes[rarest]
            if fewest < 2:
                raise DataError(
                    f"data.validation_fraction: class {name!r} has {fewest} training images; "
                    "it needs at least 2, one to train on and one to hold out"
                )
            raise DataError(
                f"data.validation_fraction: {fraction:g} leaves class {classes[int(np.argmax(lacking))]!r} "
                f"without {split} images; above {0.5 / fewest:.4g} and below {1 - 0.5 / fewest:.4g} "
                "every class is in both splits"
            )
    return size


def limited(labels: Labels, limit: int | None, classes: tuple[str, ...]) -> Rows | None:
    """Rows of the training split that `limit` keeps, ascending; None if it keeps all.

    Classes take turns, so that each keeps the same number of images as long as it has them. A smaller
    limit keeps a subset of a larger one's rows. Raises DataError if there are more classes than images.
    """
    if limit is None or limit >= len(labels):
        return None
    if limit < len(classes):
        raise DataError(f"data.limit: {limit} is less than one image for each of the {len(classes)} classes")
    turns = np.lexsort((labels, _rank_in_class(labels)))
    return np.sort(turns[:limit]).astype(np.int64)


def _rank_in_class(labels: Labels) -> Rows:
    """How many earlier rows have the same label, (N,)."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    first = np.cumsum(counts) - counts
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - first[labels[by_class]]
    return ranks


def _position_in_class(labels: Labels) -> NDArray[np.float64]:
    """Rank in class as a share of the class, the middle of its slot: in (0, 1)."""
    return (_rank_in_class(labels) + 0.5) / np.bincount(labels)[labels]


def _scramble(count: int, salt: int) -> NDArray[np.uint64]:
    """Hash each row number to 64 bits: SplitMix64 (Steele et al., OOPSLA 2014).

    Not numpy's generators: their streams may change with numpy's version, and splits must not.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    bits = (np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(salt) << np.uint64(40))) * golden
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

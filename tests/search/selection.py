"""What choosing by validation accuracy does to the figures of a front: how much they exceed the truth, simulated.

    python tests/search/selection.py [--studies 1000]

A point's true accuracy is the mean over all seeds. A seed shifts validation and test accuracy alike, as a network that
came out well is better on both; images add to each what is its own. By the rungs 1, 3 and 9 of 12, eta 2, 36 trials
are trained as 36 points of one seed, or as 12 points of three: these pruned one by one, with means of what is left,
as headsearch did before it counted points, or together. For each point of the front, what is shown minus the truth.

Accuracy rises with the dim as on the README's front of CIFAR-10, and points of one dim differ by a standard deviation
of 0.014, as the 21 systems of studies/systems.toml do. Seeds: 0.007, measured on studies/cifar10.toml. Images: 0.004 for validation (5,000), 0.003 for test
(10,000), which is what is left of the binomial where all points share their images.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from dataclasses import dataclass

from replays import DIMS, EPOCHS, Table, replay, rises

from headsearch.search.rungs import Standing, front

POINT_SD, SEED_SD, VALIDATION_SD, TEST_SD = 0.014, 0.007, 0.004, 0.003


@dataclass(frozen=True)
class Study:
    """Points with runs: curves of validation accuracy, and test accuracies, by point and seed."""

    dims: list[int]
    truths: list[float]
    curves: list[list[list[float]]]
    tests: list[list[float]]


@dataclass(frozen=True)
class Excess:
    """Means over the front of a study, in accuracy."""

    validation: float
    test: float
    incomplete: float
    """Share of points that lost seeds and kept others."""


def simulated(rng: random.Random, points: int, seeds: int) -> Study:
    study = Study([], [], [], [])
    for _ in range(points):
        dim = rng.choice(DIMS)
        end = 0.37 + 0.05 * (1 - math.exp(1 - math.log2(dim))) + rng.gauss(0, POINT_SD)
        rise = rises(rng)
        lucks = [rng.gauss(0, SEED_SD) for _ in range(seeds)]
        study.dims.append(dim)
        study.truths.append(end)
        study.curves.append(
            [[0.28 + (end + luck - 0.28) * r + rng.gauss(0, VALIDATION_SD) for r in rise] for luck in lucks]
        )
        study.tests.append([end + luck + rng.gauss(0, TEST_SD) for luck in lucks])
    return study


def left_by(study: Study, *, together: bool) -> dict[int, list[int]]:
    """Seeds of each point that were trained whole."""
    points, seeds = len(study.dims), len(study.tests[0])
    left: dict[int, list[int]] = {}
    if together:
        means = [[statistics.fmean(c[e] for c in runs) for e in range(EPOCHS)] for runs in study.curves]
        complete, _ = replay(Table(study.dims, means), range(points))
        return {point: list(range(seeds)) for point in complete}
    dims = [dim for dim in study.dims for _ in range(seeds)]
    complete, _ = replay(
        Table(dims, [curve for runs in study.curves for curve in runs]), range(points * seeds)
    )
    for run in complete:
        left.setdefault(run // seeds, []).append(run % seeds)
    return left


def excess(study: Study, *, together: bool) -> Excess:
    left, seeds = left_by(study, together=together), len(study.tests[0])
    shown = {p: statistics.fmean(study.curves[p][s][-1] for s in runs) for p, runs in left.items()}
    best = front([Standing(p, shown[p], (float(study.dims[p]),)) for p in sorted(shown)])
    return Excess(
        statistics.fmean(one.accuracy - study.truths[one.number] for one in best),
        statistics.fmean(
            statistics.fmean(study.tests[one.number][s] for s in left[one.number]) - study.truths[one.number]
            for one in best
        ),
        sum(len(runs) < seeds for runs in left.values()) / len(left),
    )


CASES = {
    "36 points, one seed": (36, 1, True),
    "12 points, three seeds, pruned one by one": (12, 3, False),
    "12 points, three seeds, pruned together": (12, 3, True),
}


def run(name: str, studies: int) -> list[Excess]:
    points, seeds, together = CASES[name]
    return [
        excess(simulated(random.Random(seed), points, seeds), together=together) for seed in range(studies)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    options = parser.parse_args()
    for name in CASES:
        found = run(name, options.studies)
        validation, test = (
            (statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5)
            for values in ([one.validation for one in found], [one.test for one in found])
        )
        sys.stdout.write(
            f"{name}: validation {100 * validation[0]:+.2f} (standard error {100 * validation[1]:.2f}), "
            f"test {100 * test[0]:+.2f} ({100 * test[1]:.2f}) points; "
            f"{statistics.fmean(one.incomplete for one in found):.0%} of points lack seeds\n"
        )


if __name__ == "__main__":
    main()

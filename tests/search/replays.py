"""Studies replayed on tables of learning curves: what the rung rule keeps of a front, and at what cost.

    python tests/search/replays.py [--studies 100] [--lcbench FOLDER]

Synthetic curves end by dim and luck, and reports are noisy by a given standard deviation. LCBench's are those of
34 data sets, as a surrogate has them (YAHPO Gym, Pfisterer et al. 2022; `model.onnx` and `encoding.json` in FOLDER, and
onnxruntime to read them): its second objective, the number of units, stands for the projection dim.

A front is measured by the area under it over log2 of the second objective, above the worst configuration of the
study: measured from accuracy 0, where any configuration scores most of the area, every rule looks good.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from headsearch.search.rungs import Standing, worthy

DIMS = (2, 4, 8, 16, 32, 64, 128, 256)
EPOCHS, RUNGS = 12, (1, 3, 9)
TRIALS, ETA = 52, 2
UNITS = (64, 95, 141, 210, 312, 464, 689, 1024)
LCBENCH_EPOCHS, LCBENCH_RUNGS = 52, (4, 13, 39)
NOISES = (0.0, 0.003, 0.006)


@dataclass(frozen=True)
class Table:
    """Points of a study: the second objective, and the accuracies after each epoch, as they are reported."""

    dims: Sequence[float]
    curves: Sequence[Sequence[float]]
    epochs: int = EPOCHS
    rungs: tuple[int, ...] = RUNGS


@dataclass(frozen=True)
class Kept:
    """What a rule left of a study."""

    share: float
    """Of the area of the front of all points, above the worst of them."""
    share_from_zero: float
    """The same from accuracy 0."""
    epochs: float
    """Share of those of all points trained whole."""


def synthetic(rng: random.Random, trials: int, noise: float) -> Table:
    """Learning curves whose end depends on dim and on luck, and whose speeds differ a little."""
    dims = [rng.choice(DIMS) for _ in range(trials)]
    curves = []
    for dim in dims:
        rise = rises(rng)
        end = end_of(rng, dim)
        curves.append([0.28 + (end - 0.28) * share + rng.gauss(0, noise) for share in rise])
    return Table(dims, curves)


def end_of(rng: random.Random, dim: int) -> float:
    """Accuracy of a whole training."""
    return 0.35 + 0.28 * (1 - math.exp(-math.log2(dim) / 3)) + rng.gauss(0, 0.04)


def rises(rng: random.Random) -> list[float]:
    """Which share of the way a training has come after each epoch."""
    speed = math.exp(rng.gauss(math.log(3), 0.15))
    return [(1 - math.exp(-e / speed)) / (1 - math.exp(-EPOCHS / speed)) for e in range(1, EPOCHS + 1)]


def lcbench(folder: Path, *, eight_sizes: bool, seed: int = 0) -> list[Table]:
    """A study of `TRIALS` random configurations for each of LCBench's tasks. Imports onnxruntime and numpy."""
    import numpy as np
    import onnxruntime

    codes = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))["OpenML_task_id"]
    tasks = {name: code for name, code in codes.items() if name not in ("#na#", "167083")}
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tables = []
    for index, code in enumerate(tasks.values()):
        rng, rows, dims = random.Random(1000 * seed + index), [], []
        for _ in range(TRIALS):
            units = rng.choice(UNITS) if eight_sizes else round(2 ** rng.uniform(6, 10))
            dims.append(float(units))
            values = [2 ** rng.uniform(4, 9), 10 ** rng.uniform(-4, -1), rng.uniform(0.1, 0.99)]
            values += [rng.uniform(1e-5, 0.1), rng.randint(1, 5), units, rng.uniform(0, 1)]
            rows += [[epoch, *values] for epoch in range(1, LCBENCH_EPOCHS + 1)]
        inputs = {"x_cat": np.full((len(rows), 1), code, np.int32), "x_cont": np.array(rows, np.float32)}
        said = session.run(None, inputs)[0][:, 1].reshape(TRIALS, LCBENCH_EPOCHS) / 100
        tables.append(Table(dims, said.tolist(), LCBENCH_EPOCHS, LCBENCH_RUNGS))
    return tables


def area(points: Sequence[tuple[float, float]], floor: float) -> float:
    """Under the front of (dim, accuracy), above `floor`, over log2 of the dim to twice the largest."""
    best, steps = floor, []
    for dim, accuracy in sorted(points):
        best = max(best, accuracy)
        steps.append((math.log2(dim), best))
    return sum((right[0] - left[0]) * (left[1] - floor) for left, right in pairwise(steps))


def replay(table: Table, order: Sequence[int], eta: int = ETA) -> tuple[list[int], int]:
    """Train by the rule `promote`, one point at a time; returns the complete points and the epochs."""
    waiting, passed, epochs, complete = list(order), dict.fromkeys(order, 0), 0, []
    reached: list[list[int]] = [[] for _ in table.rungs]
    levels = (0, *table.rungs, table.epochs)
    while True:
        chosen = None
        for rung in reversed(range(len(table.rungs))):
            # Nobody waits there whom the last look did not refuse.
            if all(passed[point] != rung for point in reached[rung]):
                continue
            at = table.rungs[rung] - 1
            standings = [
                Standing(point, table.curves[point][at], (table.dims[point],), (table.dims[point],))
                for point in reached[rung]
            ]
            chosen = next((point for point in worthy(standings, eta) if passed[point] == rung), None)
            if chosen is not None:
                passed[chosen] += 1
                break
        if chosen is None and waiting:
            chosen = waiting.pop(0)
        if chosen is None:
            return complete, epochs
        epochs += levels[passed[chosen] + 1] - levels[passed[chosen]]
        if passed[chosen] < len(table.rungs):
            reached[passed[chosen]].append(chosen)
        else:
            complete.append(chosen)


def kept(table: Table, order: Sequence[int]) -> Kept:
    """What is left of a study's front."""
    complete, epochs = replay(table, order)
    ends = [(dim, curve[-1]) for dim, curve in zip(table.dims, table.curves, strict=True)]
    # All fronts end at the same place, so that what lies beyond the largest dim counts alike.
    last = 2 * max(table.dims)
    shares = []
    for floor in (min(accuracy for _, accuracy in ends), 0.0):
        left, whole = (
            area([*points, (last, floor)], floor) for points in ([ends[point] for point in complete], ends)
        )
        shares.append(left / whole)
    return Kept(shares[0], shares[1], epochs / (len(ends) * table.epochs))


def replayed(tables: Sequence[Table]) -> list[Kept]:
    """Each study once, its points in a random order."""
    found = []
    for seed, table in enumerate(tables):
        points = len(table.dims)
        found.append(kept(table, random.Random(seed).sample(range(points), points)))
    return found


def synthetic_studies(studies: int, noise: float) -> list[Table]:
    return [synthetic(random.Random(seed), TRIALS, noise) for seed in range(studies)]


def line(name: str, found: Sequence[Kept]) -> str:
    good = sum(one.share >= 0.99 for one in found)
    zero = sum(one.share_from_zero >= 0.99 for one in found)
    return (
        f"{name}: at least 99 % kept in {good} of {len(found)} studies, mean {statistics.fmean(o.share for o in found):.4f}, "
        f"lowest {min(one.share for one in found):.3f}, at {statistics.fmean(o.epochs for o in found):.0%} of the epochs "
        f"(measured from accuracy 0: {zero} of {len(found)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--lcbench", type=Path)
    options = parser.parse_args()
    for noise in NOISES:
        found = replayed(synthetic_studies(options.studies, noise))
        sys.stdout.write(f"{line(f'synthetic, noise {noise}', found)}\n")
    if options.lcbench:
        for name, eight in (("eight sizes", True), ("continuous size", False)):
            found = replayed(lcbench(options.lcbench, eight_sizes=eight))
            sys.stdout.write(f"{line(f'LCBench, {name}', found)}\n")


if __name__ == "__main__":
    main()

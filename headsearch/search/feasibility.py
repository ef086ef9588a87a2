"""Which values do not train, learned from failures that the configuration caused.

A sampler that is told of failures as bad (`sampling.taught`) still proposes them: TPE compares its few
good trials with all others, and most of the others are trials that train and wait at a rung. So what it
proposes is looked at once more, one parameter at a time: of the points that have this value, or one near
it, how many trained? A proposal with a value of which fewer trained than of all points, and fewer than
half, is drawn again. A value that was not tried is as good as the average, and so gets its turn.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from headsearch.space import Choices, Params, Range, Space
from headsearch.spec import StudySpec

CONTROLS = ("random", "qmc")
"""Samplers that learn nothing, be it good or bad."""
WEIGHT = 1.0
"""In points, of the rate of all values in that of one; so one failure among good ones forbids nothing."""
WIDTH = 0.15
"""How far a number tells of its neighbours: standard deviation of a kernel, as a share of the range."""


class Feasibility:
    """Rates of points that trained, by each parameter's value."""

    def __init__(self, space: Space, trained: Iterable[Params], failed: Iterable[Params]) -> None:
        self._space = {path: p for path, p in space.items() if isinstance(p, Choices | Range)}
        self._points = [*((point, 1.0) for point in trained), *((point, 0.0) for point in failed)]
        self.rate = (sum(good for _, good in self._points) + 1) / (len(self._points) + 2)
        """Of all points."""

    def is_likely(self, params: Params) -> bool:
        """Whether no value of `params` speaks against it."""
        return self.lowest_rate(params) >= min(0.5, self.rate)

    def lowest_rate(self, params: Params) -> float:
        """Share that trained of the points that share a value with `params`: the lowest of any value."""
        return min((self._rate_of(path, params[path]) for path in self._space if path in params), default=1.0)

    def _rate_of(self, path: str, value: Any) -> float:
        parameter = self._space[path]
        weights = [
            (_nearness(parameter, point[path], value), good) for point, good in self._points if path in point
        ]
        near = sum(weight for weight, _ in weights)
        return (sum(weight * good for weight, good in weights) + WEIGHT * self.rate) / (near + WEIGHT)


def learned(
    spec: StudySpec, trials: Sequence[FrozenTrial], infeasible: Container[int], reported: Container[int]
) -> Feasibility | None:
    """What the study's trials, by Optuna's ids, tell; None while none failed by its configuration."""
    failed = [trial.params for trial in trials if trial._trial_id in infeasible]
    if not failed or spec.sampler.name in CONTROLS:
        return None
    known = [trial for trial in trials if trial._trial_id in reported]
    return Feasibility(spec.space, (t.params for t in known if t._trial_id not in infeasible), failed)


def _nearness(parameter: Choices | Range, one: Any, other: Any) -> float:
    if isinstance(parameter, Choices):
        return float(one == other)
    low, high = float(parameter.low), float(parameter.high)
    scaled = math.log(one / other) / math.log(high / low) if parameter.log else (one - other) / (high - low)
    return math.exp(-0.5 * (scaled / WIDTH) ** 2)

"""Which values do not train, learned from failures that the configuration caused.

A sampler that is told of failures as bad (`sampling.taught`) still proposes them: TPE compares its few
good trials with all others, and most of the others are trials that train and wait at a rung. So what it
proposes is looked at once more, by each parameter's value and by each pair of values: of the points that
have them, or numbers near them, how many trained? A proposal is drawn again where, with some doubt in its
favour, fewer trained than of all points, and fewer than half. Values that were not tried are as good as the
average, and so get their turn. Pairs are needed where no value fails alone, as an activation that trains
with normalised pixels only.

tests/search/test_failures_teach.py measures what this is worth.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from headsearch.space import Choices, Params, Range, Space
from headsearch.spec import StudySpec

CONTROLS: Final = ("random", "qmc")
"""Samplers that learn nothing, be it good or bad."""
WEIGHT: Final = 1.0
"""In points, of the rate of all values in that of one; so one failure among good ones forbids nothing."""
PAIR_WEIGHT: Final = 2.0
"""Likewise in that of a pair. There are many pairs, most of which few points have."""
DOUBT: Final = 0.25
"""Standard errors that are added to a rate. With 0 chance alone forbids most values after some failures."""
LEAST_VARIANCE: Final = 0.05
"""Of a point's success, in that standard error: few points that all failed are no certainty."""
WIDTH: Final = 0.15
"""How far a number tells of its neighbours, at most: a kernel's standard deviation over the range."""
NARROWING: Final = 0.3
"""Over the root of the number of points it is that standard deviation, once it is less: more points show
finer bounds."""


class Feasibility:
    """Rates of points that trained, by each parameter's value and each pair of them."""

    def __init__(self, space: Space, trained: Iterable[Params], failed: Iterable[Params]) -> None:
        self._space = {path: p for path, p in space.items() if isinstance(p, Choices | Range)}
        points = [*((point, 1.0) for point in trained), *((point, 0.0) for point in failed)]
        self._places = np.array([self._place(point) for point, _ in points]).reshape(-1, len(self._space))
        self._trained = np.array([good for _, good in points])
        self._discrete = np.array([isinstance(p, Choices) for p in self._space.values()], dtype=bool)
        self._width = min(WIDTH, NARROWING / math.sqrt(max(1, len(points))))
        self.rate = (float(self._trained.sum()) + 1) / (len(points) + 2)
        """Of all points."""

    def is_likely(self, params: Params) -> bool:
        """Whether no value of `params`, and no pair of them, speaks against it."""
        return self.lowest_rate(params) >= min(0.5, self.rate)

    def lowest_rate(self, params: Params) -> float:
        """Share that trained of the points that share a value, or two, with `params`: the lowest of any.

        Each is the most that is plausible, `DOUBT` standard errors above the estimate, and may exceed 1; it
        is 1 where no parameter is active.
        """
        near = self._nearness(np.array(self._place(params)))
        active = [column for column, path in enumerate(self._space) if path in params]
        if not active:
            return 1.0
        near = near[:, active]
        good = near * self._trained[:, None]
        one, two = np.diag_indices(len(active)), np.triu_indices(len(active), 1)
        count, trained = near.T @ near, good.T @ near
        count[one], trained[one] = near.sum(0), good.sum(0)
        cells = (np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]]))
        weight = np.repeat([WEIGHT, PAIR_WEIGHT], [len(one[0]), len(two[0])])
        count = count[cells] + weight
        rates = (trained[cells] + weight * self.rate) / count
        errors = np.sqrt(np.maximum(rates * (1 - rates), LEAST_VARIANCE) / count)
        return float((rates + DOUBT * errors).min())

    def _nearness(self, place: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far each point tells of `place`, by parameter: 0 to 1, (points, parameters)."""
        apart = self._places - place
        near = np.where(self._discrete, apart == 0, np.exp(-0.5 * (apart / self._width) ** 2))
        return np.nan_to_num(near)

    def _place(self, params: Params) -> list[float]:
        """Number of each choice and place in each range, 0 to 1; not a number where one is not active."""
        return [
            _place(parameter, params[path]) if path in params else math.nan
            for path, parameter in self._space.items()
        ]


def learned(
    spec: StudySpec, trials: Sequence[FrozenTrial], infeasible: Container[int], reported: Container[int]
) -> Feasibility | None:
    """What the study's trials, by Optuna's ids, tell; None while none failed by its configuration."""
    failed = [trial.params for trial in trials if trial._trial_id in infeasible]
    if not failed or spec.sampler.name in CONTROLS:
        return None
    known = [trial for trial in trials if trial._trial_id in reported]
    return Feasibility(spec.space, (t.params for t in known if t._trial_id not in infeasible), failed)


def _place(parameter: Choices | Range, value: Any) -> float:
    if isinstance(parameter, Choices):
        return float(parameter.choices.index(value)) if value in parameter.choices else math.nan
    low, high = float(parameter.low), float(parameter.high)
    return math.log(value / low) / math.log(high / low) if parameter.log else (value - low) / (high - low)

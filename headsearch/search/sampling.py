"""Proposals: an Optuna sampler asked for one point that the study does not have yet.

The sampler is made anew for each proposal, seeded by the study's seed and the trial's number, so
that a proposal depends on the history and not on which worker asked or how often it was restarted.

Samplers are driven through their public methods rather than `Trial.suggest_*`, because a suggested
value cannot be taken back: a point that the study already has is drawn again before anything is
stored.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from headsearch import space as spaces
from headsearch.search.database import quietly
from headsearch.search.feasibility import Feasibility
from headsearch.space import Choices, Params, Range, Space
from headsearch.spec import SamplerSpec, StudySpec

DRAWS = 6
"""Proposals that may turn out to be known points before one of the unknown is drawn evenly: a sampler that
repeats itself this often has used up the part of the space that it likes, and each proposal reads all
trials again."""
GP_DRAWS = 2
"""Of `gp`, which fits its models anew for each (0.45 s of CPU time at 24 trials, under the study's lock) and
finds the same one or two optima again."""

EVEN_DRAWS = 50
"""Where all that a sampler proposes is unlikely to train, so many others are looked at."""

CONSTRAINT = "constraints:trains"
"""Key of the one constraint that `taught` sets, as `Trial.set_constraint` would store it."""


def distribution(parameter: Choices | Range) -> BaseDistribution:
    """Optuna's distribution of a parameter."""
    if isinstance(parameter, Choices):
        return CategoricalDistribution(parameter.choices)
    if parameter.is_integer:
        return IntDistribution(
            int(parameter.low), int(parameter.high), log=parameter.log, step=int(parameter.step or 1)
        )
    return FloatDistribution(
        float(parameter.low), float(parameter.high), log=parameter.log, step=parameter.step
    )


def distributions(spec: StudySpec) -> dict[str, BaseDistribution]:
    """Of all varying parameters; the values that a list of points uses are its choices."""
    if spec.mode == "points":
        values: dict[str, list[Any]] = {}
        for path, value in (item for point in spec.points for item in point.items()):
            if value not in values.setdefault(path, []):
                values[path].append(value)
        return {path: CategoricalDistribution(choices) for path, choices in values.items()}
    return {
        path: distribution(parameter)
        for path, parameter in spec.space.items()
        if isinstance(parameter, Choices | Range)
    }


def make_sampler(spec: SamplerSpec, number: int, *, warmed_up: bool, seeds: int = 1) -> BaseSampler:
    """The sampler that proposes trial `number`.

    Args:
        spec: The study's choice.
        number: Of the trial.
        seeds: Runs of each of the trials that Optuna has, which `startup_trials` counts.
        warmed_up: Whether enough trials have reported for a model. Optuna counts finished trials
            only, and a paused trial, which has reported too, would keep TPE random for most of a
            study; so we count (`claims`) and tell it.
    """
    seed = (spec.seed * 1_000_003 + number) % 2**32
    startup = 1 if warmed_up else 10**9
    with quietly():
        match spec.name:
            case "tpe":
                return TPESampler(
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                    n_startup_trials=startup,
                    seed=seed,
                )
            case "gp":
                return GPSampler(
                    seed=seed,
                    n_startup_trials=startup,
                    deterministic_objective=False,
                    warn_independent_sampling=False,
                )
            case "nsga2":
                return NSGAIISampler(population_size=max(2, -(-spec.startup_trials // seeds)), seed=seed)
            case "qmc":
                # One sequence for the whole study: the points come from its counter, not from a new seed.
                return QMCSampler(seed=spec.seed, warn_independent_sampling=False)
            case "random":
                return RandomSampler(seed=seed)


def taught(
    trials: Sequence[FrozenTrial], infeasible: Container[int], directions: Sequence[str]
) -> list[FrozenTrial]:
    """Optuna's trials as a sampler learns from them, those with an id in `infeasible` as worse than all.

    They failed by their configuration. To Optuna they are FAIL, which no sampler looks at. Here they are
    COMPLETE, break a constraint, and have the worst values that were seen: TPE puts what breaks one last,
    NSGA-II lets all else dominate it, GP models the constraint and needs it of all trials.
    Source: optuna 5, samplers/_tpe/sampler.py, `_split_trials`; samplers/nsgaii/_constraints_evaluation.py;
    samplers/_gp/sampler.py, `_get_constraint_vals_and_feasibility`.
    """
    if not any(trial._trial_id in infeasible for trial in trials):
        return list(trials)
    columns = list(zip(*(t.values for t in trials if t.state == TrialState.COMPLETE), strict=True))
    worst = [
        (min if direction == "maximize" else max)(column)
        for direction, column in zip(directions, columns or [(0.0,)] * len(directions), strict=True)
    ]
    found = []
    for trial in trials:
        bad = trial._trial_id in infeasible
        if bad or trial.state == TrialState.COMPLETE:
            trial = copy.copy(trial)
            trial.system_attrs = {**trial.system_attrs, CONSTRAINT: 1.0 if bad else -1.0}
        if bad:
            trial.state, trial.values = TrialState.COMPLETE, worst
        found.append(trial)
    return found


def propose(
    study: optuna.Study,
    trial: FrozenTrial,
    space: Space,
    sampler: BaseSampler,
    is_known: Callable[[Params], bool],
    feasibility: Feasibility | None = None,
) -> Params:
    """A point of `space` that `is_known` does not know.

    With `feasibility` one that is likely to train: the sampler's, or else one drawn evenly, or the likeliest
    of the sampler's. Values that `trial` already has, from a worker that died while storing them, are kept.
    """
    with quietly():
        study.sampler = sampler
        sampler.before_trial(study, trial)
        best: tuple[float, Params] | None = None
        for _ in range(GP_DRAWS if isinstance(sampler, GPSampler) else DRAWS):
            relative_space = sampler.infer_relative_search_space(study, trial)
            relative = sampler.sample_relative(study, trial, relative_space)
            params = spaces.draw(space, _chooser(study, trial, sampler, relative))
            if is_known(params):
                continue
            if feasibility is None or feasibility.is_likely(params):
                return params
            rate = feasibility.lowest_rate(params)
            if best is None or rate > best[0]:
                best = rate, params
    if best is None or feasibility is None:
        return _unknown(space, trial, is_known)
    rng = random.Random(trial.number)
    for _ in range(EVEN_DRAWS):
        params = spaces.draw(space, _evenly(trial, rng))
        if feasibility.is_likely(params) and not is_known(params):
            return params
    return best[1]


def _chooser(
    study: optuna.Study, trial: FrozenTrial, sampler: BaseSampler, relative: Mapping[str, Any]
) -> Callable[[str, Choices | Range], Any]:
    def choose(path: str, parameter: Choices | Range) -> Any:
        if path in trial.params:
            return trial.params[path]
        dist = distribution(parameter)
        if path in relative and dist._contains(dist.to_internal_repr(relative[path])):
            return relative[path]
        return sampler.sample_independent(study, trial, path, dist)

    return choose


def _evenly(trial: FrozenTrial, rng: random.Random) -> Callable[[str, Choices | Range], Any]:
    def choose(path: str, parameter: Choices | Range) -> Any:
        if path in trial.params:
            return trial.params[path]
        if parameter.values is not None and not (isinstance(parameter, Range) and parameter.log):
            return rng.choice(parameter.values)
        low, high = float(parameter.low), float(parameter.high)
        if not parameter.log:
            return rng.uniform(low, high)
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return round(drawn) if parameter.is_integer else min(max(drawn, low), high)

    return choose


def _unknown(space: Space, trial: FrozenTrial, is_known: Callable[[Params], bool]) -> Params:
    """A new point drawn evenly from the few that are left."""
    rng = random.Random(trial.number)
    if spaces.size(space) is not None:
        left = [
            point
            for point in spaces.points(space)
            if not is_known(point) and all(point.get(path) == value for path, value in trial.params.items())
        ]
        if left:
            return rng.choice(left)

    for _ in range(10_000):
        params = spaces.draw(space, _evenly(trial, rng))
        if not is_known(params):
            return params
    # Every draw is known, so what is left is less than one in ten thousand; a repeat would break the
    # promise of distinct points, and the space's size was checked when the study was created.
    raise RuntimeError("no point of the space is left to propose")

"""Failures of a configuration are bad news to the sampler, those of a machine are none."""

from __future__ import annotations

import json
import math
import random
import statistics
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from toy import train, work_off

from headsearch.search import outcomes, snapshot, steering
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.feasibility import Feasibility
from headsearch.search.history import History
from headsearch.search.outcomes import Outcome
from headsearch.search.sampling import CONSTRAINT, DRAWS, make_sampler, propose, taught
from headsearch.space import Choices, Range
from headsearch.spec import SamplerSpec

pytestmark = pytest.mark.postgres

LEARNING_RATE = "optimizer.learning_rate"
SPACE = {
    "head.kind": ["mlp", "linear"],
    "head.width": {"low": 8, "high": 256, "log": True, "when": {"head.kind": "mlp"}},
    "head.projection_dim": [2, 4, 8, 16, 32, 64],
    LEARNING_RATE: {"low": 0.001, "high": 10.0, "log": True},
}
CIFAR10 = tomllib.loads((Path(__file__).parents[2] / "studies" / "cifar10.toml").read_text())["space"]
BINARY = ("data.normalization", "training.encode_views", "optimizer.decay_all")
THREE = {**CIFAR10, "training.encode_views": ["together", "apart"], "optimizer.decay_all": [True, False]}
ACTIVATIONS = ["identity", "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh"]
BEGAN = datetime(2026, 11, 27, tzinfo=UTC)
STABLE = 0.001 * 10 ** (4 * 3 / 8)
"""Of the learning rate's range, 5/8 in the logarithm are above it."""


def pair(params):
    return params["head.activation"], params["data.normalization"]


def ones(params):
    return tuple(params[path] in ("zscore", "apart", True) for path in BINARY)


COLLAPSING = {
    "above a rate": (SPACE, lambda p: p[LEARNING_RATE] > STABLE),
    "outside a band": (SPACE, lambda p: not 0.001 * 10**1.25 <= p[LEARNING_RATE] <= 0.001 * 10**2.75),
    "choices": (
        {**CIFAR10, "head.activation": ACTIVATIONS},
        lambda p: p["head.activation"] in ACTIVATIONS[:5],
    ),
    "pairs": (CIFAR10, lambda p: pair(p) not in {("relu", "none"), ("silu", "zscore"), ("tanh", "none")}),
    "triples": (THREE, lambda p: sum(ones(p)) != 1),
}
"""Spaces of which 5/8 collapse, and where they do: bounds of a number, five of eight choices, five of the eight
pairs of an activation and a normalisation, five of the eight points of three binary axes."""


def fail(database, study, work, reason):
    outcome = Outcome("failed", reason=reason, message="made up")
    outcomes.finish(database, study, work.number, work.attempt, outcome)


def lost_trials(database, study, reason, collapses=COLLAPSING["above a rate"][1]):
    """Work a study off whose trials fail where it `collapses`, before their first report; returns how many did."""
    while (work := claim(database, study, "w", "cpu")) not in (Idle.COMPLETED, Idle.DONE):
        assert isinstance(work, Claim)
        if collapses(work.params):
            fail(database, study, work, reason)
        else:
            train(database, study, work)
    seen = snapshot.read(database, study.name)
    assert len(seen.trials) == study.spec.trials
    return seen.counts["failed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, marks=() if where in ("above a rate", "pairs") else pytest.mark.hostile)
        for where in COLLAPSING
    ],
)
def test_a_space_that_collapses_for_the_most_part_costs_a_third_of_the_trials(database, make_study, where):
    """With 5/8 of it collapsing. Were they told as nothing, TPE would stay random: 28 of 44 are lost."""
    space, collapses = COLLAPSING[where]
    lost = {}
    for reason, seeds in (("collapsed", 8), ("lost", 1)):
        lost[reason] = [
            lost_trials(
                database,
                make_study(
                    name=f"{reason}-{seed}",
                    space=space,
                    budget={"trials": 44, "epochs": 12, "rungs": [1, 3, 9]},
                    sampler={"seed": seed},
                ),
                reason,
                collapses,
            )
            for seed in range(seeds)
        ]
    print(f"\n{where}: lost of 44 trials, by seed of the sampler: {lost}")
    assert statistics.fmean(lost["collapsed"]) <= 14
    assert statistics.fmean(lost["lost"]) > 20, "a machine's failures teach nothing"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sampler", "trials"), [("nsga2", 24), pytest.param("gp", 9, marks=pytest.mark.slow)]
)
def test_other_samplers_take_them_too(database, make_study, sampler, trials):
    """The limit is for a busy machine: `gp` loads torch, and fits three models anew for each of its draws."""
    study = make_study(
        space=SPACE, budget={"trials": trials, "epochs": 2}, sampler={"name": sampler, "startup_trials": 6}
    )
    assert 0 < lost_trials(database, study, "collapsed") < trials


def test_they_stay_failed_to_people_and_to_optuna(database, make_study):
    study = make_study(budget={"trials": 8, "epochs": 2})
    fail(database, study, claim(database, study, "w", "cpu"), "non_finite_loss")
    work_off(database, study)
    trial = optuna.load_study(study_name=study.name, storage=database.url).trials[0]
    assert (trial.state, trial.values, trial.constraints) == (TrialState.FAIL, None, {})
    assert trial.user_attrs["reason"] == "non_finite_loss"
    row = snapshot.read(database, study.name).trials[0]
    assert (row.state, row.reason, row.infeasible) == ("failed", "non_finite_loss", True)


@pytest.mark.parametrize(
    ("reason", "epoch", "infeasible"),
    [("collapsed", 3, True), ("unbuildable", 0, True), ("out_of_memory", 0, True), ("out_of_memory", 2, False),
     ("lost", 0, False), ("hung", 1, False), ("error", 0, False), ("epoch_time", 0, False), ("cancelled", 0, False)],
)  # fmt: skip
def test_what_a_sampler_is_taught(database, make_study, monkeypatch, reason, epoch, infeasible):
    study = make_study(budget={"trials": 4, "epochs": 9})
    work = claim(database, study, "w", "cpu")
    with database.begin() as connection:
        connection.execute(text("UPDATE headsearch.trials SET epoch = :epoch"), {"epoch": epoch})
    fail(database, study, work, reason)
    told = []

    def keep(trials, ids, directions):
        told.extend(found := taught(trials, ids, directions))
        return found

    monkeypatch.setattr("headsearch.search.claims.taught", keep)
    claim(database, study, "w", "cpu")
    assert told[0].state == (TrialState.COMPLETE if infeasible else TrialState.FAIL)
    assert snapshot.read(database, study.name).trials[0].infeasible == infeasible


def test_one_that_is_requeued_is_bad_no_more(database, make_study):
    study = make_study(budget={"trials": 4, "epochs": 2})
    fail(database, study, claim(database, study, "w", "cpu"), "out_of_memory")
    steering.requeue(database, study.name)
    work_off(database, study)
    assert snapshot.read(database, study.name).counts == {"complete": 4}


def frozen(number, state, values, rate):
    return FrozenTrial(
        number=number, state=state, value=None, values=values, datetime_start=BEGAN, datetime_complete=None if state is TrialState.RUNNING else BEGAN,
        params={"rate": rate}, distributions={"rate": FloatDistribution(0.0, 1.0)}, user_attrs={}, system_attrs={},
        intermediate_values={}, trial_id=100 + number,
    )  # fmt: skip


def test_the_infeasible_are_complete_with_the_worst_values_and_the_others_as_they_were():
    trials = [
        frozen(0, TrialState.COMPLETE, [0.5, 8.0], 0.1), frozen(1, TrialState.FAIL, None, 0.9),
        frozen(2, TrialState.COMPLETE, [0.7, 16.0], 0.2), frozen(3, TrialState.RUNNING, None, 0.8),
        frozen(4, TrialState.FAIL, None, 0.3), frozen(5, TrialState.PRUNED, None, 0.4),
    ]  # fmt: skip
    found = taught(trials, {101, 103}, ["maximize", "minimize"])
    assert [t.values for t in found] == [[0.5, 8.0], [0.5, 16.0], [0.7, 16.0], [0.5, 16.0], None, None]
    assert [t.system_attrs.get(CONSTRAINT) for t in found] == [-1.0, 1.0, -1.0, 1.0, None, None]
    assert [t.constraints for t in found[:2]] == [{"trains": -1.0}, {"trains": 1.0}]
    assert [t.state.name for t in found[4:]] == ["FAIL", "PRUNED"]
    assert all(t.system_attrs == {} for t in trials), "what is remembered stays as it was"
    assert taught(trials, set(), ["maximize", "minimize"]) == trials
    alone = taught(trials[1:2], {101}, ["maximize", "minimize"])
    assert alone[0].values == [0.0, 0.0]


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_each_sampler_keeps_away_from_the_infeasible(name):
    """Rates above .4 do not train. What is told as bad is proposed less than by chance."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    rates = [(index + 0.5) / 24 for index in range(24)]
    trials = [
        frozen(n, TrialState.FAIL, None, rate) if rate > 0.4
        else frozen(n, TrialState.COMPLETE, [0.5 + 0.1 * math.sin(9 * rate), 8.0], rate)
        for n, rate in enumerate(rates)
    ]  # fmt: skip
    found = taught(trials, {t._trial_id for t in trials if t.params["rate"] > 0.4}, ["maximize", "minimize"])
    study.add_trials(found)
    proposed = []
    for number in range(24, 36):
        spec = SamplerSpec(name=name, startup_trials=4)
        study.sampler = make_sampler(spec, number, warmed_up=True)
        trial = study.ask()
        proposed.append(trial.suggest_float("rate", 0.0, 1.0))
        study.tell(trial, state=TrialState.FAIL)
    assert sum(rate > 0.4 for rate in proposed) / len(proposed) < 0.45, proposed


def test_the_notes_of_tpe_are_not_stored(database, make_study):
    """It would take them for parameters of a paused trial, also those that the trial does not have."""
    study = make_study(budget={"trials": 30, "epochs": 9, "rungs": [1, 3]}, sampler={"startup_trials": 2})
    work_off(database, study)
    with database.begin() as connection:
        kept = connection.scalars(text("SELECT key FROM public.trial_system_attributes")).all()
        seen = History(study.study_id).read(connection)
    assert kept == []
    assert len(seen) == 30
    assert all(("head.width" in trial.params) == (trial.params["head.kind"] == "mlp") for trial in seen)


def test_the_notes_of_nsga2_are_stored(database, make_study):
    """Which generation a trial is of is nowhere else."""
    study = make_study(budget={"trials": 8, "epochs": 2}, sampler={"name": "nsga2", "startup_trials": 4})
    work_off(database, study)
    trials = optuna.load_study(study_name=study.name, storage=database.url).trials
    assert {trial.system_attrs["NSGAIISampler:generation"] for trial in trials} == {0, 1}


def test_notes_that_an_earlier_version_stored_go_with_the_migration(database, make_study):
    from headsearch.search import schema

    study = make_study()
    work = claim(database, study, "w", "cpu")
    with database.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO public.trial_system_attributes (trial_id, key, value_json) "
                "VALUES (:trial, 'tpe:relative_params:0', :value)"
            ),
            {"trial": work.trial_id, "value": json.dumps('{"head.width": 8}')},
        )
        connection.exec_driver_sql(
            schema.MIGRATIONS[-1].split("-- Of a trial that runs")[1].split("\n", 1)[1]
        )
        left = connection.scalars(text("SELECT key FROM public.trial_system_attributes")).all()
    assert left == []


def test_a_categorical_choice_that_never_trains_is_left(database, make_study):
    """As an activation that collapses in every head."""
    space = {"head.activation": ["relu", "tanh", "sigmoid", "gelu"], "head.projection_dim": [2, 4, 8, 16, 32, 64],
             "head.width": {"low": 8, "high": 256, "log": True}}  # fmt: skip
    study = make_study(space=space, base={"head.kind": "mlp"}, budget={"trials": 44, "epochs": 3})
    while isinstance(work := claim(database, study, "w", "cpu"), Claim):
        if work.params["head.activation"] == "sigmoid":
            fail(database, study, work, "collapsed")
        else:
            train(database, study, work)
    failed = [t for t in snapshot.read(database, study.name).trials if t.state == "failed"]
    assert len(failed) <= 4


RATES = {"rate": Range(low=0.001, high=10.0, log=True), "kind": Choices(choices=("a", "b", "c", "d"))}


def test_values_of_which_few_trained_are_unlikely_and_unknown_ones_are_not():
    trained = [{"rate": 0.01 * n, "kind": "a"} for n in range(1, 5)]
    failed = [{"rate": 5.0 + n, "kind": "b"} for n in range(3)]
    known = Feasibility(RATES, trained, failed)
    assert known.rate == 5 / 9
    assert known.is_likely({"rate": 0.02, "kind": "a"})
    assert not known.is_likely({"rate": 0.02, "kind": "b"})
    assert not known.is_likely({"rate": 6.0, "kind": "a"})
    assert known.is_likely({"rate": 0.02, "kind": "c"}), "a value that was not tried gets its turn"
    assert known.is_likely({"kind": "c"}), "a parameter that is not active says nothing"
    assert known.lowest_rate({"rate": 0.02, "kind": "b"}) < known.lowest_rate({"rate": 0.02, "kind": "c"})
    assert known.lowest_rate({}) == 1.0


def test_one_failure_among_many_good_ones_forbids_nothing():
    trained = [{"rate": 0.01 * n, "kind": "abcd"[n % 4]} for n in range(1, 16)]
    known = Feasibility(RATES, trained, [{"rate": 0.07, "kind": "c"}])
    assert all(known.is_likely(point) for point in (*trained, {"rate": 0.07, "kind": "c"}))


PAIRS = {"act": Choices(choices=("relu", "tanh")), "norm": Choices(choices=("none", "zscore")), **RATES}


def test_a_pair_of_values_is_unlikely_though_each_of_them_trains():
    trained = [{"act": "relu", "norm": "none"}, {"act": "tanh", "norm": "zscore"}] * 4
    failed = [{"act": "relu", "norm": "zscore"}, {"act": "tanh", "norm": "none"}] * 4
    known = Feasibility(PAIRS, trained, failed)
    assert all(known.is_likely(point) for point in trained)
    assert not any(known.is_likely(point) for point in failed)
    assert known.is_likely({"act": "relu"})


def test_many_points_show_a_narrow_band():
    """The middle eighth of the rates trains; what is as far beside it again does not."""
    points = [(place, {"rate": 0.001 * 10 ** (4 * place)}) for place in ((n + 0.5) / 64 for n in range(64))]
    trained, failed = (
        [p for place, p in points if (abs(place - 0.5) < 1 / 16) == good] for good in (True, False)
    )
    known = Feasibility(RATES, trained, failed)
    assert [known.is_likely({"rate": 0.001 * 10 ** (4 * (0.5 + n / 8))}) for n in (-1, 0, 1)] == [
        False,
        True,
        False,
    ]


def test_chance_alone_forbids_little():
    """Every fifth point fails, whatever its values are: an unlucky one is proposed again all the same."""
    rng = random.Random(4)
    space = {name: Choices(choices=tuple(range(4))) for name in "abcde"}
    forbidden = []
    for _ in range(20):
        points = [{name: rng.randrange(4) for name in space} for _ in range(30)]
        known = Feasibility(space, points[6:], points[:6])
        forbidden += [not known.is_likely({name: rng.randrange(4) for name in space}) for _ in range(20)]
    assert statistics.fmean(forbidden) < 0.2


def test_the_likeliest_of_all_draws_is_taken_where_none_is_likely():
    sampler, study = optuna.samplers.RandomSampler(seed=1), optuna.create_study()
    known = Feasibility(RATES, [], [{"rate": 0.1, "kind": kind} for kind in "abcd" for _ in range(3)])
    trial, drawn = frozen(0, TrialState.RUNNING, None, 0.5), []
    trial.params = {}

    def note(params):
        drawn.append(params)
        return False

    found = propose(study, trial, RATES, sampler, note, known)
    assert len(drawn) == DRAWS
    assert known.lowest_rate(found) == max(map(known.lowest_rate, drawn))

"""A study's trials as a sampler sees them, read by few narrow queries, and only what changed.

Optuna's storage reads all unfinished trials anew whenever a sampler looks, each from six tables. A trial
that is paused at a rung is unfinished for most of a study, so at 2,000 trials that alone took a second
a claim, under the study's lock. What a sampler needs of a trial changes once: when it is finished.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Row, text

from headsearch.search.rungs import Standing
from headsearch.space import Params

_parsed = functools.lru_cache(maxsize=1024)(json_to_distribution)
TPE_NOTES = "tpe:"
_INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}


class History:
    """The trials of one study, remembered by one process. Read it under the study's lock only."""

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._trials: dict[int, FrozenTrial] = {}
        self._running: set[int] = set()
        self._newest = -1
        self.standings: dict[int, dict[int, Standing]] = defaultdict(dict)
        """Of the trials that reported an epoch, by number; kept by `standings`."""

    def read(self, connection: Connection) -> list[FrozenTrial]:
        """All trials by number, without user attributes and dates."""
        rows = connection.execute(
            text(
                """
                SELECT o.trial_id, o.number, o.state::text AS state,
                       EXISTS (SELECT 1 FROM headsearch.trials t WHERE t.trial_id = o.trial_id) AS ours
                FROM public.trials o WHERE study_id = :study_id
                AND (trial_id > :newest OR trial_id = ANY(:running) AND state <> 'RUNNING') ORDER BY trial_id
                """
            ),
            {"study_id": self._study_id, "newest": self._newest, "running": list(self._running)},
        ).all()
        fresh = _load(connection, rows)
        settled = True
        for row in rows:
            trial = fresh[row.trial_id]
            self._running.discard(row.trial_id)
            # A running trial has all its parameters once we have a row of it; until then it is read again.
            settled &= row.ours or trial.state.is_finished()
            if settled or row.trial_id <= self._newest:
                self._trials[row.trial_id] = trial
                self._newest = max(self._newest, row.trial_id)
                if not trial.state.is_finished():
                    self._running.add(row.trial_id)
        return sorted((self._trials | fresh).values(), key=lambda trial: trial.number)


def trial(connection: Connection, trial_id: int) -> FrozenTrial:
    """One trial, as `History.read` has it."""
    rows = connection.execute(
        text("SELECT trial_id, number, state::text AS state FROM public.trials WHERE trial_id = :trial_id"),
        {"trial_id": trial_id},
    ).all()
    return _load(connection, rows)[trial_id]


def create(connection: Connection, study_id: int) -> FrozenTrial:
    """A new RUNNING trial of Optuna's, which is there once the caller's transaction is.

    Numbered under the study's row as Optuna does it, so that none of its clients takes the same number.
    Source: optuna/storages/_rdb/storage.py, `_create_new_trial`; optuna/storages/_rdb/models.py,
    `count_past_trials`.
    """
    connection.execute(
        text("SELECT 1 FROM public.studies WHERE study_id = :study_id FOR NO KEY UPDATE"),
        {"study_id": study_id},
    )
    # A statement of its own: it sees what was committed while the one before waited.
    trial_id: int = connection.execute(
        text(
            "INSERT INTO public.trials (number, study_id, state, datetime_start) "
            "SELECT count(*), :study_id, 'RUNNING', clock_timestamp() AT TIME ZONE 'UTC' "
            "FROM public.trials WHERE study_id = :study_id RETURNING trial_id"
        ),
        {"study_id": study_id},
    ).scalar_one()
    return trial(connection, trial_id)


def _load(connection: Connection, rows: Sequence[Row[Any]]) -> dict[int, FrozenTrial]:
    """Trials of Optuna's by id, of rows of its table `trials`."""
    ids = {"ids": [row.trial_id for row in rows]}
    if not rows:
        return {}

    def details(columns: str, table: str, order: str) -> dict[int, list[Row[Any]]]:
        found = defaultdict(list)
        sql = f"SELECT trial_id, {columns} FROM public.{table} WHERE trial_id = ANY(:ids) ORDER BY {order}"  # noqa: S608
        for row in connection.execute(text(sql), ids):
            found[row.trial_id].append(row)
        return found

    params = details("param_name, param_value, distribution_json", "trial_params", "param_id")
    values = details("value, value_type::text AS kind", "trial_values", "objective")
    attributes = details("key, value_json", "trial_system_attributes", "key")
    trials = {}
    for row in rows:
        dists: dict[str, BaseDistribution] = {
            p.param_name: _parsed(p.distribution_json) for p in params[row.trial_id]
        }
        trials[row.trial_id] = FrozenTrial(
            number=row.number,
            state=TrialState[row.state],
            value=None,
            values=[_INFINITE.get(v.kind, v.value) for v in values[row.trial_id]] or None,
            datetime_start=None,
            datetime_complete=None,
            params={
                p.param_name: dists[p.param_name].to_external_repr(p.param_value)
                for p in params[row.trial_id]
            },
            distributions=dists,
            user_attrs={},
            system_attrs={a.key: json.loads(a.value_json) for a in attributes[row.trial_id]},
            intermediate_values={},
            trial_id=row.trial_id,
        )
    return trials


def store(
    connection: Connection,
    trial_id: int,
    params: Params,
    dists: Mapping[str, BaseDistribution],
    notes: Mapping[str, Any],
    *,
    but: Container[str],
) -> None:
    """Give a running trial of Optuna's its parameters, those in `but` excepted, and a sampler's notes.

    Not TPE's: of a trial that runs, TPE takes what it noted for parameters, also those that `when` left out.
    A trial that waits at a rung runs for most of a study.
    """
    paths = [path for path in dists if path in params and path not in but]
    connection.execute(
        text(
            "INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json) "
            "SELECT :trial_id, * FROM unnest(CAST(:names AS text[]), CAST(:numbers AS float8[]), "
            "CAST(:dists AS text[]))"
        ),
        {
            "trial_id": trial_id,
            "names": paths,
            "numbers": [dists[path].to_internal_repr(params[path]) for path in paths],
            "dists": [distribution_to_json(dists[path]) for path in paths],
        },
    )
    kept = {key: value for key, value in notes.items() if not key.startswith(TPE_NOTES)}
    write(connection, "trial_system_attributes", trial_id, kept)


def end(
    connection: Connection, trial_id: int, state: TrialState, values: Sequence[float] | None = None
) -> bool:
    """End a trial of Optuna's in the caller's transaction; false where another client ended or deleted it.

    Source: optuna/storages/_rdb/storage.py, `set_trial_state_values`.
    """
    ended = connection.execute(
        text(
            "UPDATE public.trials SET state = :state, "
            "datetime_complete = clock_timestamp() AT TIME ZONE 'UTC' "
            "WHERE trial_id = :trial_id AND state = 'RUNNING'"
        ),
        {"trial_id": trial_id, "state": state.name},
    ).rowcount
    if ended and values is not None:
        connection.execute(
            text(
                "INSERT INTO public.trial_values (trial_id, objective, value, value_type) "
                "SELECT :trial_id, v.at - 1, v.value, 'FINITE' "
                "FROM unnest(CAST(:values AS float8[])) WITH ORDINALITY AS v (value, at)"
            ),
            {"trial_id": trial_id, "values": list(values)},
        )
    return bool(ended)


def write(connection: Connection, table: str, trial_id: int, values: Mapping[str, Any]) -> None:
    """Attributes of a trial, in one of Optuna's two tables of them; nothing of a trial that is finished."""
    if values:
        connection.execute(
            text(
                f"INSERT INTO public.{table} (trial_id, key, value_json) "  # noqa: S608
                "SELECT o.trial_id, a.key, a.value FROM public.trials o, "
                "unnest(CAST(:keys AS text[]), CAST(:values AS text[])) AS a (key, value) "
                "WHERE o.trial_id = :trial_id AND o.state = 'RUNNING' "
                "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
            ),
            {
                "trial_id": trial_id,
                "keys": list(values),
                "values": [json.dumps(value) for value in values.values()],
            },
        )


class Seen:
    """Optuna's storage to a sampler that proposes one trial: it reads `trials`, and its notes are kept.

    What a sampler notes on the trial is stored with the trial's parameters, in one transaction.
    """

    def __init__(self, storage: BaseStorage, study_id: int, trials: list[FrozenTrial]) -> None:
        self._storage, self._study_id, self._trials = storage, study_id, trials
        self.notes: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_id_from_name(self, study_name: str) -> int:  # noqa: ARG002, D102
        return self._study_id

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: ARG002, D102
        self.notes[key] = value

    def get_all_trials(  # noqa: D102
        self,
        study_id: int,  # noqa: ARG002
        deepcopy: bool = True,  # noqa: FBT001, FBT002 - Optuna's signature
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = [one for one in self._trials if states is None or one.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def study(self, name: str) -> optuna.Study:
        """Optuna's study over this."""
        return optuna.load_study(
            study_name=name, storage=cast(BaseStorage, self), sampler=optuna.samplers.RandomSampler()
        )

"""Studies: made once, found by name, never changed afterwards."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import optuna
from sqlalchemy import Connection, Row, text

from headsearch import __version__
from headsearch.errors import SpecError, StudyBusyError, StudyExistsError, UnknownStudyError
from headsearch.fields import guess
from headsearch.search.database import LOCK_CREATE, Database, lock_claims, quietly, translated
from headsearch.spec import StudySpec, differences

StudyState = Literal["open", "paused", "complete", "cancelled"]
NOTE_KEY = "dashboard:note_ver"


@dataclass(frozen=True)
class Study:
    """A study as the database has it."""

    study_id: int
    """Optuna's id; stands in the dashboard's address."""
    name: str
    spec: StudySpec
    state: StudyState
    created_at: datetime
    completed_at: datetime | None
    """When it was completed or cancelled."""
    uid: str = ""
    """Random, of this study in this database."""
    version: str = __version__
    """Of headsearch, whose trials these are."""
    seeds_apart: bool = False
    """Begun by a version that paused and pruned each seed of a point by itself."""

    @property
    def folder(self) -> str:
        """Names its checkpoints, on whatever disk."""
        return f"{self.name}-{self.uid}"

    @property
    def ended(self) -> bool:
        """No worker has anything to do on it."""
        return self.state in ("complete", "cancelled")


def create(database: Database, spec: StudySpec) -> tuple[Study, bool]:
    """Make the study, or find it if it was made from the same spec; the flag says whether it is new.

    Raises:
        StudyExistsError: One of this name asks another question; the message lists what differs.
        DatabaseError: Not reachable.
    """
    with database.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_CREATE})
        row = _row(connection, spec.name)
        if row is not None:
            return _same(_study(row), spec), False
        study_id = _create_in_optuna(database, spec)
        connection.execute(
            text(
                "INSERT INTO headsearch.studies (study_id, name, spec, spec_hash, protocol, version) "
                "VALUES (:study_id, :name, CAST(:spec AS json), :hash, :protocol, :version)"
            ),
            {
                "study_id": study_id,
                "name": spec.name,
                "spec": json.dumps(spec.to_json()),
                "hash": spec.hash,
                "protocol": spec.protocol,
                "version": __version__,
            },
        )
        row = _row(connection, spec.name)
        assert row is not None  # noqa: S101 - inserted two lines above, in this transaction
        return _study(row), True


def get(database: Database, name: str) -> Study:
    """The study of this name.

    Raises:
        UnknownStudyError: There is none; the message lists what there is.
    """
    with database.begin() as connection:
        row = _row(connection, name)
        if row is None:
            names = connection.scalars(text("SELECT name FROM headsearch.studies ORDER BY name")).all()
            there = (
                f"there is {guess(name, names)}" if names else "there is none yet: headsearch study create"
            )
            raise UnknownStudyError(f"study {name!r}: not in the database; {there}")
        return _study(row)


def all_studies(database: Database) -> list[Study]:
    """All studies, the newest first."""
    with database.begin() as connection:
        rows = connection.execute(text(f"{_SELECT} ORDER BY created_at DESC, study_id DESC"))
        return [_study(row) for row in rows]


def delete(database: Database, name: str, *, force: bool = False) -> None:
    """Remove a study with its trials and curves, here and from Optuna.

    Raises:
        UnknownStudyError: There is none of this name.
        StudyBusyError: Workers train its trials now, and `force` is false.
    """
    study = get(database, name)
    with database.begin() as connection:
        # A claim that is under way ends first, and none comes between the question and the deletion.
        lock_claims(connection, study.study_id)
        busy = connection.scalars(
            text(
                "SELECT number FROM headsearch.trials WHERE study_id = :study_id AND state = 'running' "
                "AND worker_id IS NOT NULL AND lease_until > clock_timestamp() ORDER BY number"
            ),
            {"study_id": study.study_id},
        ).all()
        if busy and not force:
            numbers = ", ".join(map(str, busy))
            raise StudyBusyError(
                f"study {name!r}: workers are training trial {numbers}; stop them first, or add --force"
            )
        # Over a connection of Optuna's. Our rows go with its study (ON DELETE CASCADE), so that a deletion
        # cut short can be repeated.
        with quietly(), translated(), contextlib.suppress(KeyError):
            optuna.delete_study(study_name=name, storage=database.storage)


_SELECT = (
    "SELECT study_id, name, spec, state, created_at, completed_at, uid, version, seeds_apart "
    "FROM headsearch.studies"
)


def _row(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(text(f"{_SELECT} WHERE name = :name"), {"name": name}).one_or_none()


def _study(row: Row[Any]) -> Study:
    spec = StudySpec.model_validate(row.spec)
    return Study(
        row.study_id,
        row.name,
        spec,
        row.state,
        row.created_at,
        row.completed_at,
        row.uid,
        row.version,
        row.seeds_apart,
    )


def _same(study: Study, spec: StudySpec) -> Study:
    if study.spec.hash == spec.hash:
        return study
    changed = differences(study.spec, spec)
    shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
    raise StudyExistsError(
        f"name: study {spec.name!r} exists with another spec ({shown}); give this one another name "
        f"(--set name=...), or delete that one: headsearch study delete {spec.name}"
    )


def _create_in_optuna(database: Database, spec: StudySpec) -> int:
    """Optuna's half. One left by a process that died before ours was written is taken over."""
    storage = database.storage
    with quietly(), translated():
        study = optuna.create_study(
            study_name=spec.name,
            storage=storage,
            directions=list(spec.directions),
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        study_id = storage.get_study_id_from_name(spec.name)
        wanted = [optuna.study.StudyDirection[direction.upper()] for direction in spec.directions]
        if study.directions != wanted or storage.get_n_trials(study_id):
            raise SpecError(
                f"name: an Optuna study {spec.name!r} that headsearch did not make is in the database; "
                "choose another name"
            )
        study.set_metric_names([axis_name(objective, spec) for objective in spec.objectives])
        study.set_user_attr("protocol", spec.protocol)
        study.set_user_attr("spec_hash", spec.hash)
        if spec.question:
            study.set_user_attr("question", spec.question)
    return study_id


def axis_name(objective: str, spec: StudySpec) -> str:
    """What the dashboard writes beside an axis."""
    if objective != "probe_accuracy":
        return objective
    return f"probe_accuracy ({'seen ' if spec.trains_on_validation else ''}validation)"

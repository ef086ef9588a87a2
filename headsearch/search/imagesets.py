"""The images that a study is trained on, kept with the study: all of its trials must have the same.

A study may use several sets (its space may vary `data.image_size`), each named by its configuration. Whoever
comes first with a set records its fingerprint and counts: `study create`, else the first worker. Studies made
before this was kept take the fingerprint of their first complete trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, text

from headsearch.config import DataConfig
from headsearch.search.database import Database
from headsearch.search.studies import Study
from headsearch.spec import StudySpec

COUNTED = ("training", "validation", "test", "unlabelled")


@dataclass(frozen=True)
class KnownImages:
    """One set of images of a study."""

    key: str
    """Which one: `image_key` of its configuration."""
    fingerprint: str
    counts: Mapping[str, int] = field(default_factory=dict)
    """Images by use, named as in `COUNTED`; empty where they were never told."""


@dataclass(frozen=True)
class Stranger:
    """A complete trial that was trained on other images than its study's."""

    number: int
    fingerprint: str
    expected: str


def image_key(data: DataConfig) -> str:
    """Name of what `data` loads; normalisation comes later and is no part of it.

    A field that came later is left out where it changes nothing, so that older studies keep their names.
    """
    later = {"classes"} if data.classes == "all" else set[str]()
    if data.resize_first or not data.has_another_side:
        later.add("resize_first")
    return data.model_copy(update={"normalization": "none"}).model_dump_json(exclude=later)


def settle(database: Database, study: Study, seen: KnownImages) -> KnownImages:
    """Record `seen` as the study's images unless others are known; returns those that are."""
    with database.begin() as connection:
        for known in known_images(connection, study.study_id):
            if known.key == seen.key:
                return known
        rows = connection.execute(
            text(
                "SELECT number, params, seed, outcome->'facts'->>'data_fingerprint' AS fingerprint "
                "FROM headsearch.trials WHERE study_id = :study_id AND state = 'complete' ORDER BY number"
            ),
            {"study_id": study.study_id},
        )
        before = (row for row in rows if row.fingerprint and _key_of(study.spec, row) == seen.key)
        first = next((row.fingerprint for row in before), seen.fingerprint)
        connection.execute(
            text(
                "INSERT INTO headsearch.images (study_id, data, fingerprint, counts) "
                "SELECT study_id, :data, :fingerprint, CAST(:counts AS jsonb) FROM headsearch.studies "
                "WHERE study_id = :study_id ON CONFLICT DO NOTHING"
            ),
            {
                "study_id": study.study_id,
                "data": seen.key,
                "fingerprint": first,
                "counts": json.dumps(dict(seen.counts) if first == seen.fingerprint else {}),
            },
        )
        told = known_images(connection, study.study_id)
        return next((known for known in told if known.key == seen.key), seen)  # none of a deleted study


def known_images(connection: Connection, study_id: int) -> tuple[KnownImages, ...]:
    """What is recorded of a study, in the order in which it was."""
    rows = connection.execute(
        text(
            "SELECT data, fingerprint, counts FROM headsearch.images WHERE study_id = :study_id "
            "ORDER BY recorded_at, data"
        ),
        {"study_id": study_id},
    )
    return tuple(KnownImages(row.data, row.fingerprint, row.counts) for row in rows)


def images_of(database: Database, study: Study) -> tuple[KnownImages, ...]:
    """The same over a connection of its own."""
    with database.begin() as connection:
        return known_images(connection, study.study_id)


def strangers(spec: StudySpec, known: Iterable[KnownImages], complete: Iterable[Any]) -> list[Stranger]:
    """Complete trials (`number`, `params`, `seed`, `fingerprint`) on other images than their study's."""
    expected = {one.key: one.fingerprint for one in known}
    told = [row for row in complete if row.fingerprint]
    if len({row.fingerprint for row in told} | set(expected.values())) <= 1:
        return []
    found = []
    for row in told:
        first = expected.setdefault(_key_of(spec, row), row.fingerprint)
        if row.fingerprint != first:
            found.append(Stranger(row.number, row.fingerprint, first))
    return found


def counts_text(counts: Mapping[str, int]) -> str:
    """``900 training, 100 validation, 360 test images, no unlabelled``."""
    if not counts:
        return "images that were not counted"
    labelled = ", ".join(f"{counts.get(name, 0):,} {name}" for name in COUNTED[:-1])
    more = counts.get("unlabelled", 0)
    return f"{labelled} images, " + (f"and {more:,} unlabelled for pretraining" if more else "no unlabelled")


def _key_of(spec: StudySpec, row: Any) -> str:
    try:
        return image_key(spec.trial_config(row.params, row.seed).data)
    except ValidationError:
        return ""

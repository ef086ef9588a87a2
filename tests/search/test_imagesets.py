"""The images of a study: recorded once, compared ever after, and flagged where trials had others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text
from toy import make_spec, outcome_of, work_off

from headsearch.config import DataConfig
from headsearch.report.comparison import comparison_captions
from headsearch.report.fronts import captions, front_json
from headsearch.report.summary import header, study_json
from headsearch.search import outcomes, snapshot, studies
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, claim
from headsearch.search.database import Database
from headsearch.search.imagesets import KnownImages, counts_text, image_key, images_of, settle
from headsearch.search.studies import Study

pytestmark = pytest.mark.postgres

COUNTS = {"training": 1294, "validation": 143, "test": 360, "unlabelled": 5000}
HERE = KnownImages(image_key(DataConfig()), "f" * 32, COUNTS)


def told(database: Database, study: Study, *fingerprints: str | None) -> None:
    """Give the complete trials these fingerprints, in turn."""
    with database.begin() as connection:
        numbers = connection.scalars(
            text("SELECT number FROM headsearch.trials WHERE state = 'complete' ORDER BY number")
        ).all()
        for place, number in enumerate(numbers):
            connection.execute(
                text(
                    "UPDATE headsearch.trials SET outcome = jsonb_set(outcome, '{facts,data_fingerprint}', "
                    "coalesce(to_jsonb(CAST(:fingerprint AS text)), 'null')) WHERE study_id = :study_id AND number = :number"
                ),
                {
                    "study_id": study.study_id,
                    "number": number,
                    "fingerprint": fingerprints[place % len(fingerprints)],
                },
            )


def violated(database: Database, study: Study) -> list[str]:
    return [finding.message for finding in audit(database, study).findings if finding.rule == "images"]


def test_whoever_comes_first_says_which_images_a_study_has(database: Database, make_study) -> None:
    study = make_study()
    assert images_of(database, study) == ()
    assert settle(database, study, HERE) == HERE
    others = replace(HERE, fingerprint="e" * 32, counts={})
    assert settle(database, study, others) == HERE
    small = KnownImages(image_key(DataConfig(image_size=16)), "a" * 32, COUNTS)
    assert settle(database, study, small) == small
    assert images_of(database, study) == (HERE, small)


def test_workers_that_come_at_once_agree(database: Database, make_study) -> None:
    study = make_study()
    seen = [replace(HERE, fingerprint=str(number) * 32) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        agreed = list(pool.map(lambda one: settle(database, study, one), seen))
    assert len({one.fingerprint for one in agreed}) == 1
    assert images_of(database, study) == (agreed[0],)


def test_normalisation_is_no_part_of_a_set_and_size_is() -> None:
    key = image_key(DataConfig())
    assert image_key(DataConfig(normalization="zscore")) == key
    assert image_key(DataConfig(image_size=16)) != key
    assert image_key(DataConfig(unlabelled=False)) != key


def test_a_study_of_an_earlier_version_has_the_images_of_its_first_complete_trial(
    database: Database, make_study
) -> None:
    study = make_study()
    work_off(database, study)
    told(database, study, "d" * 32)
    known = settle(database, study, HERE)
    assert known.fingerprint == "d" * 32
    assert known.counts == {}
    assert violated(database, study) == []


def test_a_deleted_study_records_nothing(database: Database, make_study) -> None:
    study = make_study()
    settle(database, study, HERE)
    studies.delete(database, study.name)
    assert settle(database, study, HERE) == HERE
    assert images_of(database, study) == ()


@pytest.mark.parametrize("recorded", [True, False])
def test_trials_on_other_images_are_flagged_wherever_the_study_is_shown(
    database: Database, make_study, recorded: bool
) -> None:
    study = make_study()
    if recorded:
        settle(database, study, HERE)
    work_off(database, study)
    told(database, study, HERE.fingerprint, None)
    assert violated(database, study) == []
    told(database, study, HERE.fingerprint, "e" * 32)
    found = violated(database, study)
    seen = snapshot.read(database, study.name)
    strange = [trial.number for trial in seen.complete][1::2]
    assert strange
    assert found == [
        f"trial {number} was trained on other images than the study's (fingerprint eeeeeeeeeeee, not ffffffffffff)"
        for number in strange
    ]
    said = "\n".join(captions(seen))
    assert "not the same images: trial" in said
    assert str(strange[0]) in said
    assert "not the same images: trial" in "\n".join(comparison_captions([seen]))
    assert front_json(seen)["on_other_images"] == strange


def test_two_sets_of_one_study_are_not_strangers(database: Database) -> None:
    spec = make_spec(
        space={"data.image_size": [8, 12], "head.projection_dim": [2, 4]}, budget={"trials": 4, "epochs": 1}
    )
    study = studies.create(database, spec)[0]
    sizes = {8: "a" * 32, 12: "b" * 32}
    while isinstance(work := claim(database, study, "w", "cpu"), Claim):
        outcome = outcome_of(work, 1)
        outcome.facts["data_fingerprint"] = sizes[work.params["data.image_size"]]
        outcomes.finish(database, study, work.number, work.attempt, outcome)
    assert violated(database, study) == []
    told(database, study, "c" * 32, "d" * 32)
    assert violated(database, study)


def test_counts_stand_in_header_show_and_captions(database: Database, make_study) -> None:
    study = make_study()
    settle(database, study, HERE)
    small = KnownImages(image_key(DataConfig(image_size=16)), "a" * 32, COUNTS)
    settle(database, study, small)
    line = "1,294 training, 143 validation, 360 test images, and 5,000 unlabelled for pretraining"
    assert counts_text(COUNTS) == line
    shown = header(study, "somewhere", images_of(database, study))
    assert [text for label, text in shown if label == "images"] == [line]
    work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert captions(seen).count(line) == 1
    assert comparison_captions([seen, seen]).count(line) == 1
    assert study_json(seen)["images"][0] == vars(HERE)
    assert counts_text(COUNTS | {"unlabelled": 0}).endswith("360 test images, no unlabelled")

"""A machine that wants to work on a study hears what it lacks before it trains anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Command

from headsearch.cli.app import run
from headsearch.runtime import joining
from headsearch.runtime.joining import examine_joining
from headsearch.runtime.session import open_session
from headsearch.search import snapshot, steering, studies
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

TINY = {
    "name": "tiny",
    "budget": {"trials": 6, "epochs": 4, "rungs": [1, 2]},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
    },
    "space": {"head.kind": ["mlp", "linear"], "head.projection_dim": [2, 4, 8, 16]},
}


@pytest.fixture
def world(headsearch_home, database_url, monkeypatch):
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with open_session() as session:
        yield session


def make(session, **changes):
    return studies.create(session.database, StudySpec.model_validate(TINY | changes))[0]


def work(*options):
    process = Command("worker", "--study", "tiny", "--threads", "1", *options)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output


def states(name="tiny"):
    return {finding.name: (finding.state, finding.text, finding.remedy) for finding in examine_joining(name)}


def another_machine(monkeypatch, tmp_path, name="other"):
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / name))


LONG = {"budget": {"trials": 32, "epochs": 4, "rungs": [1, 2]}, "seeds": [0, 1, 2, 3]}
"""Of so many trials, some are worse than those before them and pause."""


def work_until(world, *wanted):
    """Take trials one by one until some are in each of these states; return how many are in which."""
    for _ in range(12):
        work("--count", "1")
        counts = snapshot.read(world.database, "tiny").counts
        if all(counts.get(state) for state in wanted):
            return counts
    raise AssertionError(f"the test would show nothing: {counts}")


def test_a_machine_that_lacks_nothing(world, tmp_path, monkeypatch, capsys):
    """Another home, the same store: it sees the checkpoints and has the same images."""
    make(world, **LONG, worker={"checkpoint_store": f"file://{tmp_path}/store"})
    seen = work_until(world, "paused", "complete")
    another_machine(monkeypatch, tmp_path)
    found = states()
    assert [state for state, _, _ in found.values()] == ["ok"] * 5, found
    assert list(found) == ["shared", "connections", "study", "checkpoints", "images"]
    assert f"those of {seen['paused']} paused trials are seen from here" in found["checkpoints"][1]
    assert "the same that trials were completed on" in found["images"][1]
    assert run(["doctor", "--worker", "tiny", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)][-5:] == list(found)


def test_checkpoints_that_are_not_seen_from_here(world, tmp_path, monkeypatch, capsys):
    make(world, **LONG)
    work_until(world, "paused")
    assert states()["checkpoints"][0] == "ok"
    another_machine(monkeypatch, tmp_path)
    state, line, remedy = states()["checkpoints"]
    assert state == "broken"
    assert "no checkpoint is seen from here" in line
    assert "worker.checkpoint_store" in remedy
    assert run(["doctor", "--worker", "tiny"]) == 1
    assert "no checkpoint is seen from here" in capsys.readouterr().out


def test_a_home_folder_while_others_work_elsewhere(world):
    """Nothing is lost yet, so it is a note."""
    study = make(world)
    with world.database.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO headsearch.workers (worker_id, study_id, host, pid, device, threads, version) "
            f"VALUES ('far:1:x', {study.study_id}, 'far', 1, 'cpu', 1, '0')"
        )
    state, line, remedy = states()["checkpoints"]
    assert (state, "far" in line) == ("note", True)
    assert "worker.checkpoint_store" in remedy


def test_a_store_that_cannot_be_used(world, tmp_path):
    (tmp_path / "file").write_text("")
    make(world, worker={"checkpoint_store": f"file://{tmp_path}/file"})
    state, line, remedy = states()["checkpoints"]
    assert (state, "worker.checkpoint_store" in line) == ("broken", True)
    assert "mount the folder" in remedy


def folder(root: Path, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    for split, count in (("train", 60), ("test", 20)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")


def test_images_that_are_missing_or_others(world, tmp_path, monkeypatch):
    data = TINY["base"] | {
        "data": {"name": "folder", "root": "heads", "image_size": 8},
        "training": {"batch_size": 16, "precision": "fp32"},
        "probe": TINY["base"]["probe"] | {"report_images": 24},
    }
    make(world, base=data, budget={"trials": 1, "epochs": 1})
    for name, seed in (("here", 1), ("there", 2)):
        folder(tmp_path / name / "heads", seed)
    monkeypatch.setenv("HEADSEARCH_DATA", str(tmp_path / "here"))
    assert "no trial is complete to compare with" in states()["images"][1]
    work()
    assert states()["images"][0] == "ok"
    monkeypatch.setenv("HEADSEARCH_DATA", str(tmp_path / "there"))
    state, line, remedy = states()["images"]
    assert (state, "heads" in line) == ("broken", True)
    assert "copy them from a machine that has trained" in remedy
    monkeypatch.setenv("HEADSEARCH_DATA", str(tmp_path))
    state, _, remedy = states()["images"]
    assert (state, "HEADSEARCH_DATA" in remedy) == ("broken", True)


def test_studies_that_have_no_work(world):
    make(world)
    steering.pause(world.database, "tiny")
    assert states()["study"][0] == "note"
    assert "study resume tiny" in states()["study"][2]
    steering.cancel(world.database, "tiny")
    assert states()["study"][2] == "there is nothing to train"


def test_few_connections_and_a_far_database_are_notes(world, monkeypatch):
    make(world)
    monkeypatch.setattr(joining, "FEW_CONNECTIONS", 10_000)
    monkeypatch.setattr(joining, "SLOW_MILLISECONDS", 0.0)
    found = states()
    assert (found["connections"][0], found["shared"][0]) == ("note", "note")
    assert "max_connections" in found["connections"][2]


def test_what_is_not_there(world, monkeypatch, capsys):
    assert states("heads")["study"][:2] == (
        "broken",
        "study 'heads': not in the database; there is none yet: headsearch study create",
    )
    assert run(["doctor", "--worker", "heads"]) == 1
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/heads")
    assert states()["database"][0] == "broken"
    assert run(["doctor", "--worker", "tiny"]) == 1
    assert "secret" not in capsys.readouterr().out

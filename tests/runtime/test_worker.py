"""Workers as real processes that really train, on a real PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults
import numpy as np
import optuna
import pytest
from PIL import Image
from processes import Command
from sqlalchemy import text

from headsearch.runtime.launcher import LocalWorkers
from headsearch.runtime.removal import delete_study
from headsearch.runtime.session import open_session
from headsearch.search import snapshot, studies
from headsearch.search.claims import point_key
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

TINY = {
    "name": "tiny",
    "budget": {"trials": 6, "epochs": 4, "rungs": [1, 2]},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        "autoencoder": {"epochs": 2},
        "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
    },
    "space": {
        "head.kind": ["mlp", "autoencoder", "linear"],
        "head.projection_dim": [2, 4, 8, 16, 32, 64],
        "head.width": {"choices": [8, 16], "when": {"head.kind": "mlp"}},
        "head.embedding_dim": {"choices": [8, 16], "when": {"head.kind": "autoencoder"}},
        "data.normalization": ["none", "zscore"],
    },
}


@pytest.fixture
def world(headsearch_home, database_url, monkeypatch):
    """Home folder and database of this test, for us and for the processes we start."""
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    with open_session() as session:
        yield session


def make(session, **changes):
    spec = StudySpec.model_validate(TINY | changes)
    return studies.create(session.database, spec)[0]


def start(name="tiny", *options, threads=1, fault=None):
    return Command("worker", "--study", name, "--threads", str(threads), *options, fault=fault)


def work(name="tiny", *options):
    process = start(name, *options)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


def read(session, name="tiny"):
    return snapshot.read(session.database, name)


def curves(session, name="tiny"):
    """What was reported of each point, without what depends on the clock."""
    with session.database.begin() as connection:
        rows = connection.execute(
            text(
                "SELECT t.point_key, t.seed, r.epoch, r.loss, r.probe_accuracy, r.feature_rank, r.projection_rank "
                "FROM headsearch.reports r JOIN headsearch.trials t USING (study_id, number) "
                "JOIN headsearch.studies s USING (study_id) WHERE s.name = :name"
            ),
            {"name": name},
        )
        return {tuple(row[:3]): tuple(row[3:]) for row in rows}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_four_workers_started_at_once_finish_thirty_trials_exactly(world):
    make(world, budget={"trials": 30, "epochs": 3, "rungs": [1]})
    with LocalWorkers("tiny", 4, threads=1, home=world.home) as workers:
        wait_for(lambda: read(world).study.state == "complete", 280)
        wait_for(lambda: workers.alive == 0, 30)
        assert [exited.returncode for exited in workers.poll()] == [0] * 4
    seen = read(world)
    assert len(seen.trials) == 30
    assert set(seen.counts) == {"complete", "pruned"}, [t.message for t in seen.trials]
    assert len({(point_key(t.params), t.seed) for t in seen.trials}) == 30
    assert seen.workers == ()
    autoencoders = {
        (t.params["head.embedding_dim"],) for t in seen.trials if t.params["head.kind"] == "autoencoder"
    }
    cached = list((world.home / "cache" / "autoencoders").glob("*.safetensors"))
    assert len(cached) == len(autoencoders)
    assert not list((world.home / "checkpoints").glob("tiny-*/*/*")), (
        "checkpoints of ended trials are removed"
    )
    asked = {"config", "seed", "device", "train_seconds", "views_per_second", "projection_dim", "epochs"}
    for trial in optuna.load_study(study_name="tiny", storage=world.database.url).trials:
        of_its_state = {"test_accuracy", "protocol"} if trial.values else {"pruned_at_epoch"}
        assert asked | of_its_state <= trial.user_attrs.keys()


def test_a_trial_paused_and_promoted_reports_what_one_never_paused_does(world):
    """Two workers with rungs, then one worker without on the same points: bit for bit the same."""
    make(world)
    workers = [start() for _ in range(2)]
    for process in workers:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
    first = read(world)
    assert first.promoted
    make(
        world,
        name="straight",
        mode="points",
        points=tuple(t.params for t in first.trials),
        space={},
        budget={"epochs": 4},
    )
    work("straight")
    paused, straight = curves(world), curves(world, "straight")
    assert len(straight) == 6 * 4
    # With six trials it depends on who comes when whether any is pruned in the end.
    assert len(paused) <= len(straight)
    assert all(straight[key] == value for key, value in paused.items())
    finals = {point_key(t.params): t.values for t in read(world, "straight").trials}
    for trial in first.complete:
        assert trial.values == finals[point_key(trial.params)]


def test_a_worker_killed_mid_trial_loses_nothing(world):
    study = make(world, lease={"seconds": 2}, budget={"trials": 2, "epochs": 20})
    victim = start(fault=partial(faults.signal_itself, signal.SIGKILL, trial=0, epoch=3))
    victim.communicate(timeout=280)
    assert victim.returncode == -signal.SIGKILL
    assert read(world).trials[0].epoch <= 3
    output = work()
    assert "trial 0 adopted at epoch" in output
    seen = read(world)
    assert [t.state for t in seen.trials] == ["complete"] * 2
    assert (seen.trials[0].losses, seen.trials[0].attempt) == (1, 2)
    make(world, name="calm", lease={"seconds": 60}, budget={"trials": 2, "epochs": 20})
    work("calm")
    assert curves(world, "calm") == curves(world)
    assert study.study_id != read(world, "calm").study.study_id


def test_sigterm_gives_the_trial_back_at_once(world):
    make(world, budget={"trials": 1, "epochs": 60})
    worker = start(fault=partial(faults.signal_itself, signal.SIGTERM, trial=0, epoch=3))
    output, _ = worker.communicate(timeout=280)
    assert worker.returncode == 0, output
    assert "trial 0 given back" in output
    seen = read(world)
    assert (seen.trials[0].state, seen.trials[0].losses) == ("orphaned", 0)
    assert seen.trials[0].epoch < 60
    output = work()
    assert f"trial 0 adopted at epoch {seen.trials[0].epoch}" in output
    assert read(world).trials[0].state == "complete"
    assert read(world).trials[0].losses == 0


def test_workers_leave_when_their_launcher_is_killed(world):
    make(world, budget={"trials": 1, "epochs": 5000})
    code = (
        "import time; from headsearch.home import home_folder; from headsearch.runtime.launcher import LocalWorkers\n"
        "with LocalWorkers('tiny', 1, threads=1, home=home_folder()): time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: any(t.epoch >= 1 for t in read(world).trials))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: read(world).workers == (), 60)
    assert read(world).trials[0].state == "orphaned"


def test_a_failing_trial_is_told_with_its_reason_and_the_worker_goes_on(world):
    base = TINY["base"] | {"optimizer": {"learning_rate": 1e4, "momentum": 0.99, "weight_decay": 1e4}}
    make(world, base=base, budget={"trials": 2, "epochs": 4})
    work()
    seen = read(world)
    assert [t.state for t in seen.trials] == ["failed"] * 2
    assert {t.reason for t in seen.trials} <= {"non_finite_loss", "collapsed"}
    assert all(t.message and "\n" not in t.message for t in seen.trials)


def test_sampler_and_pruner_cannot_see_the_test_split(world, tmp_path):
    """Two folders that differ only in their test images: the same search, other test accuracies."""
    rng = np.random.default_rng(0)
    for folder in ("clean", "poisoned"):
        for split, count in (("train", 40), ("test", 20)):
            for label in range(3):
                place = tmp_path / folder / split / f"class{label}"
                place.mkdir(parents=True)
                for index in range(count):
                    draw = np.random.default_rng([label, index, split == "test"])
                    shown = int(rng.integers(3)) if (folder, split) == ("poisoned", "test") else label
                    pixels = np.clip(draw.normal(60 + 60 * shown, 40, (12, 12, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(place / f"{index}.png")
    for folder in ("clean", "poisoned"):
        base = TINY["base"] | {"data": {"name": "folder", "root": str(tmp_path / folder)}}
        base["training"] = {"batch_size": 32, "precision": "fp32"}
        make(world, name=folder, base=base, budget={"trials": 8, "epochs": 4, "rungs": [1, 2]})
        work(folder)
    clean, poisoned = read(world, "clean"), read(world, "poisoned")
    for left, right in zip(clean.trials, poisoned.trials, strict=True):
        assert (left.params, left.state, left.epoch, left.values) == (
            right.params,
            right.state,
            right.epoch,
            right.values,
        )
    assert curves(world, "clean") == curves(world, "poisoned")
    assert [t.test_accuracy for t in clean.complete] != [t.test_accuracy for t in poisoned.complete]


def pictures(root, seed=0):
    for split, count in (("train", 20), ("test", 10)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw = np.random.default_rng([seed, label, index, split == "test"])
                shade = np.clip(draw.normal(60 + 90 * label, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(shade).save(root / split / f"class{label}" / f"{index}.png")


CHANGES = {
    "an image is gone": lambda root: (root / "train/class0/3.png").unlink(),
    "an image changed its class": lambda root: (root / "train/class0/3.png").rename(
        root / "train/class1/moved.png"
    ),
    "one pixel differs": lambda root: Image.fromarray(
        np.asarray(Image.open(root / "test/class1/0.png")) ^ np.uint8(1)
    ).save(root / "test/class1/0.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_worker_whose_images_changed_refuses_and_one_with_the_old_ones_goes_on(world, tmp_path, change):
    root = tmp_path / "pictures"
    pictures(root)
    base = TINY["base"] | {"data": {"name": "folder", "root": str(root), "validation_fraction": 0.3}}
    base["training"] = {"batch_size": 8, "precision": "fp32"}
    make(world, base=base, budget={"trials": 2, "epochs": 2})
    work("tiny", "--count", "1")
    (told,) = read(world).images
    assert told.counts == {"training": 28, "validation": 12, "test": 20, "unlabelled": 0}
    CHANGES[change](root)
    refusing = start()
    output, _ = refusing.communicate(timeout=280)
    assert refusing.returncode == 2, output
    assert f"data: the images of {root} are not those that study tiny is trained on" in output
    seen = read(world)
    assert [t.state for t in seen.trials] == ["complete", "orphaned"]
    assert seen.trials[1].losses == 0
    for file in root.rglob("*.png"):
        file.unlink()
    pictures(root)  # written anew, with the same pixels
    assert "trial 1 adopted" in work()
    seen = read(world)
    assert [t.state for t in seen.trials] == ["complete"] * 2
    assert {t.facts["data_fingerprint"] for t in seen.trials} == {told.fingerprint}
    assert seen.strangers == []


def test_a_database_that_restarts_costs_waiting_only(headsearch_home, monkeypatch):
    """Embedded server killed with SIGKILL while a worker trains: it starts again and nothing is lost."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    from headsearch.home import postgres_folder
    from headsearch.runtime.postgres import EmbeddedServer

    with open_session() as session:
        make(session, budget={"trials": 2, "epochs": 40})
        worker = start()
        wait_for(lambda: any(t.epoch >= 2 for t in read(session).trials))
        server = EmbeddedServer(postgres_folder(session.home))
        os.kill(server.status().pid, signal.SIGKILL)
        output, _ = worker.communicate(timeout=200)
        assert worker.returncode == 0, output
        assert "the database answers again" in output
        session.revive()
        seen = read(session)
        assert [(t.state, t.epoch, t.losses) for t in seen.trials] == [("complete", 40, 0)] * 2
        delete_study(session, "tiny")
        assert studies.all_studies(session.database) == []

"""How trials and workers end when something goes wrong: real processes, a real PostgreSQL, real limits."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
from cable import Cable
from processes import Command
from sqlalchemy import text
from test_worker import TINY, curves, make, read, start, wait_for, work, world

from headsearch.core.checkpoint import CheckpointFolder
from headsearch.home import checkpoint_folder
from headsearch.runtime.database import libpq_url
from headsearch.runtime.session import Session
from headsearch.runtime.verifying import verify
from headsearch.runtime.watch import EXIT_STUCK
from headsearch.search import steering, studies

__all__ = ["world"]
pytestmark = [pytest.mark.postgres, pytest.mark.slow]

DIMS = {"mode": "points", "space": {}, "points": [{"head.projection_dim": 2}, {"head.projection_dim": 4}]}


def long_epochs(**changes: Any) -> dict[str, Any]:
    """One point whose epochs have more than a hundred steps."""
    base = {
        **TINY["base"],
        "data": {"name": "digits", "limit": 1200},
        "training": {"batch_size": 8, "precision": "fp32"},
    }
    return {**DIMS, "points": DIMS["points"][:1], "base": base, "budget": {"epochs": 2}, **changes}


def faulty(fault: Any) -> tuple[int | None, str]:
    """Run a worker in which something goes wrong, to its end; its exit code and lines."""
    worker = Command("worker", "--study", "tiny", "--threads", "1", fault=fault)
    said, _ = worker.communicate(timeout=200)
    return worker.returncode, said


def saved(world: Session, number: int = 0) -> Any:
    folder = studies.get(world.database, "tiny").folder
    return CheckpointFolder(checkpoint_folder(world.home, folder, number)).peek()


@pytest.mark.hostile
def test_a_step_that_hangs_costs_the_process_and_after_some_tries_the_trial(world):
    make(world, **DIMS, budget={"epochs": 2}, lease={"max_attempts": 2}, worker={"step_limit_seconds": 4.0})
    for losses in (1, 2):
        code, said = faulty(faults.hang)
        assert code == EXIT_STUCK, said
        assert "trial 0: no step for 4 s; this worker ends" in said
        assert read(world).trials[0].losses == losses
        assert read(world).workers == (), "it said that it leaves"
    trial = read(world).trials[0]
    assert (trial.state, trial.reason, trial.message) == ("failed", "hung", "no step for 4 s")
    code, said = faulty(faults.hang)
    assert code == 0, said
    seen = read(world)
    assert [t.state for t in seen.trials] == ["failed", "complete"]
    assert verify(world, "tiny").clean
    assert steering.requeue(world.database, "tiny") == [0]
    work()
    assert read(world).counts == {"complete": 2}
    assert verify(world, "tiny").clean


def test_a_head_too_large_for_the_memory_fails_and_the_worker_takes_the_next_trial(world):
    points = [{"head.width": 40_000}, {"head.width": 8}]
    base = {**TINY["base"], "head": {"kind": "mlp", "depth": 3, "projection_dim": 4}}
    make(world, mode="points", space={}, points=points, base=base, budget={"epochs": 2})
    code, said = faulty(faults.limit_memory)
    assert code == 0, said
    first, second = read(world).trials
    assert (first.state, first.reason, first.losses) == ("failed", "out_of_memory", 0)
    assert first.message.startswith("out of memory")
    assert "\n" not in first.message
    assert second.state == "complete"
    assert verify(world, "tiny").clean


def test_an_epoch_past_its_limit_fails_with_that_reason(world):
    make(world, **long_epochs(worker={"epoch_limit_minutes": 1e-4}))
    said = work()
    trial = read(world).trials[0]
    assert (trial.state, trial.reason) == ("failed", "epoch_time")
    assert trial.message == "epoch 1: it took longer than worker.epoch_limit_minutes = 0.0001"
    assert "trial 0 failed" in said


def test_sigterm_inside_a_long_epoch_saves_the_step_and_another_worker_goes_on_there(world):
    often = {"drain_seconds": 0, "checkpoint_minutes": 0.05 / 60}
    make(world, **long_epochs(budget={"epochs": 3}, worker=often))
    worker = start()
    wait_for(lambda: (state := saved(world)) and state["position"] and 3 < state["position"]["step"] < 30)
    worker.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    assert time.monotonic() - began < 30
    assert "trial 0 stopped in epoch " in said
    assert "trial 0 given back" in said
    state, trial = saved(world), read(world).trials[0]
    assert state["position"]["step"] > 3
    assert state["epoch"] == trial.epoch < 3
    assert (trial.state, trial.losses) == ("orphaned", 0)
    work()
    make(world, **long_epochs(budget={"epochs": 3}, name="calm"))
    work("calm")
    assert curves(world) == curves(world, "calm")
    assert read(world).trials[0].values == read(world, "calm").trials[0].values


def test_checkpoints_inside_an_epoch_bound_what_a_kill_repeats(world):
    """Every 50 ms: the worker that adopts the trial goes on in the middle of the epoch."""
    make(world, **long_epochs(lease={"seconds": 1.0}, worker={"checkpoint_minutes": 0.05 / 60}))
    code, said = faulty(partial(faults.signal_itself, signal.SIGKILL, trial=0, epoch=1, step=60))
    assert code == -signal.SIGKILL, said
    assert saved(world)["epoch"] == 1
    assert 3 < saved(world)["position"]["step"] < 60
    work()
    make(world, **long_epochs(name="calm"))
    work("calm")
    assert curves(world) == curves(world, "calm")


def test_a_pause_frees_the_workers_and_resume_lets_them_go_on(world):
    """However long the lease: after the pause a trial is taken up once."""
    make(world, **DIMS, budget={"epochs": 60}, lease={"seconds": 600.0})
    worker = start()
    wait_for(lambda: any(t.epoch >= 5 for t in read(world).trials))
    steering.pause(world.database, "tiny")
    wait_for(lambda: [t.state for t in read(world).trials] == ["orphaned"])
    epoch = read(world).trials[0].epoch
    assert epoch < 60
    time.sleep(1.5)
    assert worker.poll() is None
    assert read(world).trials[0].epoch == epoch
    assert len(read(world).workers) == 1
    steering.resume(world.database, "tiny")
    said, _ = worker.communicate(timeout=200)
    assert worker.returncode == 0, said
    assert "study tiny is paused; headsearch study resume tiny" in said
    seen = read(world)
    assert [(t.state, t.losses, t.attempt) for t in seen.trials] == [("complete", 0, 2), ("complete", 0, 1)]
    assert verify(world, "tiny").clean


def test_a_cancelled_trial_stops_its_worker_at_the_next_step(world):
    make(world, **long_epochs(budget={"epochs": 5000}, lease={"seconds": 1.0}, points=DIMS["points"]))
    worker = start()
    wait_for(lambda: any(t.epoch >= 1 for t in read(world).trials))
    assert steering.cancel(world.database, "tiny", [0]) == [0]
    wait_for(lambda: len(read(world).trials) == 2)
    assert steering.cancel(world.database, "tiny") == [1]
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    assert "trial 0: cancelled; going on with the next trial" in said
    assert read(world).study.state == "cancelled"
    assert read(world).counts == {"failed": 2}
    assert verify(world, "tiny").clean


def test_a_worker_of_another_version_is_told_what_to_do(world):
    make(world)
    with world.database.begin() as connection:
        connection.execute(text("UPDATE headsearch.studies SET version = '99.1.0'"))
    worker = start()
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 2
    (line,) = said.splitlines()
    assert "install headsearch==99.1.0 here, or accept both: headsearch study upgrade tiny" in line
    assert read(world).trials == ()


@pytest.fixture
def small_disk(world) -> Iterator[Path]:
    """A file system of 1 MiB where checkpoints go."""
    folder = world.home / "checkpoints"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.hostile
def test_a_full_disk_is_one_line_and_no_half_file_and_room_mends_it(world, small_disk):
    make(world, **DIMS, budget={"epochs": 3})
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(small_disk).free == 0
    worker = start()
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 1
    (line,) = [line for line in said.splitlines() if "error" in line.lower()]
    assert "cannot be written (No space left on device)" in line
    assert "trial 0 given back" in said
    assert [(t.state, t.losses) for t in read(world).trials] == [("orphaned", 0)]
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [filler]
    filler.unlink()
    work()
    assert [t.state for t in read(world).trials] == ["complete"] * 2
    assert verify(world, "tiny").clean


@pytest.mark.hostile
def test_a_disk_that_turns_read_only_is_one_line_and_the_trial_is_given_back(world, small_disk):
    make(world, **DIMS, budget={"epochs": 30})
    worker = start()
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "cannot be written (Read-only file system)" in line
    trial = read(world).trials[0]
    assert (trial.state, trial.losses) == ("orphaned", 0)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    work()
    assert [t.state for t in read(world).trials] == ["complete"] * 2
    make(world, **DIMS, budget={"epochs": 30}, name="calm")
    work("calm")
    assert curves(world) == curves(world, "calm")


@pytest.fixture
def cable(world, database_address, monkeypatch):
    """The worker's way to the database."""
    import psycopg2.extensions

    parts = psycopg2.extensions.parse_dsn(libpq_url(database_address.url))
    relay = Cable(parts["host"], int(parts["port"]))
    url = database_address.url.replace(f":{parts['port']}/", f":{relay.port}/")
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
    yield relay
    relay.close()


@pytest.mark.hostile
def test_training_goes_on_while_the_database_is_away_and_nothing_is_missing_or_double(world, cable):
    make(world, **DIMS, budget={"epochs": 80}, lease={"seconds": 60.0})
    worker = start()
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    cable.cut()
    time.sleep(0.5)
    stored = read(world).trials[0].epoch
    wait_for(lambda: saved(world)["epoch"] >= stored + 5)
    assert read(world).trials[0].epoch == stored
    cable.mend()
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 0, said
    assert "training goes on, reports wait" in said
    assert "the database answers again after" in said
    seen = read(world)
    assert [(t.state, t.epoch, t.losses, t.attempt) for t in seen.trials] == [("complete", 80, 0, 1)] * 2
    assert verify(world, "tiny").clean


@pytest.mark.hostile
def test_a_database_away_for_too_long_ends_the_worker_and_its_epochs_are_not_lost(world, cable):
    changes = {**DIMS, "budget": {"epochs": 150}, "points": DIMS["points"][:1]}
    make(world, **changes, lease={"seconds": 2.0}, worker={"database_patience_minutes": 2 / 60})
    worker = start()
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    cable.cut()
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 1, said
    assert "could not be given back" in said
    stored, kept = read(world).trials[0].epoch, saved(world)["epoch"]
    assert kept > stored
    cable.mend()
    said = work()
    assert f"trial 0 adopted at epoch {stored}" in said
    assert f"trial 0 epoch {kept}/150" in said
    trial = read(world).trials[0]
    assert (trial.state, trial.epoch, trial.losses) == ("complete", 150, 1)
    assert verify(world, "tiny").clean
    with world.database.begin() as connection:
        made_by_first = connection.scalar(text("SELECT count(*) FROM headsearch.reports WHERE attempt = 1"))
    assert made_by_first == stored


@pytest.mark.hostile
def test_sigterm_while_the_database_is_away_ends_the_worker_all_the_same(world, cable):
    make(world, **DIMS, budget={"epochs": 5000}, lease={"seconds": 2.0})
    worker = start()
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    cable.cut()
    wait_for(lambda: saved(world)["epoch"] > read(world).trials[0].epoch + 2)
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    assert "its lease will run out" in said
    assert "leaves without saying so" in said

"""What an adversary found: workers suspended, stuck in C, starved, and steered at the wrong moment."""

from __future__ import annotations

import signal
import time
from typing import Any

import faults
import pytest
from cable import Cable
from processes import Command
from test_endings import DIMS, cable, long_epochs, saved
from test_worker import curves, make, read, wait_for, work, world

from headsearch.home import checkpoint_folder
from headsearch.runtime.removal import delete_study
from headsearch.runtime.signals import INTERRUPTED
from headsearch.runtime.verifying import verify
from headsearch.search import steering, studies
from headsearch.search.database import lock_claims

__all__ = ["cable", "world"]
pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]
ONE = {**DIMS, "points": DIMS["points"][:1]}


@pytest.fixture
def begin():
    """Start a worker in which something may go wrong; it does not outlive the test."""
    started: list[Command] = []

    def start(fault: Any = None) -> Command:
        worker = Command("worker", "--study", "tiny", "--threads", "1", fault=fault)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.send_signal(signal.SIGCONT)
        worker.kill()


def test_two_sigterms_end_a_worker_that_is_stuck_in_c(world, begin):
    make(world, **long_epochs())
    worker = begin(faults.stay_in_c)
    wait_for(lambda: "trial 0 new" in worker.said)
    time.sleep(2)
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: "SIGTERM: finishing this epoch" in worker.said, 5)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=30)
    assert worker.returncode == INTERRUPTED


def test_one_sigterm_gives_the_trial_of_a_worker_stuck_in_c_back_in_time(world, begin):
    make(world, **long_epochs(worker={"drain_seconds": 1}))
    worker = begin(faults.stay_in_c)
    wait_for(lambda: "trial 0 new" in worker.said)
    time.sleep(2)
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, said
    assert [(t.state, t.losses) for t in read(world).trials] == [("orphaned", 0)]
    assert read(world).workers == ()


def test_sigterm_ends_a_worker_whose_claim_waits_for_a_lock(world, begin):
    study = make(world, **ONE, budget={"epochs": 2}, worker={"drain_seconds": 0})
    with world.database.begin() as holder:
        lock_claims(holder, study.study_id)
        worker = begin()
        wait_for(lambda: "worker " in worker.said)
        time.sleep(1)
        worker.send_signal(signal.SIGTERM)
        said, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, said
    work()
    assert read(world).counts == {"complete": 1}


# Far above what an epoch or a step takes beside another test, or the worker ends before it is put to sleep.
@pytest.mark.parametrize("limit", [{"epoch_limit_minutes": 0.3}, {"step_limit_seconds": 8.0}], ids=str)
def test_time_asleep_counts_for_no_limit(world, begin, limit):
    make(world, **long_epochs(budget={"epochs": 3}, worker=limit, lease={"seconds": 60}))
    worker = begin()
    wait_for(lambda: any(t.epoch >= 1 for t in read(world).trials))
    worker.send_signal(signal.SIGSTOP)
    time.sleep(20)
    worker.send_signal(signal.SIGCONT)
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 0, said
    assert [(t.state, t.losses) for t in read(world).trials] == [("complete", 0)]


def test_a_worker_asleep_for_longer_than_its_lease_is_fenced_and_changes_nothing(world, begin):
    spec = long_epochs(budget={"epochs": 4}, lease={"seconds": 4.0}, worker={"checkpoint_minutes": 0.05 / 60})
    make(world, **spec)
    sleeper = begin()
    wait_for(lambda: any(t.epoch >= 1 for t in read(world).trials))
    sleeper.send_signal(signal.SIGSTOP)
    other = begin()
    wait_for(lambda: "trial 0 adopted" in other.said)
    time.sleep(0.5)
    sleeper.send_signal(signal.SIGCONT)
    for worker in (sleeper, other):
        said, _ = worker.communicate(timeout=250)
        assert worker.returncode == 0, said
    assert [(t.state, t.losses, t.attempt) for t in read(world).trials] == [("complete", 1, 2)]
    make(world, **{**spec, "name": "calm"})
    work("calm")
    assert curves(world) == curves(world, "calm")
    assert verify(world, "tiny").clean


def test_memory_that_others_took_is_tried_again_and_counted(world, begin):
    make(world, **ONE, budget={"epochs": 4}, lease={"max_attempts": 2})
    worker = begin(faults.lose_memory_in_epoch_3)
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 0, said
    assert "it will be tried again" in said
    trial = read(world).trials[0]
    assert (trial.state, trial.reason, trial.epoch, trial.losses) == ("failed", "out_of_memory", 2, 2)


def test_memory_that_ends_in_the_final_probe_has_that_reason(world, begin):
    make(world, **ONE, budget={"epochs": 1}, lease={"max_attempts": 1})
    begin(faults.lose_memory_in_the_probe).communicate(timeout=250)
    trial = read(world).trials[0]
    assert (trial.state, trial.reason) == ("failed", "out_of_memory")


def test_a_slow_report_is_no_step(world, begin):
    make(world, **ONE, budget={"epochs": 1}, worker={"step_limit_seconds": 4.0})
    worker = begin(faults.report_slowly)
    said, _ = worker.communicate(timeout=250)
    assert worker.returncode == 0, said
    assert [(t.state, t.losses) for t in read(world).trials] == [("complete", 0)]


def test_checkpoints_of_a_requeued_trial_are_safe_from_whoever_completed_the_study(world, begin):
    make(world, **DIMS, budget={"epochs": 40})
    first = begin(faults.publish_slowly)
    wait_for(lambda: any(t.epoch >= 1 for t in read(world).trials))
    steering.cancel(world.database, "tiny", [0])
    wait_for(lambda: read(world).study.state == "complete")
    steering.requeue(world.database, "tiny")
    second = begin()
    wait_for(lambda: any(t.number == 2 and t.epoch >= 2 for t in read(world).trials))
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=120)
    epoch = read(world).trials[-1].epoch
    assert epoch < 40
    first.communicate(timeout=120)
    assert saved(world, 2)["epoch"] == epoch


def test_a_server_that_cannot_be_revived_does_not_end_the_keeping_of_the_lease(world, cable: Cable, begin):
    make(world, **ONE, budget={"epochs": 5000}, lease={"seconds": 6})
    worker = begin(faults.no_room_to_revive)
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    cable.cut()
    time.sleep(2)
    cable.mend()
    stored = read(world).trials[0].epoch
    wait_for(lambda: read(world).trials[0].epoch > stored + 5, 30)
    time.sleep(3)
    assert read(world).trials[0].state == "running"
    worker.kill()


def test_a_trial_given_back_has_a_checkpoint_of_its_last_report(world, begin):
    make(world, **ONE, budget={"epochs": 5000}, worker={"checkpoint_epochs": 5000})
    worker = begin(faults.terminate_after_report_5)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0, said
    assert saved(world)["epoch"] == read(world).trials[0].epoch >= 5


def test_a_study_deleted_under_its_worker_leaves_no_checkpoints(world, begin):
    study = make(world, **ONE, budget={"epochs": 5000})
    worker = begin()
    wait_for(lambda: any(t.epoch >= 2 for t in read(world).trials))
    delete_study(world, "tiny", force=True)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 2
    assert "deleted while workers were on it" in said
    assert "Traceback" not in said
    assert not checkpoint_folder(world.home, study.folder, 0).parent.exists()
    assert studies.all_studies(world.database) == []

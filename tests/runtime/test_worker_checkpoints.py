"""A worker whose checkpoints a thread writes to a slow disk: nobody is told of a trial before its write is done.

The worker's own loop and real trainings on a real PostgreSQL, in this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import text
from test_worker import TINY, curves, make, read, world

from headsearch.core import epoch as epoch_module
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.errors import StorageError, TrialFailure
from headsearch.home import checkpoint_folder
from headsearch.runtime import endings, worker
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.signals import Drain
from headsearch.runtime.verifying import verify
from headsearch.search import leases, outcomes, steering, studies, workers

__all__ = ["world"]
pytestmark = pytest.mark.postgres

ONE = {
    "mode": "points",
    "space": {},
    "points": [{"head.projection_dim": 2}],
    "budget": {"epochs": 4},
    "base": {
        **TINY["base"],
        "training": {"batch_size": 32, "precision": "fp32"},
        "probe": {"report_images": 32, "report_iterations": 2, "iterations": 5, "penalties": [1e-2]},
    },
}
LONG = 60.0
SLOW_SECONDS = 0.3


def writing() -> bool:
    """Whether a write is under way: from the end of the worker's `save` on."""
    return any(thread.name == "checkpoint" for thread in threading.enumerate())


class Disk:
    """A slow disk, and what happened beside its writes."""

    def __init__(self) -> None:
        self.held: dict[int, threading.Event] = {}
        self.fails_at: int | None = None
        self.written: list[tuple[int, int]] = []
        """Generation and epoch."""
        self.told: list[str] = []
        self.told_too_early: list[str] = []

    def hold(self, epoch: int) -> None:
        """Let writes of this epoch last until `release`."""
        self.held[epoch] = threading.Event()

    def release(self) -> None:
        """Let writes that were held end after a while, in which nobody may be told of the trial."""
        assert writing()
        for event in self.held.values():
            threading.Timer(SLOW_SECONDS, event.set).start()

    def tell(self, what: str) -> None:
        self.told.append(what)
        if writing():
            self.told_too_early.append(what)


class SlowFolder(CheckpointFolder):
    def __init__(self, disk: Disk, path: Path, generation: int) -> None:
        super().__init__(path, generation=generation)
        self.disk = disk

    def save(self, state: Any) -> None:
        disk, epoch = self.disk, state["epoch"]
        if epoch in disk.held:
            assert disk.held[epoch].wait(LONG)
        else:
            time.sleep(SLOW_SECONDS)
        if epoch == disk.fails_at:
            raise StorageError("checkpoint: cannot be written (No space left on device)")
        super().save(state)
        disk.written.append((self.generation, epoch))

    def remove(self) -> None:
        self.disk.tell("remove")
        super().remove()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    opened = endings.open_checkpoints

    def slow(*arguments: Any, **named: Any) -> SlowFolder:
        folder = opened(*arguments, **named)
        assert isinstance(folder, CheckpointFolder)
        return SlowFolder(found, folder.path, folder.generation)

    def noted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            found.tell(name)
            return call(*arguments, **named)

        monkeypatch.setattr(module, name, outer)

    monkeypatch.setattr(endings, "open_checkpoints", slow)
    for name in ("arrive", "give_back", "set_back"):
        noted(leases, name)
    noted(outcomes, "finish")
    return found


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Callable[[], None]]:
    """Calls by epoch, from 1, and step, from 0; each is made once, before the step."""
    steps, calls = epoch_module.STEPS["joint"], {}

    def joint(batch: Any) -> Any:
        epoch, step = divmod(batch.number, batch.steps)
        calls.pop((epoch + 1, step), lambda: None)()
        return steps(batch)

    monkeypatch.setitem(epoch_module.STEPS, "joint", joint)
    return calls


def work(session: Any, *, drain: Drain | None = None, say: Callable[[str], None] = lambda _: None) -> None:
    study = studies.get(session.database, "tiny")
    worker_id = workers.register(session.database, study, device="cpu", threads=1)
    keeper = LeaseKeeper(session, study, worker_id)
    loop = worker._Worker(
        session, study, worker_id, torch.device("cpu"), "cpu", keeper, drain or Drain(), say, True
    )
    with keeper.running():
        loop.work(None)
    assert not writing()


def folder_of(session: Any, generation: int = 0) -> CheckpointFolder:
    study = studies.get(session.database, "tiny")
    return CheckpointFolder(checkpoint_folder(session.home, study.folder, 0), generation=generation)


def as_if_undisturbed(session: Any, disk: Disk, spec: dict[str, Any] = ONE) -> None:
    """Work on to the end; reports are those of the same study on a fast disk, and no file is left."""
    work(session)
    assert disk.told_too_early == []
    assert verify(session, "tiny").clean
    assert not folder_of(session).path.exists()
    found = curves(session)
    make(session, **{**spec, "name": "calm"})
    study = studies.get(session.database, "calm")
    keeper = LeaseKeeper(session, study, "calm")
    loop = worker._Worker(
        session, study, "calm", torch.device("cpu"), "cpu", keeper, Drain(), lambda _: None, True
    )
    with keeper.running():
        loop.work(None)
    assert found == curves(session, "calm")


def at_report_of(epoch: int, call: Callable[[], None]) -> Callable[[str], None]:
    def say(line: str) -> None:
        if f" epoch {epoch}/" in line:
            call()

    return say


def test_the_next_epoch_is_trained_meanwhile_and_the_end_waits(world, disk, at_step):
    make(world, **ONE)
    disk.hold(1)
    at_step[(2, 1)] = disk.release
    work(world)
    assert at_step == {}, "two steps of epoch 2 were made before the checkpoint of epoch 1 was there"
    assert disk.written == [(1, epoch) for epoch in (1, 2, 3, 4)]
    assert disk.told == ["finish", "remove"]
    assert disk.told_too_early == []
    assert not folder_of(world).path.exists()
    assert read(world).counts == {"complete": 1}


def test_a_trial_is_paused_at_a_rung_once_its_checkpoint_is_there(world, disk, at_step, monkeypatch):
    make(world, **{**ONE, "budget": {"epochs": 4, "rungs": [1, 2]}})
    arrive, seen = leases.arrive, []

    def arriving(database: Any, study: Any, claim: Any) -> Any:
        seen.append((claim.stop_at, folder_of(world).peek()["epoch"]))
        return arrive(database, study, claim)

    monkeypatch.setattr(leases, "arrive", arriving)
    as_if_undisturbed(world, disk)
    assert seen == [(1, 1), (2, 2)]
    assert disk.told[:4] == ["arrive", "arrive", "finish", "remove"]
    assert disk.written[:4] == [(1, 1), (2, 2), (3, 3), (3, 4)], "one training in memory, under new claims"


def test_a_worker_asked_to_stop_gives_the_trial_back_after_the_write(world, disk, at_step):
    make(world, **ONE)
    drain = Drain()
    work(world, drain=drain, say=at_report_of(2, drain.set))
    assert disk.told == ["give_back"]
    assert folder_of(world).peek()["epoch"] == read(world).trials[0].epoch == 3
    as_if_undisturbed(world, disk)


def test_a_training_stopped_inside_an_epoch_is_given_back_after_the_write(world, disk, at_step):
    spec = {**ONE, "worker": {"drain_seconds": 0.0}}
    make(world, **spec)
    drain = Drain()
    at_step[(3, 0)] = drain.set  # the write that must be waited for is that of the step
    work(world, drain=drain)
    assert disk.told == ["give_back"]
    state = folder_of(world).peek()
    assert (state["epoch"], state["position"]["step"]) == (2, 1)
    as_if_undisturbed(world, disk, spec)


def test_a_failure_that_may_be_tried_again_is_told_after_the_write(world, disk, at_step):
    make(world, **ONE)
    disk.hold(2)

    def lose_memory() -> None:
        disk.release()
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    at_step[(3, 0)] = lose_memory
    as_if_undisturbed(world, disk)
    assert disk.told[:3] == ["set_back", "finish", "remove"]
    assert disk.written[:3] == [(1, 1), (1, 2), (2, 3)]


def test_a_failed_trial_leaves_no_files_though_a_write_was_under_way(world, disk, at_step):
    make(world, **ONE)
    disk.hold(2)

    def diverge() -> None:
        disk.release()
        raise TrialFailure("non_finite_loss", "epoch 3: the loss is nan")

    at_step[(3, 0)] = diverge
    work(world)
    assert disk.told == ["finish", "remove"]
    assert disk.told_too_early == []
    assert not folder_of(world).path.exists()
    assert read(world).trials[0].reason == "non_finite_loss"


def test_a_worker_interrupted_between_epochs_gives_the_trial_back_after_the_write(world, disk, at_step):
    make(world, **ONE)
    disk.hold(2)

    def interrupt() -> None:
        disk.release()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(world, say=at_report_of(2, interrupt))
    assert disk.told == ["give_back"]
    assert folder_of(world).peek()["epoch"] == 2
    as_if_undisturbed(world, disk)


def test_a_write_that_fails_ends_the_worker_and_the_trial_goes_on_elsewhere(world, disk, at_step):
    make(world, **ONE)
    disk.fails_at = 2
    with pytest.raises(StorageError, match="No space left on device"):
        work(world)
    assert disk.told == ["give_back"]
    assert [(t.state, t.losses) for t in read(world).trials] == [("orphaned", 0)]
    assert folder_of(world).peek()["epoch"] == 1
    disk.fails_at = None
    as_if_undisturbed(world, disk)


def test_a_write_that_fails_at_a_rung_is_no_pause(world, disk, at_step):
    make(world, **{**ONE, "budget": {"epochs": 4, "rungs": [1]}})
    disk.fails_at = 1
    with pytest.raises(StorageError, match="No space left on device"):
        work(world)
    assert disk.told == ["give_back"]
    assert [t.state for t in read(world).trials] == ["orphaned"]


def test_a_late_write_does_not_come_before_the_adopters(world, disk, at_step):
    make(world, **ONE)
    drain = Drain()
    disk.hold(2)

    def adopt() -> None:
        disk.release()
        with world.database.begin() as connection:
            connection.execute(text("UPDATE headsearch.trials SET attempt = 9, worker_id = 'another'"))
        folder_of(world, 9).save({"epoch": 77})

    at_step[(3, 0)] = adopt

    def say(line: str) -> None:
        if "going on with the next trial" in line:
            drain.set()

    work(world, drain=drain, say=say)
    assert (1, 2) in disk.written
    assert folder_of(world, 9).load()["epoch"] == 77
    assert disk.told_too_early == []


def test_a_cancelled_trial_leaves_no_files_though_a_write_was_under_way(world, disk, at_step):
    make(world, **{**ONE, "lease": {"seconds": 1.0}, "budget": {"epochs": 200}})
    disk.hold(2)

    def cancel() -> None:
        disk.release()
        assert steering.cancel(world.database, "tiny", [0]) == [0]

    at_step[(3, 0)] = cancel
    work(world)
    assert len(disk.written) >= 2
    assert not folder_of(world).path.exists()
    assert read(world).trials[0].reason == "cancelled"

"""Checkpoints written by a thread: what they hold, who hears of their errors, and that none is lost or late."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, assert_same_weights, finish, start, tiny_config, tiny_images, without_timings
from torch import Tensor

from headsearch.core import checkpoint
from headsearch.core.checkpoint import (
    AsyncCheckpoints,
    CheckpointFolder,
    Checkpoints,
    decode,
    encode,
)
from headsearch.core.control import EveryEpoch, Verdict
from headsearch.core.learner import build_learner
from headsearch.core.pretrain import pretrain
from headsearch.core.state_snapshot import Snapshot
from headsearch.errors import StorageError, TrainingStopped, TrialFailure

IMAGES = tiny_images()
EPOCHS = 3
LONG = 60.0


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((50,), float(epoch)), "reports": [{"loss": 0.1}]}


class Gated(CheckpointFolder):
    """A folder on a slow disk: a write ends once `gate` is set. Notes what begins and ends, and where."""

    def __init__(self, path: Path, *, gate_open: bool = False) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        if gate_open:
            self.gate.set()
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.threads: list[threading.Thread] = []
        self.busy = threading.Lock()

    def save(self, state: Any) -> None:
        assert self.busy.acquire(blocking=False), "two writes at a time"
        try:
            self.threads.append(threading.current_thread())
            self.begun.append(state["epoch"])
            assert self.gate.wait(LONG)
            super().save(state)
            self.ended.append(state["epoch"])
        finally:
            self.busy.release()


class Slow(Gated):
    """Each write takes so many seconds more."""

    def __init__(self, path: Path, seconds: float = 0.3) -> None:
        super().__init__(path, gate_open=True)
        self.seconds = seconds

    def save(self, state: Any) -> None:
        time.sleep(self.seconds)
        super().save(state)


class Failing(CheckpointFolder):
    """The writes of these epochs fail."""

    def __init__(self, path: Path, error: BaseException, *epochs: int) -> None:
        super().__init__(path)
        self.error, self.epochs = error, epochs

    def save(self, state: Any) -> None:
        if state["epoch"] in self.epochs:
            raise self.error
        super().save(state)


def epoch_of(store: Checkpoints) -> int | None:
    found = store.peek()
    return None if found is None else int(found["epoch"])


def same(ours: Any, theirs: Any) -> bool:
    """Alike to the bit, containers with their kinds and attributes, tensors with their strides."""
    if type(ours) is not type(theirs) or vars_of(ours).keys() != vars_of(theirs).keys():
        return False
    if isinstance(ours, Tensor):
        return (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride()) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def vars_of(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert writers() == []
    assert threading.active_count() == before


def test_save_returns_while_the_write_is_under_way_and_flush_waits_for_it(tmp_path: Path) -> None:
    store = Gated(tmp_path / "one")
    kept = AsyncCheckpoints(store)
    kept.save(state(1))
    assert epoch_of(store) is None
    threading.Timer(0.2, store.gate.set).start()
    kept.flush()
    assert epoch_of(store) == 1
    assert [thread.name for thread in store.threads] == ["checkpoint"]


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_what_is_written_is_the_state_at_the_save_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    config = tiny_config(optimizer={"name": optimizer, "learning_rate": 0.01})
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    parameters = [*learner.encoder.parameters(), *learner.head.parameters()]
    for weight in parameters:
        weight.grad = torch.ones_like(weight)
    learner.optimizer.step()
    whole = {"epoch": 1, "position": None, **learner.state(), "reports": [{"epoch": 1, "loss": 0.5}]}
    expected = decode(b"".join(encode(whole)))
    assert expected is not None
    assert expected["encoder"]._metadata
    store = Gated(tmp_path / "one")
    kept = AsyncCheckpoints(store)
    kept.save(whole)
    learner.optimizer.step()  # weights, momenta, step counts
    for buffer in learner.encoder.buffers():
        buffer.zero_()
    for group in learner.optimizer.param_groups:
        group["lr"] = 7.0
    whole["reports"][0]["loss"] = 0.9
    whole["reports"].append({"epoch": 2})
    whole["epoch"] = 2
    store.gate.set()
    kept.flush()
    assert same(store.load(), expected)
    assert not same(learner.state(), {name: expected[name] for name in learner.state()})


def test_states_keep_their_order_and_are_written_one_at_a_time(tmp_path: Path) -> None:
    store = Slow(tmp_path / "one", 0.01)
    kept = AsyncCheckpoints(store)
    for epoch in range(1, 11):
        kept.save(state(epoch))
        assert len(writers()) <= 1
        assert len(store.ended) >= epoch - 1, "at most one is pending"
    found = kept.load()
    assert found is not None
    assert torch.equal(found["weights"], state(10)["weights"])
    assert store.ended == list(range(1, 11))
    assert len(list(store.path.iterdir())) == 2


@pytest.mark.parametrize("call", ["load", "peek"])
def test_reading_waits_for_the_write(tmp_path: Path, call: str) -> None:
    kept = AsyncCheckpoints(Slow(tmp_path / "one"))
    kept.save(state(1))
    assert getattr(kept, call)()["epoch"] == 1


def test_removal_after_a_save_leaves_no_files(tmp_path: Path) -> None:
    store = Slow(tmp_path / "one")
    kept = AsyncCheckpoints(store)
    kept.save(state(1))
    kept.remove()
    assert store.ended == [1]
    assert not store.path.exists()


def test_a_new_generation_is_not_that_of_the_write_under_way(tmp_path: Path) -> None:
    store = Slow(tmp_path / "one")
    kept = AsyncCheckpoints(store)
    kept.save(state(1))
    kept.generation = 2
    assert [path.name for path in store.path.iterdir()] == ["000001.checkpoint"]
    kept.save(state(2))
    kept.flush()
    assert kept.generation == 2
    assert sorted(path.name for path in store.path.iterdir()) == ["000001.checkpoint", "2000000.checkpoint"]


ERRORS = {
    "storage": (StorageError("checkpoint: cannot be written"), StorageError, "cannot be written"),
    "host memory": (MemoryError(), TrialFailure, "out of memory"),
    "cpu allocator": (RuntimeError("can't allocate memory: 9 bytes"), TrialFailure, "out of memory"),
    "gpu memory": (torch.OutOfMemoryError("CUDA out of memory"), TrialFailure, "out of memory"),
    "another": (ValueError("no such thing"), ValueError, "no such thing"),
    "an exit": (SystemExit("from a library"), SystemExit, "from a library"),
}


def set_generation(kept: AsyncCheckpoints) -> None:
    kept.generation = 1


CALLS: dict[str, Callable[[AsyncCheckpoints], object]] = {
    "save": lambda kept: kept.save(state(2)),
    "flush": AsyncCheckpoints.flush,
    "load": AsyncCheckpoints.load,
    "peek": AsyncCheckpoints.peek,
    "remove": AsyncCheckpoints.remove,
    "generation": set_generation,
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path, name: str, call: str) -> None:
    error, kind, message = ERRORS[name]
    kept = AsyncCheckpoints(Failing(tmp_path / "one", error, 1))
    kept.save(state(1))
    with pytest.raises(kind, match=message) as raised:
        CALLS[call](kept)
    assert getattr(raised.value, "reason", "out_of_memory") == "out_of_memory"
    assert kept.load() is None, "the state that came with the error was not taken"
    kept.save(state(3))
    assert epoch_of(kept) == 3


def test_removal_happens_though_the_last_write_failed(tmp_path: Path) -> None:
    kept = AsyncCheckpoints(Failing(tmp_path / "one", StorageError("full"), 2))
    kept.save(state(1))
    kept.save(state(2))
    with pytest.raises(StorageError, match="full"):
        kept.remove()
    assert not (tmp_path / "one").exists()


def test_without_memory_for_a_copy_the_state_itself_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Gated(tmp_path / "one", gate_open=True)
    kept = AsyncCheckpoints(store)
    clone, cloned = Tensor.clone, []

    def scarce(self: Tensor) -> Tensor:
        if len(cloned) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        cloned.append(self)
        return clone(self)

    monkeypatch.setattr(Tensor, "clone", scarce)
    kept.save(state(1) | {"more": torch.ones(3)})
    assert store.threads == [threading.main_thread()]
    assert epoch_of(store) == 1


def test_a_thread_that_cannot_be_started_is_an_error_and_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kept = AsyncCheckpoints(CheckpointFolder(tmp_path / "one"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            kept.save(state(1))
    kept.flush()
    kept.save(state(2))
    assert epoch_of(kept) == 2


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; notes in which thread it is copied."""

    done: list[tuple[str, str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return torch.device("cuda", 1)
        if func in (Tensor.clone, Tensor.cpu):
            note(func.__name__)
        found = super().__torch_function__(func, types, args, kwargs)
        return found.as_subclass(Tensor).clone() if func is Tensor.cpu else found


def note(what: str) -> None:
    OnGpu.done.append((what, threading.current_thread().name))


class FakeStream:
    """Has only what may be called: in particular, nothing that waits on the host."""

    def __init__(self, device: torch.device, name: str = "side") -> None:
        assert device == torch.device("cuda", 1)
        self.name = name

    def record_event(self) -> str:
        note(f"event on {self.name}")
        return "clones are made"

    def wait_event(self, event: str) -> None:
        note(f"{self.name} waits: {event}")

    def __enter__(self) -> None:
        note(f"onto {self.name}")

    def __exit__(self, *_: object) -> None:
        note(f"off {self.name}")


def test_on_a_gpu_copies_to_the_host_are_on_a_stream_that_waits_for_the_clones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnGpu, "done", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(device, "training"))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: side)
    kept = AsyncCheckpoints(CheckpointFolder(tmp_path / "one"))
    weights = torch.arange(4.0).as_subclass(OnGpu)
    kept.save({"epoch": 1, "weights": weights, "momenta": [weights], "on the host": torch.ones(2)})
    kept.flush()
    here, there = "MainThread", "checkpoint"
    assert OnGpu.done == [
        ("clone", here),
        ("clone", here),
        ("event on training", here),
        ("side waits: clones are made", there),
        ("onto side", there),
        ("cpu", there),
        ("cpu", there),
        ("off side", there),
    ]
    found = kept.load()
    assert found is not None
    assert found["momenta"][0].tolist() == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_no_step_changes_the_copy_and_neither_waits_for_the_other() -> None:
    device = torch.device("cuda")
    weights = torch.zeros(1 << 22, device=device)
    Snapshot.of({"weights": weights}).on_host()  # streams and memory are there
    cycles = 2_000_000_000  # about a second
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights.add_(1)
        snapshot = Snapshot.of({"weights": weights})
        torch.cuda._sleep(cycles)
        weights.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = snapshot.on_host()["weights"]
    assert not torch.cuda.current_stream(device).query(), "the copy did not wait for the steps after it"
    assert found.device == CPU
    assert torch.equal(found, torch.ones_like(found))
    # The clones' memory is given to later work, which changes nothing of what was copied.
    torch.full((1 << 22,), 9.0, device=device)
    torch.cuda.synchronize(device)
    assert torch.equal(found, torch.ones_like(found))
    assert torch.equal(weights.cpu(), torch.full((1 << 22,), 2.0))


class Asked(EveryEpoch):
    """Calls `at(number)` between steps; there are two questions an epoch, counted from 1."""

    def __init__(self, at: Callable[[int], Verdict | None]) -> None:
        self.at, self.asked = at, 0

    def at_step(self) -> Verdict:
        self.asked += 1
        return self.at(self.asked) or "go on"


def trained(store: Checkpoints, home: Path, at: Callable[[int], Verdict | None] = lambda _: None) -> Any:
    kept = AsyncCheckpoints(store)
    return pretrain(tiny_config(), IMAGES, device=CPU, home=home, checkpoints=kept, control=Asked(at))


def test_an_epoch_is_trained_while_the_checkpoint_of_the_one_before_is_written(tmp_path: Path) -> None:
    """A disk so slow that each write lasts until the next epoch is at its second step."""
    expected, whole = finish(start(tiny_config(), IMAGES, tmp_path))
    store = Gated(tmp_path / "one")
    seen = []

    def at(question: int) -> None:
        if question in (4, 6):
            seen.append((list(store.begun), list(store.ended)))
            store.gate.set()

    training, reports = trained(store, tmp_path, at), []
    for epoch in (1, 2, 3):
        reports.append(next(training))
        assert reports[-1].epoch == epoch
        if epoch < EPOCHS:
            store.gate.clear()
    with pytest.raises(StopIteration) as stop:
        next(training)
    assert seen[0] == ([1], []), "the report came, and two steps were made, before the checkpoint was"
    assert seen[1][0][-1] == 2
    assert store.ended == [1, 2, 3]
    assert without_timings(reports) == without_timings(expected)
    assert_same_weights(stop.value.value, whole)


def test_a_slow_disk_does_not_add_its_time_to_the_trainings(tmp_path: Path) -> None:
    step, write = 0.5, 0.95
    store = Slow(tmp_path / "one", write)
    began = time.monotonic()
    finish(trained(store, tmp_path, lambda _: time.sleep(step)))
    assert store.ended == [1, 2, 3]
    assert time.monotonic() - began < EPOCHS * (2 * step + write)


def ends(training: Any) -> None:
    finish(training)


def is_closed(training: Any) -> None:
    next(training)
    next(training)
    training.close()


def is_forgotten(training: Any) -> None:
    next(training)
    next(training)
    del training
    gc.collect()


def is_stopped(training: Any) -> None:
    with pytest.raises(TrainingStopped):
        finish(training)


def fails(training: Any) -> None:
    with pytest.raises(TrialFailure, match="too long"):
        finish(training)


def is_interrupted(training: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        finish(training)


def fail(question: int) -> None:
    if question == 5:
        raise TrialFailure("epoch_time", "too long")


def interrupt(question: int) -> None:
    if question == 5:
        raise KeyboardInterrupt


HOW: dict[str, tuple[Any, Any, list[int]]] = {
    "ends": (ends, lambda _: None, [1, 2, 3]),
    "is closed": (is_closed, lambda _: None, [1, 2]),
    "is forgotten": (is_forgotten, lambda _: None, [1, 2]),
    "is stopped": (is_stopped, lambda question: "stop" if question == 5 else None, [1, 2, 2]),
    "fails": (fails, fail, [1, 2]),
    "is interrupted": (is_interrupted, interrupt, [1, 2]),
}


@pytest.mark.parametrize("name", HOW)
def test_however_a_training_ends_its_last_write_is_done_then(tmp_path: Path, name: str) -> None:
    how, at, expected = HOW[name]
    store = Slow(tmp_path / "one")
    how(trained(store, tmp_path, at))
    assert store.begun == store.ended == expected
    assert writers() == []
    found = store.load()
    assert found is not None
    assert found["epoch"] == expected[-1]
    reports, kept = finish(trained(CheckpointFolder(tmp_path / "one"), tmp_path))
    undisturbed, whole = finish(start(tiny_config(), IMAGES, tmp_path))
    assert without_timings(reports) == without_timings(undisturbed)
    assert_same_weights(kept, whole)


def test_an_error_of_a_write_ends_the_training_at_the_next_one(tmp_path: Path) -> None:
    training = trained(Failing(tmp_path / "one", StorageError("disk full"), 1), tmp_path)
    assert next(training).epoch == 1
    with pytest.raises(StorageError, match="disk full"):
        next(training)


def test_memory_that_a_write_lacks_fails_the_trial(tmp_path: Path) -> None:
    training = trained(Failing(tmp_path / "one", MemoryError(), 2), tmp_path)
    with pytest.raises(TrialFailure, match="out of memory") as failure:
        finish(training)
    assert failure.value.reason == "out_of_memory"


def test_an_error_of_the_last_write_is_raised_at_the_end(tmp_path: Path) -> None:
    training = trained(Failing(tmp_path / "one", StorageError("disk full"), 3), tmp_path)
    assert [next(training).epoch for _ in range(EPOCHS)] == [1, 2, 3]
    with pytest.raises(StorageError, match="disk full"):
        next(training)


def test_an_error_of_the_last_write_is_raised_by_close(tmp_path: Path) -> None:
    training = trained(Failing(tmp_path / "one", StorageError("disk full"), 1), tmp_path)
    next(training)
    with pytest.raises(StorageError, match="disk full"):
        training.close()


def test_a_training_is_not_stopped_before_its_checkpoint_is_written(tmp_path: Path) -> None:
    training = trained(Failing(tmp_path / "one", StorageError("disk full"), 0), tmp_path, lambda _: "stop")
    with pytest.raises(StorageError, match="disk full"):
        next(training)


def test_what_ended_the_training_comes_before_an_error_of_the_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = trained(Failing(tmp_path / "one", StorageError("disk full"), 2), tmp_path, fail)
    with caplog.at_level(logging.WARNING), pytest.raises(TrialFailure, match="too long"):
        finish(training)
    assert [record.message for record in caplog.records] == ["the last checkpoint was not written: disk full"]


def test_no_thread_is_left_over_many_trainings(tmp_path: Path) -> None:
    before = threading.active_count()
    for number in range(5):
        finish(trained(CheckpointFolder(tmp_path / str(number)), tmp_path))
        assert threading.active_count() == before


MOMENTS = {
    "the state is copied": False,
    "half of the file is written": False,
    "the file is written": False,
    "the file has its name": True,
    "older files are gone": True,
}
"""When the process is killed, and whether the checkpoint is there afterwards."""


def die(moment: str, number: int, path: Path, home: Path, threads: int) -> None:
    """Train; be killed in write `number`, while the main thread is at the second step of the next epoch."""
    torch.set_num_threads(threads)
    trained_on = threading.Event()
    writes = 0

    def at(question: int) -> None:
        if question == 2 * number + 1:
            trained_on.set()

    def now(here: str) -> None:
        if here == moment and writes == number and threading.current_thread().name == "checkpoint":
            assert trained_on.wait(LONG)
            os.kill(os.getpid(), signal.SIGKILL)

    coded, fsync, sync_folder, save = encode, os.fsync, checkpoint.sync_folder, CheckpointFolder.save

    def encoded(state: Any) -> Any:
        now("the state is copied")
        return coded(state)

    def synced(descriptor: int) -> None:
        if moment == "half of the file is written" and writes == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        now("half of the file is written")
        fsync(descriptor)
        now("the file is written")

    def folder_synced(folder: Path) -> None:
        now("the file has its name")
        sync_folder(folder)

    def saved(self: CheckpointFolder, state: Any) -> None:
        nonlocal writes
        writes += 1
        save(self, state)
        now("older files are gone")

    checkpoint.encode, checkpoint.sync_folder, CheckpointFolder.save = encoded, folder_synced, saved
    os.fsync = synced
    finish(trained(CheckpointFolder(path), home, at))


@pytest.mark.hostile
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_during_a_write_it_goes_on_as_if_it_had_not_been(
    tmp_path: Path, moment: str, number: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headsearch.core.pretrain"])
    path = tmp_path / "one"
    victim = context.Process(target=die, args=(moment, number, path, tmp_path, torch.get_num_threads()))
    victim.start()
    victim.join(2 * LONG)
    assert victim.exitcode == -signal.SIGKILL
    folder = CheckpointFolder(path)
    there = number if MOMENTS[moment] else number - 1
    assert epoch_of(folder) == (there or None)
    partial = list(path.glob(".*.partial"))
    assert bool(partial) == (moment in ("half of the file is written", "the file is written"))
    expected, whole = finish(start(tiny_config(), IMAGES, tmp_path))
    resumed, kept = finish(trained(folder, tmp_path))
    assert without_timings(resumed) == without_timings(expected)
    assert_same_weights(kept, whole)
    assert list(path.glob(".*.partial")) == []

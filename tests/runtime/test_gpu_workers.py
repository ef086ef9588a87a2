"""Real workers with a fake nvidia-smi: what they do with this machine's torch, and with one that has CUDA.

Without CUDA in torch, `pretended/sitecustomize.py` lets the CPU pass for the leased GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from embedded import wait_until
from fake_nvidia import FakeGpu, FakeNvidia, gpus

from headsearch.runtime.gpulocks import holders, take
from headsearch.runtime.gpus import listing
from headsearch.runtime.launcher import LocalWorkers
from headsearch.runtime.running import Crew, run_study
from headsearch.runtime.session import open_session
from headsearch.search import snapshot, studies
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]

LIMIT = 200.0
TINY = {
    "name": "tiny",
    "budget": {"trials": 4, "epochs": 3, "rungs": [1]},
    "lease": {"seconds": 5.0, "max_attempts": 100},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
    },
    "space": {"head.kind": ["linear"], "head.projection_dim": [2, 4, 8, 16, 32, 64]},
}
HERE = Path(__file__).resolve().parent


@pytest.fixture
def locks(tmp_path):
    folder = tmp_path / "locks"
    folder.mkdir()
    return folder


@pytest.fixture
def fake(tmp_path):
    return FakeNvidia(tmp_path)


@pytest.fixture
def world(headsearch_home, database_url, monkeypatch, fake, locks):
    """Home folder, database and a study, for us and for the processes we start."""
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(locks))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    for name in ("HEADSEARCH_GPU_SLOTS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with open_session() as session:
        studies.create(session.database, StudySpec.model_validate(TINY))
        yield session


@pytest.fixture
def pretended(monkeypatch):
    """Processes started from here on take the CPU for their GPU."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HERE / "pretended"), str(HERE.parents[1]))))


@pytest.fixture
def start(tmp_path):
    """Starts ``headsearch worker`` as users do; all are gone after the test."""
    started = []

    def starting(*options, study="tiny"):
        log = tmp_path / f"worker-{len(started)}.log"
        command = [sys.executable, "-m", "headsearch", "worker", "--study", study, "--threads", "1", *options]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        process.log = log
        started.append(process)
        return process

    yield starting
    for process in started:
        process.kill()
        process.wait()


def said(process):
    return process.log.read_text()


def read(session):
    return snapshot.read(session.database, "tiny")


def without_cuda():
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch uses the GPU here")


def test_auto_goes_to_the_cpu_where_torch_has_no_cuda(world, fake, locks, start):
    without_cuda()
    fake.show(gpus(2))
    worker = start("--device", "auto", "--count", "1")
    assert worker.wait(LIMIT) == 0, said(worker)
    lines = said(worker).splitlines()
    assert lines[0] == f"lease of NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}"
    assert lines[1].startswith("torch ")
    assert lines[1].endswith(
        f", though nvidia-smi lists NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}; training on the CPU"
    )
    assert " on cpu of " in lines[2]
    assert lines[-1] == "1 trials ended, 0 of them failed"
    devices = {trial.device for trial in read(world).trials}
    assert len(devices) == 1
    assert devices.pop().startswith("cpu of ")


def test_cuda_is_refused_in_one_line_where_torch_has_none(world, fake, locks, start):
    without_cuda()
    fake.show(gpus(1))
    for device in ("cuda", "cuda:0"):
        worker = start("--device", device)
        assert worker.wait(LIMIT) == 2
        lease, line = said(worker).splitlines()
        assert lease.startswith("lease of ")
        assert line.startswith(f"error: device: {device}: torch ")
        assert line.endswith("install a torch built for your driver's CUDA: https://pytorch.org/get-started")
    assert holders(listing().gpus[0], 1, locks) == [None]
    assert read(world).trials == ()


def test_wrong_input_is_one_line_and_exit_code_2(world, fake, start, monkeypatch):
    fake.show(gpus(1))
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "many")
    worker = start()
    assert worker.wait(LIMIT) == 2
    assert said(worker) == "error: HEADSEARCH_GPU_SLOTS: 'many' is not a whole number from 1 to 32\n"
    monkeypatch.delenv("HEADSEARCH_GPU_SLOTS")
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", "locks")
    worker = start()
    assert worker.wait(LIMIT) == 2
    assert said(worker).count("\n") == 1
    assert said(worker).startswith("error: HEADSEARCH_GPU_LOCKS: ")


def test_waiting_for_a_gpu_and_leaving_it_alone(world, fake, locks, start):
    """A signal, a study that is not there, one that has ended: none waits for the GPU."""
    fake.show(gpus(1))
    lease = take(listing().gpus, 1, locks)
    lease.sign("lab-3:77:abc")
    try:
        worker = start("--device", "cuda")
        line = f"waiting for a GPU: NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}, all taken by lab-3:77:abc\n"
        wait_until(lambda: said(worker) == line, LIMIT)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(LIMIT) == 0
        left = "left without a GPU\n0 trials ended, 0 of them failed\n"
        assert said(worker) == f"{line}SIGTERM: leaving; again to abort\n{left}"
        worker = start("--device", "cuda", study="tinny")
        assert worker.wait(LIMIT) == 2
        assert "error: " in said(worker)
        assert "tinny" in said(worker)
        with world.database.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE headsearch.studies SET state = 'cancelled', completed_at = clock_timestamp()"
            )
        worker = start("--device", "cuda")
        assert worker.wait(LIMIT) == 0
        assert "study tiny has ended: nothing left to train\nleft without a GPU" in said(worker)
    finally:
        lease.release()


def test_leases_are_seen_in_status_trials_and_optuna(world, fake, locks, start, pretended):
    """Three workers, two GPUs: the third waits, takes over from one that is killed, and the study is done."""
    fake.show(gpus(2))
    workers = [start("--device", "cuda") for _ in range(3)]
    wait_until(lambda: sum(" on cpu of " in said(worker) for worker in workers) == 2, LIMIT)
    wait_until(lambda: sum("waiting for a GPU: 2 GPUs" in said(worker) for worker in workers) == 1, LIMIT)
    working = [worker for worker in workers if " on cpu of " in said(worker)]
    (waiting,) = (worker for worker in workers if worker not in working)
    shown = {gpu.uuid for gpu in gpus(2)}
    now = {row.worker_id: row for row in read(world).workers}
    assert len(now) == 2
    for uuid in shown:
        (row,) = (row for row in now.values() if uuid in row.device)
        (who,) = holders(next(gpu for gpu in listing().gpus if gpu.uuid == uuid), 1, locks)
        assert (str(who), who.host, who.pid) == (row.worker_id, row.host, row.pid)
    for form in ([], ["--json"]):
        command = [sys.executable, "-m", "headsearch", "study", "status", "tiny", *form]
        shows = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert all(uuid in shows for uuid in shown), shows
    killed = working[0]
    killed.kill()
    wait_until(lambda: "lease of" in said(waiting), LIMIT)
    for worker in (waiting, working[1]):
        assert worker.wait(LIMIT) == 0, said(worker)
    seen = read(world)
    assert seen.study.state == "complete"
    host = os.uname().nodename
    trials = optuna.load_study(study_name="tiny", storage=world.database.url).trials
    assert len(trials) == 4
    for trial, row in zip(trials, seen.trials, strict=True):
        attributes = trial.user_attrs
        assert attributes["device"] == row.device
        assert sum(uuid in row.device for uuid in shown) == 1, row.device
        assert attributes["host"] == host


def test_a_poisoned_worker_ends_and_the_launcher_starts_a_clean_one_with_a_lease(
    world, fake, locks, pretended, monkeypatch, tmp_path
):
    without_cuda()
    fake.show(gpus(1))
    poison = tmp_path / "poison"
    poison.touch()
    monkeypatch.setenv("PRETENDED_POISON", str(poison))
    with LocalWorkers("tiny", 1, threads=1, home=world.home) as workers:
        wait_until(lambda: workers.alive == 0, LIMIT)
        (died,) = workers.poll()
        assert died.returncode == 1
        assert died.restarted
        wait_until(lambda: read(world).study.state == "complete", LIMIT)
        wait_until(lambda: workers.alive == 0, LIMIT)
        assert [exited.returncode for exited in workers.poll()] == [0]
    log = workers.log(0).read_text()
    assert log.count(f"lease of NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}") == 2
    assert "this worker ends, start it again" in log
    assert f"on cuda:0 poisoned {FakeGpu(0).uuid}" in log
    seen = read(world)
    assert [trial.losses for trial in seen.trials].count(1) == 1
    assert {trial.state for trial in seen.trials} <= {"complete", "pruned"}


def test_a_run_says_that_its_workers_wait_for_gpus_of_others(world, fake, locks, pretended, monkeypatch):
    monkeypatch.setattr("headsearch.core.device.cuda_problem", lambda: None)
    fake.show(gpus(1))
    lease = take(listing().gpus, 1, locks)
    lease.sign("lab-3:77:abc")
    notes = []

    class Notes:
        def start(self, snapshot, note):
            notes.append(note)

        def update(self, snapshot):
            pass

        def note(self, line):
            notes.append(line)
            lease.release()

    try:
        result = run_study(world, studies.get(world.database, "tiny"), Crew(workers=2), Notes())
    finally:
        lease.release()
    assert result.snapshot.study.state == "complete"
    assert notes[0].startswith(
        "2 workers, device auto (1 wait: the GPUs here take 1 at a time, see HEADSEARCH_"
    )
    assert notes[1:] == [
        f"worker 0 is waiting for a GPU: NVIDIA A100-SXM4-40GB {FakeGpu(0).uuid}, all taken by lab-3:77:abc"
    ]

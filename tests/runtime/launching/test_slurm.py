"""Workers on a real Slurm: a job array to the end of its study, a requeue in the middle, a time limit.

One node is enough, and its database may be on it. Nothing here waits for a time, only for what should happen.
"""

from __future__ import annotations

import fcntl
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import Command
from slurm_cluster import launch, slurm
from test_worker import read, wait_for

from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify

pytestmark = [
    pytest.mark.slurm, pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile, pytest.mark.timeout(2400),
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[3]
STUDY = """
name = "{name}"
mode = "points"
points = [{{ "head.projection_dim" = 2 }}, {{ "head.projection_dim" = 4 }}, {{ "head.projection_dim" = 8 }}]
seeds = {seeds}
budget.epochs = {epochs}
worker.drain_seconds = {drain_seconds}
[base]
data = {{ name = "digits", limit = 200 }}
encoder.width = 4
training = {{ batch_size = 64, precision = "fp32" }}
probe = {{ report_images = 200, report_iterations = 5, iterations = 20, penalties = [1e-2] }}
"""


@pytest.fixture(autouse=True)
def one_test_at_a_time():
    """The cluster may be one small node: tasks of two tests would wait for each other's CPUs."""
    with (Path(tempfile.gettempdir()) / "headsearch-tests-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def start(headsearch_home, monkeypatch, tmp_path):
    """Launches studies on Slurm; their jobs are cancelled and gone before the database is."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir("/")
    jobs = []

    def begin(name, *options, epochs=4, seeds=(0, 1), drain_seconds=10):
        file = tmp_path / f"{name}.toml"
        file.write_text(
            STUDY.format(name=name, epochs=epochs, seeds=list(seeds), drain_seconds=drain_seconds)
        )
        jobs.append(launch(headsearch_home, file, *options))
        return jobs[-1]

    yield begin
    for job in jobs:
        subprocess.run(["scancel", job.number], check=False)
    for job in jobs:
        wait_for(lambda job=job: job.active == [], 120)


BEGUN = "Starting with JobEnvironment"
"""submitit's first words, at each start of a task."""


@pytest.fixture
def url_in_a_file(database_url, headsearch_home, tmp_path, monkeypatch):
    """The database of this test, whose URL with its password is in a file; returns the password."""
    file = tmp_path / "url"
    file.touch(0o600)
    file.write_text(database_url.replace("postgresql+psycopg2", "postgresql"))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(file))
    return unquote(urlsplit(database_url).password)


def test_a_job_array_works_a_study_off_on_the_embedded_server(headsearch_home, start):
    server = Command("db", "start")
    said, _ = server.communicate(timeout=120)
    assert server.returncode == 0, said
    try:
        job = start("digits", "--workers", "4", "--gpus", "1", "--memory-gb", "1", seeds=(0, 1, 2, 3))
        assert any("--array=0-3" in line and "--gres=gpu:1" in line for line in job.said)
        wait_for(lambda: job.active == [], 600)
        assert [job.field(task, "JobState") for task in range(4)] == ["COMPLETED"] * 4, job.log(0)
        assert "gpu" in job.field(0, "TresPerNode")
        with open_session() as session:
            seen = read(session, "digits")
            assert (seen.study.state, seen.counts, seen.workers) == ("complete", {"complete": 12}, ())
            assert verify(session, "digits").clean
        trained = [job.log(task).count(" new at epoch 0") for task in range(4)]
        assert sum(trained) == 12
        assert len([count for count in trained if count]) >= 2, "two tasks run at a time"
    finally:
        Command("db", "stop", "--force").communicate(timeout=120)


def test_a_requeued_task_gives_its_trial_back_and_another_finishes_it(url_in_a_file, start):
    job = start("requeued", "--workers", "3", epochs=150, seeds=(0,))
    wait_for(lambda: " epoch 2/150" in job.log(0), 300)
    slurm("scontrol", "requeue", f"{job.number}_0")
    wait_for(lambda: " given back" in job.log(0), 120)
    log = job.log(0)
    assert "SIGTERM: finishing this epoch" in log or "SIGUSR2: finishing this epoch" in log
    number = int(log.split(" given back")[0].split("trial ")[-1])
    with open_session() as session:
        wait_for(lambda: read(session, "requeued").study.state == "complete", 600)
        seen = read(session, "requeued")
        assert seen.counts == {"complete": 3}
        trial = next(trial for trial in seen.trials if trial.number == number)
        assert (trial.losses, trial.attempt) == (0, 2), "given back is not lost"
        assert verify(session, "requeued").clean
    assert job.field(0, "Restarts") == "1"
    for file in job.logs.iterdir():
        assert url_in_a_file.encode() not in file.read_bytes(), file


def test_a_task_that_nears_its_limit_drains_and_is_requeued(url_in_a_file, start):
    """The limit is two minutes, and the notice comes a minute ahead of it, or as early as Slurm likes."""
    job = start("limited", "--workers", "2", "--minutes", "2", epochs=20_000, seeds=(0,), drain_seconds=0)
    wait_for(lambda: "SIGUSR2: finishing this epoch" in job.log(1), 300)
    wait_for(lambda: job.field(1, "Restarts") == "1", 120)
    assert " given back" in job.log(1)
    # It comes back by itself, and takes a trial up where it was. (Slurm may end the task before it has said
    # that it asked for that.)
    wait_for(lambda: any(" adopted at epoch " in said for said in job.log(1).split(BEGUN)[2:]), 400)
    assert job.field(1, "JobState") == "RUNNING"
    with open_session() as session:
        assert all(trial.losses == 0 for trial in read(session, "limited").trials)


def test_a_cancelled_job_gives_its_trials_back(url_in_a_file, start):
    job = start("cancelled", "--workers", "1", epochs=20_000, seeds=(0,))
    log = job.logs / f"{job.number}_0_log.out"
    wait_for(lambda: log.exists() and " epoch 2/" in log.read_text(), 300)
    slurm("scancel", job.number)
    wait_for(lambda: job.active == [], 120)
    with open_session() as session:
        (trial,) = [trial for trial in read(session, "cancelled").trials if trial.epoch]
        assert (trial.state, trial.losses) == ("orphaned", 0)
        assert read(session, "cancelled").workers == ()
    assert " given back" in log.read_text()

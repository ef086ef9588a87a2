"""Workers in the background: real processes that finish a study after the command that started them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from processes import Command
from test_worker import TINY, read, wait_for, world

from headsearch.cli.app import run
from headsearch.runtime.verifying import verify
from headsearch.search import studies
from headsearch.spec import StudySpec

__all__ = ["world"]
pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]
STUDY = """
name = "here"
[budget]
trials = 4
epochs = {epochs}
[base]
data = {{ name = "digits", limit = 200 }}
encoder.width = 4
training = {{ batch_size = 64, precision = "fp32" }}
probe = {{ report_images = 200, report_iterations = 5, iterations = 20, penalties = [1e-2] }}
[space]
head.projection_dim = [2, 4, 8, 16]
"""


@pytest.fixture
def begin(tmp_path):
    """``headsearch launch ... --on local``; what it started does not outlive the test."""
    started: list[int] = []

    def launch(*words: str, epochs: int = 3) -> tuple[list[int], str]:
        file = tmp_path / "here.toml"
        file.write_text(STUDY.format(epochs=epochs))
        words = tuple(str(file) if word == "FILE" else word for word in words)
        command = Command("launch", *words, "--on", "local", "--threads", "1")
        said, _ = command.communicate(timeout=120)
        assert command.returncode == 0, said
        pids = [int(pid) for pid in re.findall(r"^worker process (\d+), log ", said, re.MULTILINE)]
        started.extend(pids)
        return pids, said

    yield launch
    for pid in started:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ends while we look
            for child in psutil.Process(pid).children(recursive=True):
                child.kill()
            os.kill(pid, signal.SIGKILL)


def gone(pids):
    def is_gone(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() == "zombie"
        return True

    return all(map(is_gone, pids))


def test_they_finish_the_study_of_a_file(world, begin):
    pids, said = begin("FILE", "--workers", "2")
    assert len(pids) == 2
    assert "study      here, is made from" in said
    assert f"stop them: kill {pids[0]} {pids[1]}" in said
    wait_for(lambda: read(world, "here").study.state == "complete", 250)
    wait_for(lambda: gone(pids), 60)
    assert read(world, "here").counts == {"complete": 4}
    assert verify(world, "here").clean
    logs = [Path(log) for log in re.findall(r", log (\S+)", said)]
    assert all("study here has ended" in log.read_text() for log in logs)
    again, said = begin("here", "--workers", "2")
    assert again == []
    assert "study here is complete: nothing to train, no worker is started" in said


def test_one_that_dies_is_started_again_and_a_signal_drains_them(world, begin):
    pids, said = begin("FILE", "--workers", "2", epochs=20_000)
    wait_for(lambda: [trial.epoch >= 2 for trial in read(world, "here").trials] == [True, True])
    victim = psutil.Process(pids[0]).children()[0]
    victim.kill()
    log = Path(re.findall(r", log (\S+)", said)[0])
    wait_for(lambda: "worker died (killed by signal 9), started again" in log.read_text())
    wait_for(lambda: " new at epoch 0" in log.read_text().split("started again")[1])
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: gone(pids), 120)
    logs = [Path(log).read_text() for log in re.findall(r", log (\S+)", said)]
    assert ["SIGUSR2: finishing this epoch" in log and " given back" in log for log in logs] == [True, True]
    # The victim's trial waits for its lease to run out; the others were given back at once.
    assert sorted(trial.losses for trial in read(world, "here").trials)[:2] == [0, 0]
    assert len([trial for trial in read(world, "here").trials if trial.state == "orphaned"]) >= 2


def test_a_study_in_the_database_is_taken_as_it_is(world, begin):
    spec = StudySpec.model_validate({**TINY, "name": "quickstart", "budget": {"trials": 2, "epochs": 1}})
    studies.create(world.database, spec)
    _, said = begin("quickstart", "--workers", "1")
    assert "quickstart, is in the database" in said
    wait_for(lambda: read(world, "quickstart").study.state == "complete", 120)
    assert len(read(world, "quickstart").trials) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nothing", "--on", "local"], ["nothing", "neither a study in the database nor a study file", "quickstart"]),
        (["nothing.toml", "--on", "local"], ["nothing.toml"]),
        (["quickstart", "--on", "cluster"], ["--on", "'cluster'", "local, slurm or kubernetes"]),
        (["quickstart", "--on", "local", "--image", "x"], ["--image", "kubernetes"]),
        (["quickstart", "--on", "local", "--cpus", "2"], ["--cpus", "slurm or kubernetes"]),
        (["quickstart", "--on", "local", "--slurm", "qos=high"], ["--slurm", "only with --on slurm"]),
        (["quickstart", "--on", "local", "--device", "tpu"], ["device", "tpu"]),
        (["quickstart", "--on", "local", "--set", "budget.trials=x"], ["budget.trials"]),
        (["quickstart", "--on", "local", "--workers", "0"], ["--workers"]),
        (["quickstart"], ["--on"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_starts_nothing(words, parts, world, capsys):
    assert run(["launch", *words]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1
    assert [part for part in parts if part not in said.err] == []
    assert studies.all_studies(world.database) == []
    assert not (world.home / "logs").exists()

"""Studies run for real: processes, database, training."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest

from headsearch.report.summary import study_json
from headsearch.runtime.session import open_session
from headsearch.search.snapshot import read

# One thread: two on a machine whose cores are busy wait for each other.
CPU = ("--device", "cpu", "--threads", "1")

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

STUDY = """
name = "tiny"
[budget]
trials = 4
epochs = 3
rungs = [1]
[base]
data = { name = "digits", limit = 200 }
encoder.width = 4
training = { batch_size = 64, precision = "fp32" }
probe = { report_images = 200, report_iterations = 5, iterations = 20, penalties = [1e-2] }
[space]
"head.kind" = ["linear"]
"head.projection_dim" = [2, 4, 8, 16]
"""


class World:
    """Commands on one home folder and one database."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.study = folder / "tiny.toml"
        self.study.write_text(STUDY)

    def start(self, *words: str, stdout: int | IO[Any] = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "headsearch", *words],
            env=self.environment, cwd=self.folder, stdout=stdout, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], code: int = 0) -> str:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == code, (out, errors)
        assert errors == ""
        return out or ""

    def show(self) -> dict[str, Any]:
        """`study show --json`, without a process."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("HEADSEARCH_DATABASE_URL", self.environment["HEADSEARCH_DATABASE_URL"])
            with open_session() as session:
                return study_json(read(session.database, "tiny"))

    def command(self, *words: str, code: int = 0) -> str:
        return self.end(self.start(*words), code)


@pytest.fixture
def world(tmp_path: Path, database_url: str, subprocess_env: dict[str, str]) -> World:
    extra = {"HEADSEARCH_DATABASE_URL": database_url, "OMP_NUM_THREADS": "1"}
    return World(tmp_path, subprocess_env | extra)


def test_a_run_ends_with_a_front_and_can_be_repeated_and_reproduced(world: World) -> None:
    out = world.command("run", "tiny.toml", "--workers", "2", *CPU)
    lines = out.splitlines()
    assert sum(" began: " in line for line in lines) == 4
    # a trial may be over between two looks, so that not every epoch has a line of its own
    assert any(" complete: accuracy" in line for line in lines)
    assert "\x1b" not in out
    again = world.command("run", "tiny.toml")
    assert again.startswith("study tiny is complete: nothing to train\n")
    assert [line for line in again.splitlines() if line.startswith("4 trials: ")]
    shown = world.show()
    assert shown["state"] == "complete"
    assert sum(shown["counts"].values()) == 4
    assert shown["workers"] == []

    (command,) = [line.split(": ", 1)[1] for line in lines if line.startswith("train it again: ")]
    point = json.loads(world.command(*shlex.split(command)[1:], "--json"))
    best = max((t for t in shown["trials"] if t["state"] == "complete"), key=lambda t: t["probe_accuracy"])
    # The same trial without a database, in another process, gives the same numbers.
    assert point["validation_accuracy"] == best["probe_accuracy"]
    assert point["test_accuracy"] == best["test_accuracy"]
    assert point["reports"][-1]["loss"] == best["loss"]
    assert point["config"]["head"]["projection_dim"] == best["projection_dim"]


def test_a_signal_drains_and_the_same_command_goes_on(world: World) -> None:
    process = world.start("run", "tiny.toml", "--workers", "1", *CPU, "--set", "budget.epochs=60")
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch " in line and "trial" in line:
            break
    process.send_signal(signal.SIGTERM)
    out = world.end(process, code=130)
    assert "finishing this epoch" in out
    assert "interrupted: the same command goes on from here" in out
    shown = world.show()
    assert shown["counts"]["running"] == 0
    epochs = shown["epochs_trained"]
    assert epochs >= 1

    out = world.command("run", "tiny.toml", "--workers", "1", *CPU, "--set", "budget.epochs=60")
    assert "resumed: " in out
    shown = world.show()
    assert shown["state"] == "complete"
    assert shown["epochs_trained"] > epochs
    assert sum(shown["counts"].values()) == 4


def test_a_terminal_gets_a_table(world: World) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        process = world.start("run", "tiny.toml", "--workers", "1", *CPU, stdout=terminal)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    world.end(process)
    assert b"\x1b[" in seen
    assert b"progress" in seen
    assert b"train it again: " in seen
    assert b" began: " not in seen


def test_failed_trials_are_told_in_json_and_make_the_exit_code_1(world: World) -> None:
    diverging = ("optimizer.learning_rate=9999.0", "optimizer.momentum=0.99", "optimizer.weight_decay=1000.0")
    overrides = [word for given in diverging for word in ("--set", given)]
    process = world.start("run", "tiny.toml", "--workers", "1", *CPU, "--json", *overrides)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    data = json.loads(out)
    assert (data["study"], data["state"], data["counts"]["failed"]) == ("tiny", "complete", 4)
    assert data["failures"][0].startswith("non_finite_loss: trials 0, 1, 2, 3: epoch ")
    assert (data["front"], data["best"]) == ([], None)
    assert "trial 3 failed (non_finite_loss): epoch " in errors


def test_a_worker_that_dies_is_reported_with_its_log_and_replaced(world: World) -> None:
    process = world.start(
        "run", "tiny.toml", "--workers", "1", *CPU, "--set", "lease.seconds=1.0", "--set", "budget.epochs=60"
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "epoch " in line:
            break
    shown = world.show()
    os.kill(shown["workers"][0]["pid"], signal.SIGKILL)
    out = world.end(process)
    (died,) = [line for line in out.splitlines() if line.startswith("worker 0 died")]
    assert "killed by signal 9), started again" in died
    assert "worker-0.log" in died
    assert sum(world.show()["counts"].values()) == 4


def test_an_untrained_encoder_is_measured_without_a_database(world: World) -> None:
    del world.environment["HEADSEARCH_DATABASE_URL"]
    point = json.loads(world.command("train", "tiny.toml", "--set", "training.epochs=0", *CPU, "--json"))
    assert point["reports"] == []
    assert 0.1 < point["validation_accuracy"] <= 1.0
    out = world.command("train", "tiny.toml", "--set", "head.projection_dim=16", "--seed", "3", *CPU)
    labels = [line.split(":")[0] for line in out.splitlines()]
    assert float(labels.pop(5).removeprefix("penalty ")) > 0
    assert labels == [
        "epoch 1/3", "epoch 2/3", "epoch 3/3", "head linear",
        "linear probe, protocol holdout", "last report",
    ]  # fmt: skip
    assert "projection dim 16" in out
    assert not (Path(world.environment["HEADSEARCH_HOME"]) / "postgres").exists()


def test_a_front_is_confirmed_on_the_training_split_and_on_all_images(world: World) -> None:
    fewer = ("--set", "budget.epochs=2", "--set", "head.projection_dim=[2, 8]", "--set", "budget.trials=2")
    world.command("run", "tiny.toml", *CPU, "--workers", "1", *fewer)
    confirm = ("study", "confirm", "tiny", "--seeds", "2", "--workers", "1", *CPU)
    world.command(*confirm)
    out = world.command(*confirm, "--all-images")
    lines = out.splitlines()
    assert "trained on training and validation images together" in lines
    assert "200 training, 143 validation, 359 test images, no unlabelled" in lines
    assert "seen validation: images that the encoder was trained on, without their labels" in lines
    shown = lines[lines.index("the same points, by what they were trained on:") :]
    assert max(map(len, shown)) <= 80
    trained = [line.split()[1] for line in shown if line.split()[2:3] in (["search"], ["fresh"])]
    assert trained
    assert trained == ["training", "training", "training+validation"] * (len(trained) // 3)
    again = world.command(*confirm, "--all-images")
    assert again.splitlines()[-len(shown) :] == shown

    name = "tiny-confirm-2-all-images"
    found = json.loads(world.command("study", "show", name, "--json"))
    assert found["trained_on"] == "training+validation"
    assert {trial["facts"]["train_images"] for trial in found["trials"]} == {343}
    assert {trial["facts"]["trained_on"] for trial in found["trials"]} == {"training+validation"}
    (theirs,) = {trial["facts"]["data_fingerprint"] for trial in found["trials"]}
    ours = [t["facts"]["data_fingerprint"] for t in world.show()["trials"] if t["state"] == "complete"]
    assert set(ours) == {theirs}
    # The trial alone, in another process, gives the same numbers.
    first = found["trials"][0]
    point = json.loads(
        world.command(
            "train",
            "tiny.toml",
            *CPU,
            "--json",
            "--seed",
            str(first["seed"]),
            "--set",
            "training.epochs=2",
            "--set",
            f"head.projection_dim={first['projection_dim']}",
            "--set",
            "data.train_on=training+validation",
        )
    )
    assert point["trained_on"] == "training+validation"
    assert point["validation_accuracy"] == first["probe_accuracy"]
    assert point["test_accuracy"] == first["test_accuracy"]

    assert world.command("study", "verify", name).startswith(f"study {name} is clean")
    refused = world.start("study", "compare", "tiny", name)
    _, line = refused.communicate(timeout=240)
    assert refused.returncode == 2
    assert "data.train_on is training in tiny, training+validation in " in line
    assert "training+validation" in world.command("study", "compare", "tiny", name, "--across", "train_on")


def test_the_dashboard_prints_the_page_of_its_study(world: World) -> None:
    import urllib.request

    world.command("study", "create", "tiny.toml", "--no-check")
    process = world.start("dashboard", "tiny", "--port", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    url = line.split()[2]
    assert url.startswith("http://127.0.0.1:")
    assert "/dashboard/studies/" in url
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    world.end(process)


def test_the_embedded_server_is_started_told_and_stopped(world: World) -> None:
    del world.environment["HEADSEARCH_DATABASE_URL"]
    assert "not running" in world.command("db", "status")
    started = json.loads(world.command("db", "start", "--json"))
    try:
        assert started["ready"]
        assert started["kept"]
        status = json.loads(world.command("db", "status", "--json"))
        assert status["pid"] == started["pid"]
        url = world.command("db", "url").strip()
        assert f":{started['port']}/" in url
        assert world.command("study", "list") == "no study yet: headsearch run quickstart\n"
        reader = world.command("db", "url", "--reader").strip()
        assert "headsearch_reader" in reader
    finally:
        assert json.loads(world.command("db", "stop", "--json")) == {"stopped": True}
    assert world.command("db", "stop") == "it was not running\n"
    time.sleep(0.1)
    assert "not running" in world.command("db", "status")

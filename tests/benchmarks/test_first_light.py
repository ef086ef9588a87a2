"""first_light on the CPU at toy sizes: every step leaves its row, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import first_light
import psutil
import pytest
import stopping
from drawn import draw_images
from lease import Holding
from rows import Row, Rows, latest, markdown, read_rows
from step_tests import gpu_files

SCRIPT = Path(first_light.__file__)
LEFT_OUT_HERE = {"lightly"}
"""Steps whose packages are not among those of the tests."""


def run(out: Path, *words: str, timeout: float = 560) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.timeout(600)
def test_a_smoke_run_leaves_the_row_of_every_step(tmp_path, monkeypatch):
    mark = f"smoke-{uuid.uuid4()}"
    monkeypatch.setenv("HEADSEARCH_TEST_MARK", mark)
    ended = run(tmp_path)
    assert not started_with(mark), "what it started is gone, PostgreSQL too"
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = read_rows(tmp_path / "results.jsonl")
    closing = {row.step: row for row in rows if row.name == first_light.STEPS[row.step - 1].name}
    assert list(closing) == list(range(1, len(first_light.STEPS) + 1))
    for row in closing.values():
        assert row.status == "ok" or (
            row.status == "left out" and row.name in LEFT_OUT_HERE and row.reason
        ), row
    assert not [row for row in rows if row.status == "failed"]
    named = {row.name: row.values for row in rows}
    assert named["study: trials"]["verify_clean"] is True
    assert named["study: trials"]["trials"] == 4
    assert all(named["study: trials"]["begun_by_each_worker"])
    assert named["tests: all"]["passed"] > 4
    assert {"together: 1 slot", "together: 2 slots"} <= named.keys()
    assert 0 <= named["published: accuracy"]["linear"] <= 1
    assert named["published: accuracy"]["readout_images"] == 120
    assert named["machine: GPU lease"]["handed_on_seconds"] < 30
    assert len([name for name in named if name.startswith("bench: ")]) == 2
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 2 + len(latest(rows))


def started_with(mark: str) -> list[str]:
    """Processes that have this in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


SLOW_STEP = """
import os, subprocess, sys, time

DAEMON = "import os, time; os.setsid(); open(os.environ['PID_FILE'], 'w').write(str(os.getpid())); time.sleep(600)"

def run(setting, say, clock):
    say("slow: begun", {"pid": os.getpid(), "home": str(setting.home)})
    {then}

def start_daemon(setting):
    # Its parent is gone, and it leads a session of its own.
    file = setting.out / "pid"
    os.environ["PID_FILE"] = str(file)
    subprocess.run([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {DAEMON!r}])"])
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
"""
RUNNER = """
import sys
sys.path[:0] = [{folder!r}, {benchmarks!r}]
import first_light
first_light.PRELOADED = ()
first_light.STEPS = (first_light.Step("slow", "slow_step", 60), first_light.Step("next", "next_step", 60))
first_light.SMOKE_LIMIT = {limit}
sys.exit(first_light.main(["--smoke", "--out", {out!r}, *sys.argv[1:]]))
"""
NEXT_STEP = "def run(setting, say, clock):\n    say('next: part', {'left': clock.left})\n"


def run_slow(folder: Path, then: str, *, limit: float = 60) -> tuple[subprocess.Popen[bytes], Path]:
    """A run of two steps, of which the first does something that steps should not."""
    (folder / "slow_step.py").write_text(SLOW_STEP.replace("{then}", then))
    (folder / "next_step.py").write_text(NEXT_STEP)
    out = folder / "out"
    code = RUNNER.format(folder=str(folder), benchmarks=str(SCRIPT.parent), limit=limit, out=str(out))
    return subprocess.Popen([sys.executable, "-c", code]), out


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_step_that_overruns_is_stopped_with_all_that_it_started(tmp_path):
    process, out = run_slow(tmp_path, "start_daemon(setting); time.sleep(600)", limit=3)
    assert process.wait(60) == 1
    begun, stopped, part, ended = read_rows(out / "results.jsonl")
    assert (begun.name, part.name) == ("slow: begun", "next: part")
    assert (stopped.name, stopped.status) == ("slow", "overran")
    assert re.fullmatch("stopped after [3-9] s", stopped.reason)
    assert (ended.name, ended.status) == ("next", "ok")
    assert gone(begun.values["pid"])
    assert gone(int((out / "pid").read_text()))


def test_what_a_step_leaves_behind_is_ended_before_the_next(tmp_path):
    process, out = run_slow(tmp_path, "start_daemon(setting)")
    assert process.wait(60) == 0
    assert gone(int((out / "pid").read_text()))


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("raise RuntimeError('no such thing\\nmore')", "RuntimeError: no such thing"),
        ("os.kill(os.getpid(), 9)", "the step's process ended with code -9"),
        ("say('slow: wrong', {}, failed='it is 2')", "1 of its parts: slow: wrong"),
        ("import headsearch.no_such_module", "No module named 'headsearch.no_such_module'"),
    ],
)
def test_a_step_that_fails_has_a_row_that_says_so(tmp_path, then, reason):
    process, out = run_slow(tmp_path, then)
    assert process.wait(60) == 1
    rows = {row.name: row for row in read_rows(out / "results.jsonl")}
    assert rows["slow"].status == "failed"
    assert reason in rows["slow"].reason
    assert rows["next"].status == "ok"


def test_a_step_that_cannot_run_here_is_no_failure(tmp_path):
    process, out = run_slow(tmp_path, "import setting as s; raise s.LeftOut('no images')")
    assert process.wait(60) == 0
    rows = {row.name: row for row in read_rows(out / "results.jsonl")}
    assert (rows["slow"].status, rows["slow"].reason) == ("left out", "no images")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_cut_leaves_what_it_had_and_no_process(tmp_path, number, code):
    process, out = run_slow(tmp_path, "time.sleep(600)")
    wait_until((out / "results.md").exists, process)
    process.send_signal(number)
    assert process.wait(60) == code
    (row,) = read_rows(out / "results.jsonl")
    assert row.name == "slow: begun"
    if number == signal.SIGKILL:
        shutil.rmtree(row.values["home"])
    assert not Path(row.values["home"]).exists()
    assert "slow: begun" in (out / "results.md").read_text()
    deadline = time.monotonic() + 10
    while not gone(row.values["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


UNTOUCHED = """
import sys
import torch

def touched(*_):
    raise SystemExit("CUDA was asked for before the steps are forked")

torch._C._cuda_getDeviceCount = torch._C._cuda_init = torch.cuda.is_available = touched
sys.path.insert(0, sys.argv[1])
import first_light
first_light.preload()
assert not torch.cuda.is_initialized()
sys.exit(0 if all(name in sys.modules for name in first_light.PRELOADED) else 3)
"""


def test_the_process_that_forks_leaves_cuda_alone():
    """A process that was forked from one which had asked for devices cannot use any."""
    command = [sys.executable, "-c", UNTOUCHED, str(SCRIPT.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_without_a_device_nothing_else_is_tried(tmp_path):
    ended = run(tmp_path, "--device", "cuda", "--only", "1,3,7")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert ended.returncode == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(row.step, row.status) for row in rows] == [(1, "left out"), (3, "left out"), (7, "left out")]
    assert all(row.reason.startswith("no CUDA device: torch") for row in rows)


def test_time_that_is_used_up_leaves_steps_out(tmp_path):
    ended = run(tmp_path, "--only", "3,7", "--total", "0")
    assert ended.returncode == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [(row.name, row.reason) for row in rows] == [
        ("bench", "no time is left"),
        ("published", "no time is left"),
    ]


@pytest.mark.hostile
def test_a_training_that_was_cut_goes_on_from_its_checkpoint(tmp_path):
    images = draw_images(tmp_path / "images")
    words = ("--smoke", "--out", str(tmp_path), "--data", str(images), "--only", "7", "--epochs")
    epochs = tmp_path / "published.jsonl"

    def told() -> list[dict[str, Any]]:
        return [json.loads(line) for line in epochs.read_text().splitlines()] if epochs.exists() else []

    process = subprocess.Popen([sys.executable, str(SCRIPT), *words, "2000"])
    wait_until(lambda: len(told()) >= 12, process)
    process.terminate()
    assert process.wait(60) == 143
    before = told()
    # Another number of epochs is another training: so the same again, until it has gone on.
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words, "2000"])
    wait_until(lambda: len(told()) >= len(before) + 12, process)
    process.terminate()
    assert process.wait(60) == 143
    after = told()[len(before) :]
    # Epochs of the checkpoint are told again with the times that they had.
    assert after[:10] == before[:10]
    assert [line["epoch"] for line in after] == list(range(1, len(after) + 1))
    rows = [row for row in read_rows(tmp_path / "results.jsonl") if row.name.startswith("published: epoch")]
    assert [row.values["epoch"] for row in rows][:2] == [1, 10]


def test_the_estimate_is_below_nine_minutes():
    minutes = re.findall(r"(\d+) s$", str(first_light.__doc__), re.MULTILINE)
    *steps, total = map(int, minutes)
    assert len(steps) == len(first_light.STEPS)
    assert sum(steps) == total < 9 * 60
    assert all(estimate <= step.limit for estimate, step in zip(steps, first_light.STEPS, strict=True))


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    rows = Rows(tmp_path)
    rows.add(Row(3, "bench: a|b", {"views_per_second": 12345.6, "share": 0.93214, "peak": None}, 1.5))
    rows.add(Row(1, "machine", reason="two\nlines", status="failed"))
    with rows.lines.open("a") as file:
        file.write('{"step": 4, "na')
    assert [row.step for row in rows.read()] == [3, 1]
    rows.write_table()
    _, _, first, second = rows.table.read_text().splitlines()
    assert first == "| 1 | machine |  | 0.0 | failed: two lines |"
    assert second == "| 3 | bench: a\\|b | views_per_second 12,346, share 0.9321, peak - | 1.5 | ok |"


def test_a_row_that_comes_again_replaces_the_one_before():
    rows = [Row(7, "published", status="overran"), Row(1, "machine"), Row(7, "published")]
    assert latest(rows) == [Row(1, "machine"), Row(7, "published")]
    assert len(markdown(latest(rows))) == 4


@pytest.mark.slow
@pytest.mark.hostile
def test_every_test_of_a_gpu_is_found():
    """By text, so that no other file is imported on a machine that lacks what it needs."""
    root = SCRIPT.parents[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        str(root / "core"),
        str(root / "gpu"),
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root.parent).stdout
    files = {line.partition("::")[0] for line in listed.splitlines() if "::" in line}
    assert files
    assert files <= {str(path.relative_to(root.parent)) for path in gpu_files()}


def test_a_process_that_ends_early_is_no_lease(tmp_path):
    log = tmp_path / "log"
    log.write_text("device: cuda is not there")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(AssertionError, match="no lease, it ended with 2: device: cuda is not there"):
        Holding(process, log).wait_for(lambda: None, "lease")


def test_what_a_step_says_goes_to_its_log(tmp_path):
    def speak() -> int:
        os.write(1, b"said so\n")
        return 3

    ending = stopping.run_limited(speak, 30, tmp_path / "log")
    assert ending.exit_code == 3
    assert (tmp_path / "log").read_text() == "said so\n"

"""A supervisor and workers that are stand-ins: scripts in the place of headsearch that end as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from headsearch.runtime.launcher import RESTARTS
from headsearch.runtime.launching.supervisor import DRAINED, Supervisor

ENDS_AS_TOLD = """
import os, sys
from pathlib import Path
begun = Path(os.environ["BEGUN"])
begun.open("a").write(" ".join(sys.argv[1:]) + "\\n")
codes = os.environ["CODES"].split()
code = int(codes[min(len(begun.read_text().splitlines()), len(codes)) - 1])
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
WAITS = """
import os, signal, sys, time
from pathlib import Path
told = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: told.append(number))
Path(os.environ["BEGUN"]).write_text(str(os.getpid()))
while not told:
    time.sleep(0.01)
time.sleep(0.5)
Path(os.environ["BEGUN"]).write_text(" ".join(signal.Signals(n).name for n in sorted(told)))
sys.exit(143)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a script in the place of the worker; returns the file in which it notes that it begins."""
    package = tmp_path / "path" / "headsearch"
    package.mkdir(parents=True)
    begun = tmp_path / "begun"
    (package / "__init__.py").touch()

    def put(script, **variables):
        (package / "__main__.py").write_text(script)
        # The stand-in comes before the checkout, which a supervisor's own process would else find here.
        environment = {
            "PYTHONPATH": str(package.parent),
            "PYTHONSAFEPATH": "1",
            "BEGUN": str(begun),
            **variables,
        }
        return begun, environment

    return put


@pytest.mark.parametrize(
    ("codes", "ends_with", "begins"),
    [
        ("0", 0, 1),
        ("1 1 0", 0, 3),
        ("75 -9 0", 0, 3),
        ("1", 1, RESTARTS + 1),
        ("-11", 1, RESTARTS + 1),
        ("2", 2, 1),
        ("130", 130, 1),
        (str(DRAINED), DRAINED, 1),
    ],
)
def test_one_that_died_is_started_again_within_limits(stand_in, codes, ends_with, begins):
    begun, environment = stand_in(ENDS_AS_TOLD, CODES=codes)
    assert Supervisor(["worker", "--study", "x"], environment).run() == ends_with
    assert begun.read_text().splitlines() == ["worker --study x --drained-exit-code 143"] * begins


@pytest.mark.parametrize("both", [False, True], ids=["supervisor alone", "both, as Slurm does"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_reaches_the_worker_as_a_notice(stand_in, subprocess_env, both, number):
    begun, environment = stand_in(WAITS)
    source = (
        "import sys; from headsearch.runtime.launching.supervisor import Supervisor\n"
        f"sys.exit(Supervisor(['worker'], {environment!r}).run())"
    )
    process = subprocess.Popen([sys.executable, "-c", source], env=subprocess_env)
    deadline = time.monotonic() + 60
    while not begun.exists() or not begun.read_text():
        assert time.monotonic() < deadline, "the worker did not begin"
        time.sleep(0.02)
    if both:
        os.kill(int(begun.read_text()), signal.SIGTERM)
    process.send_signal(number)
    assert process.wait(timeout=60) == DRAINED
    assert begun.read_text() == ("SIGUSR2 SIGTERM" if both else "SIGUSR2")

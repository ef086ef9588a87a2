"""What asks a process to stop, and what ends it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from headsearch.runtime.signals import INTERRUPTED

WAITING = """
import os, sys
from headsearch.runtime.signals import drain_on_signal
def say(line):  # whole lines, from whichever thread
    os.write(1, line.encode() + b"\\n")
with drain_on_signal(say) as drain:
    say("ready")
    drain.wait()
    say("asked")
    sys.stdin.readline()
"""


@pytest.fixture
def process(subprocess_env):
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=subprocess_env,
    ) as started:  # fmt: skip
        assert started.stdout.readline() == "ready\n"
        yield started
        started.kill()


def lines(process, count):
    return sorted(process.stdout.readline().strip() for _ in range(count))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_asks_and_never_ends(process, number):
    process.send_signal(number)
    assert lines(process, 2) == [f"{number.name}: finishing this epoch, then giving the trial back", "asked"]
    for again in (number, signal.SIGTERM, number, number):
        process.send_signal(again)
    process.communicate("go\n", timeout=30)
    assert process.returncode == 0


def test_sigterm_and_a_notice_of_the_same_are_one_wish(process):
    process.send_signal(signal.SIGTERM)
    assert lines(process, 2)[0].endswith("giving the trial back; again to abort")
    process.send_signal(signal.SIGUSR2)
    process.communicate("go\n", timeout=30)
    assert process.returncode == 0


def test_the_second_sigterm_ends_it_also_after_a_notice(process):
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode == INTERRUPTED

"""Step 2: the tests that carry the mark `gpu`, each with a row of its own.

In a smoke run, on a CPU, it is a few of the same tests with the CPU as their device; all of them are in the usual
test run.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from setting import ROOT, TESTS, Clock, Say, Setting

SMOKE = "sgd or lease or fed_from or what_waits"
"""Names of tests, for `pytest -k`."""
TEST_SECONDS = 60
MARK = r"\bmark\.gpu\b"


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """Run them in this process. Raises AssertionError if one fails."""
    files = [str(path.relative_to(ROOT)) for path in gpu_files()]
    words = ["-m", "gpu", *files] if setting.on_gpu else ["-m", "not gpu", "-k", SMOKE, "tests/gpu"]
    recorder = Recorder(say)
    # A file that cannot be imported here must not keep the others from being run.
    options = ["-q", "--continue-on-collection-errors", f"--timeout={TEST_SECONDS}", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *words], plugins=[recorder])
    counts = {outcome: recorder.counts[outcome] for outcome in ("passed", "failed", "skipped")}
    say("tests: all", counts)
    assert code == 0, f"pytest ends with {int(code)}, {', '.join(recorder.failed) or 'see the log'}"
    assert counts["passed"], "no test was run"


def gpu_files() -> list[Path]:
    """Files whose tests carry the mark, by their text: importing all others takes what is not here.

    They name it, or a fixture that has it in a conftest.py above them.
    """
    found = []
    fixtures = {path.parent: gpu_fixtures(path) for path in sorted(TESTS.rglob("conftest.py"))}
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.parent == Path(__file__).parent:
            continue
        names = {name for folder in path.parents for name in fixtures.get(folder, ())}
        if re.search("|".join((MARK, *(rf"\b{name}\b" for name in names))), path.read_text()):
            found.append(path)
    return found


def gpu_fixtures(path: Path) -> set[str]:
    """Names of a conftest's fixtures of which a variant has the mark."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(re.search(MARK, ast.unparse(each)) for each in node.decorator_list)
    }


class Recorder:
    """Writes a row for each test as it ends."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of three reports a test: set-up, call, tear-down."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        name = f"tests: {report.nodeid.rpartition('/')[2]}"
        if report.outcome == "failed":
            self.failed.append(name)
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self._say(name, {"seconds": report.duration}, failed=message[:400])
        elif report.outcome == "skipped":
            _, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, report.longrepr)
            self._say(name, {}, left_out=str(reason).removeprefix("Skipped: "))
        else:
            self._say(name, {"seconds": report.duration})

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.outcome == "failed":
            self.counts["failed"] += 1
            self.failed.append(report.nodeid)
            self._say(f"tests: {report.nodeid}", {}, failed=str(report.longrepr).strip().splitlines()[-1])

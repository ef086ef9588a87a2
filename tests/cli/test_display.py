from __future__ import annotations

import io

import pytest
from fabricated import snapshot, trial
from rich.console import Console

from headsearch.cli.display import LiveDisplay, PlainDisplay, open_display, render
from headsearch.report.status import worker_lines
from headsearch.report.summary import ending, ending_json, header, reproduction
from headsearch.search.snapshot import WorkerRow

PARAMS = {"head.projection_dim": 8, "head.width": 32, "head.kind": "mlp"}


def begun() -> tuple:
    first = snapshot(seconds=0)
    now = snapshot(
        trial(0, acc=0.9, params=PARAMS), trial(1, "running", epoch=2, acc=0.7), trial(2, "paused", acc=0.6),
        trial(3, "failed", epoch=1, acc=0.1, reason="collapsed", message="epoch 2: all features are the same"),
        seconds=75,
    )  # fmt: skip
    return first, now


def drawn(width: int = 140, trials: int = 0) -> str:
    first, now = begun()
    if trials:
        now = snapshot(*(trial(n) for n in range(trials)), seconds=75)
    console = Console(record=True, width=width, file=io.StringIO())
    where = "postgresql://me:***@db:5432/heads"
    console.print(render(header(now.study, where), first, now, ["worker 1 died"], elapsed=75))
    return console.export_text()


def test_the_live_table_shows_header_progress_best_and_rows() -> None:
    text = drawn()
    for words in (
        "made-up (open)", "How small?", "probe_accuracy ↑, projection_dim ↓; protocol holdout",
        "3 parameters, 18 points", "tpe, 16 random trials first", "promote the best 1/2 at epochs 1, 4",
        "12 trials of 12 epochs", "postgresql://me:***@db:5432/heads",
        "4 of 12 trials begun: 1 running, 1 paused, 1 complete, 1 failed; 16 of at most 144 epochs trained",
        "elapsed 1 min 15 s, about", "trial 0: accuracy 0.9000 (validation), kind=mlp width=32 projection_dim=8",
        "worker 1 died", "failed: collapsed",
    ):  # fmt: skip
        assert words in text, words
    rows = [line.split()[:2] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["1", "running"], ["0", "complete"], ["2", "paused"], ["3", "failed:"]]


def test_twenty_rows_are_enough() -> None:
    text = drawn(trials=25)
    assert "... and 5 more" in text
    assert len([line for line in text.splitlines() if line.strip()[:1].isdigit()]) == 20


def test_a_narrow_terminal_is_not_overrun() -> None:
    assert all(len(line) <= 60 for line in drawn(width=60).splitlines())


def test_lines_are_printed_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    first, now = begun()
    with open_display([("study", "made-up")]) as display:
        assert isinstance(display, PlainDisplay)
        display.start(first, "2 workers")
        display.update(now)
        display.update(now)
        display.note("worker 1 died")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["study      made-up", "workers    2 workers"]
    assert "\x1b" not in "".join(lines)
    assert [line for line in lines if line.startswith("trial 0")] == [
        "trial 0 began: kind=mlp width=32 projection_dim=8",
        "trial 0 complete: accuracy 0.9000 (validation), test 0.8900, projection dim 8, 30 s",
    ]
    assert "trial 3 failed (collapsed): epoch 2: all features are the same" in lines
    assert lines[-1] == "worker 1 died"


def test_a_resumed_study_does_not_repeat_its_past(capsys: pytest.CaptureFixture[str]) -> None:
    _, now = begun()
    with open_display([]) as display:
        display.start(now, "1 worker")
        display.update(now)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("workers")] == ["resumed"]


def test_json_leaves_standard_output_to_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    first, now = begun()
    with open_display([("study", "made-up")], quiet=True) as display:
        display.start(first, "2 workers")
        display.update(now)
    said = capsys.readouterr()
    assert said.out == ""
    assert "trial 0 complete" in said.err


def test_the_live_display_draws_and_keeps_its_notes() -> None:
    first, now = begun()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40)
    with LiveDisplay([("study", "made-up")], console) as display:
        display.note("before anything is drawn")
        display.start(first, "2 workers")
        display.update(now)
        display.note("worker 1 died")
    text = out.getvalue()
    assert "2 workers" in text
    assert "complete" in text
    # The table is wiped at the end, the notes stay.
    assert text.rstrip().endswith("worker 1 died")
    assert "before anything is drawn" in text


def test_a_run_ends_with_totals_failures_and_what_to_do_next() -> None:
    _, now = begun()
    lines = ending(now, "study.toml", ["budget.trials=12"], seconds=75)
    totals = "4 trials: 1 running, 1 paused, 1 complete, 1 failed, 2 promoted in 1 min 15 s; 16 of 144 epochs"
    assert any(line.startswith(totals) for line in lines)
    assert "  collapsed: trial 3: epoch 2: all features are the same" in lines
    assert lines[-1] == "browse: headsearch dashboard made-up"
    (again,) = [line for line in lines if line.startswith("train it again: ")]
    assert again == (
        "train it again: headsearch train study.toml --set budget.trials=12 --set head.kind=mlp "
        "--set head.width=32 --set head.projection_dim=8 --seed 0"
    )
    data = ending_json(now, "study.toml", seconds=75)
    assert data["best"]["number"] == 0
    assert data["failures"] == ["collapsed: trial 3: epoch 2: all features are the same"]


def test_failures_are_grouped_by_reason() -> None:
    trials = [trial(n, "failed", reason="collapsed", message=f"message {n}") for n in range(15)]
    lines = ending(snapshot(*trials, trial(15, "failed", reason="lost", message="gone")), "s.toml")
    assert "  collapsed: trials 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more: message 0" in lines
    assert "  lost: trial 15: gone" in lines
    assert "no trial is complete yet" in lines
    assert not [line for line in lines if "train it again" in line]


def test_reproduction_names_the_threads_that_a_cpus_result_depends_on() -> None:
    read = snapshot()
    cpu = trial(0, facts={"threads": 1}, seed=3)
    assert reproduction(read.study.spec, cpu, "a b.toml").endswith("--seed 3 --device cpu --threads 1")
    assert reproduction(read.study.spec, cpu, "a b.toml").startswith("headsearch train 'a b.toml' ")
    gpu = trial(0, facts={"threads": 8}, device="cuda:0 H100, 8 threads")
    assert reproduction(read.study.spec, gpu, "s.toml").endswith("--seed 0")


def test_a_silent_worker_is_called_lost() -> None:
    workers = (WorkerRow("h:1:a", "h", 1, "cpu", 2.0), WorkerRow("h:2:b", "h", 2, "cpu", 61.0))
    lines = worker_lines(snapshot(workers=workers))
    assert ["(lost)" in line for line in lines] == [False, True]

from __future__ import annotations

import json

from fabricated import snapshot, spec, trial

from headsearch.report.tables import Table, duration, value
from headsearch.report.trials import (
    best,
    in_order,
    overrides_of,
    short_names,
    trial_json,
    trial_table,
    varying,
)
from headsearch.study_file import load_study, one_point


def test_only_parameters_that_vary_have_a_column() -> None:
    fixed = spec(
        budget={"trials": 2, "epochs": 12}, space={"head.kind": "linear", "head.projection_dim": [2, 4]}
    )
    assert varying(fixed) == ["head.projection_dim"]
    listed = spec(
        mode="points", budget={"epochs": 2}, space={},
        points=[{"head.kind": "linear", "head.projection_dim": 2}, {"head.kind": "linear", "head.projection_dim": 4}],
    )  # fmt: skip
    assert varying(listed) == ["head.projection_dim"]


def test_names_are_short_where_that_is_clear() -> None:
    assert short_names(["head.width", "encoder.width", "head.kind"]) == {
        "head.width": "head.width", "encoder.width": "encoder.width", "head.kind": "kind",
    }  # fmt: skip


def test_running_trials_come_first_and_twenty_rows_are_enough() -> None:
    trials = [trial(n, acc=n / 100) for n in range(25)] + [
        trial(25, "running"),
        trial(26, "failed", reason="error"),
    ]
    table = trial_table(snapshot(*trials))
    assert table.rows[0][:2] == ("25", "running")
    assert [row[0] for row in table.rows[1:4]] == ["24", "23", "22"]
    assert (len(table.rows), table.more) == (20, 7)
    assert table.lines()[-1] == "... and 7 more"
    whole = trial_table(snapshot(*trials), most=None)
    assert [row[0] for row in whole.rows] == [str(n) for n in range(27)]
    assert whole.rows[26][1] == "failed: error"


def test_the_best_is_a_complete_one_as_soon_as_there_is_one() -> None:
    assert best(snapshot()) is None
    running = trial(1, "running", acc=0.9)
    assert best(snapshot(running, trial(2, "paused", acc=0.3))) is running
    assert best(snapshot(running, done := trial(2, acc=0.3))) is done
    assert best(snapshot(trial(5, acc=0.3), early := trial(2, acc=0.3))) is early


def test_overrides_give_the_parameters_back(tmp_path) -> None:
    params = {"head.kind": "mlp", "head.width": 64, "head.batch_norm": True, "optimizer.learning_rate": 1e-05}
    (tmp_path / "a.toml").write_text(
        'name = "a"\nbudget = {trials = 1, epochs = 1}\nspace."head.kind" = ["linear"]\n'
    )
    import shlex

    words = [word for text in overrides_of(params) for word in shlex.split(text)[1:]]
    config = one_point(load_study(tmp_path / "a.toml"), words)
    assert (config.head.kind, config.head.width, config.head.batch_norm) == ("mlp", 64, True)
    assert config.optimizer.learning_rate == 1e-05


def test_parameters_come_back_into_the_spaces_order() -> None:
    params = {"head.projection_dim": 2, "other": 1, "head.kind": "mlp", "head.width": 32}
    assert list(in_order(spec(), params)) == ["head.kind", "head.width", "head.projection_dim", "other"]


def test_a_trial_is_plain_data() -> None:
    data = json.loads(json.dumps(trial_json(trial(1, facts={"probe_accuracy": 0.5, "host": "h"}))))
    assert (data["number"], data["probe_accuracy"], data["facts"]) == (1, 0.5, {"host": "h"})


def test_tables_align_and_markdown_escapes() -> None:
    table = Table(("name", "n"), (("a|b", "5"), ("c", "10")))
    assert table.lines() == ["name   n", "a|b    5", "c     10"]
    assert table.markdown().splitlines() == ["| name | n |", "| --- | ---: |", "| a\\|b | 5 |", "| c | 10 |"]
    assert Table(("only",), ()).lines() == ["only"]


def test_values_and_durations() -> None:
    assert [value(v) for v in (None, True, 0.00012345, "x" * 40)] == ["", "true", "0.0001234", "x" * 31 + "…"]
    assert [duration(s) for s in (None, 5.4, 75, 7260)] == ["", "5 s", "1 min 15 s", "2 h 01 min"]

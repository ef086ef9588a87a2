from __future__ import annotations

import csv
import io
import json
import statistics

import pytest
from fabricated import snapshot, trial

from headsearch.report.fronts import (
    best_point,
    captions,
    front,
    front_csv,
    front_json,
    front_table,
    points,
)
from headsearch.report.summary import ending, ending_json

MLP = {"head.kind": "mlp", "head.width": 32, "head.projection_dim": 16}


def numbers(found: list) -> list[tuple[int, ...]]:
    return [point.numbers for point in found]


def test_a_point_that_is_beaten_in_both_objectives_is_not_on_the_front() -> None:
    read = snapshot(trial(0, dim=8, acc=0.9), trial(1, dim=16, acc=0.8), trial(2, dim=2, acc=0.5))
    assert numbers(front(read)) == [(2,), (0,)]


def test_equal_points_are_both_on_the_front_and_a_tie_in_one_objective_decides() -> None:
    equal = snapshot(
        trial(0, dim=8, acc=0.9),
        trial(1, dim=8, acc=0.9, params={"head.kind": "mlp", "head.projection_dim": 8}),
    )
    assert numbers(front(equal)) == [(0,), (1,)]
    tie = snapshot(trial(0, dim=8, acc=0.9), trial(1, dim=4, acc=0.9))
    assert numbers(front(tie)) == [(1,)]


def test_only_complete_trials_count() -> None:
    read = snapshot(
        trial(0, dim=8, acc=0.6),
        trial(1, "pruned", dim=2, acc=0.99),
        trial(2, "running", dim=2, acc=0.99),
        trial(3, "failed", dim=2, acc=0.99, reason="collapsed"),
        trial(4, "paused", dim=2, acc=0.99),
    )
    assert numbers(points(read)) == numbers(front(read)) == [(0,)]


def test_seeds_of_a_point_become_a_mean_and_a_sample_deviation() -> None:
    read = snapshot(
        trial(0, dim=8, acc=0.80, seed=0),
        trial(1, dim=8, acc=0.90, seed=1),
        trial(2, dim=8, acc=0.94, seed=2),
        trial(3, dim=16, acc=0.91, seed=0),
        trial(4, "failed", dim=16, acc=None, seed=1, reason="lost"),
        trial(5, "failed", dim=16, acc=None, seed=2, reason="hung"),
        seeds=[0, 1, 2],
    )
    first, second = points(read)
    assert (first.n_text, second.n_text) == ("3", "1 of 3")
    assert (first.n, first.seeds, second.n) == (3, (0, 1, 2), 1)
    assert first.probe_accuracy.mean == pytest.approx((0.80 + 0.90 + 0.94) / 3)
    assert first.probe_accuracy.std == pytest.approx(statistics.stdev([0.80, 0.90, 0.94]))
    assert first.test_accuracy is not None
    assert first.test_accuracy.mean == pytest.approx(first.probe_accuracy.mean - 0.01)
    assert second.probe_accuracy.std is None
    # The lucky seed of 0.94 does not count by itself: the mean 0.88 leaves room for 0.91 at a larger dim.
    assert numbers(front(read)) == [(0, 1, 2), (3,)]


def test_the_order_of_parameters_in_the_database_does_not_split_a_point() -> None:
    one, other = (
        {"head.kind": "linear", "head.projection_dim": 8},
        {"head.projection_dim": 8, "head.kind": "linear"},
    )
    read = snapshot(trial(0, params=one), trial(1, params=other, seed=1), seeds=[0, 1])
    assert numbers(points(read)) == [(0, 1)]


def test_more_objectives_keep_more_points() -> None:
    objectives = ["probe_accuracy", "projection_dim", "train_seconds"]
    read = snapshot(
        trial(0, dim=8, acc=0.9, values=(0.9, 8.0, 100.0)),
        trial(1, dim=16, acc=0.8, values=(0.8, 16.0, 10.0)),
        trial(2, dim=16, acc=0.7, values=(0.7, 16.0, 20.0), params=MLP),
        objectives=objectives,
    )
    assert numbers(front(read)) == [(0,), (1,)]
    assert numbers(front(read, ("probe_accuracy", "projection_dim"))) == [(0,)]


def test_validation_selects_and_test_accuracy_does_not() -> None:
    read = snapshot(
        trial(0, dim=8, acc=0.90, test_accuracy=0.10),
        trial(1, dim=8, acc=0.89, test_accuracy=0.99, params={"a": 1}),
    )
    assert numbers(front(read)) == [(0,)]


def test_json_is_whole_and_says_what_it_rests_on() -> None:
    read = snapshot(trial(0, dim=8, acc=0.9), trial(1, "pruned", dim=8), state="complete")
    data = json.loads(json.dumps(front_json(read)))
    assert data["study"] == "made-up"
    assert data["state"] == "complete"
    assert data["protocol"] == "holdout"
    assert data["spec_hash"] == read.study.spec.hash
    assert data["splits"] == {"selection": "validation", "final": "test"}
    assert data["objectives"] == [
        {"name": "probe_accuracy", "direction": "maximize"},
        {"name": "projection_dim", "direction": "minimize"},
    ]
    assert (data["counts"]["complete"], data["counts"]["pruned"]) == (1, 1)
    assert (data["epochs_trained"], data["epochs_without_pruning"]) == (13, 144)
    (point,) = data["front"]
    assert (point["trials"], point["seeds"], point["n"]) == ([0], [0], 1)
    assert point["validation_accuracy"] == {"mean": 0.9, "std": None}
    assert point["test_accuracy"]["mean"] == pytest.approx(0.89)
    assert point["objectives"]["projection_dim"]["mean"] == 8.0
    assert point["params"] == {"head.kind": "linear", "head.projection_dim": 8}


def test_csv_reads_back() -> None:
    read = snapshot(
        trial(0, dim=8, acc=0.9),
        trial(1, dim=2, acc=0.5, params={"head.kind": "mlp", "head.width": 32, "head.projection_dim": 2}),
    )
    rows = list(csv.DictReader(io.StringIO(front_csv(read))))
    assert [row["trials"] for row in rows] == ["1", "0"]
    assert rows[0]["head.width"] == "32"
    assert rows[1]["head.width"] == ""
    assert rows[1]["validation_accuracy_mean"] == "0.9"
    assert rows[1]["validation_accuracy_std"] == ""
    assert (rows[1]["protocol"], rows[1]["n"], rows[1]["head_parameters"]) == ("holdout", "1", str(129 * 8))
    assert float(rows[1]["projection_dim_mean"]) == 8


def test_csv_of_an_empty_front_has_only_its_columns() -> None:
    assert len(front_csv(snapshot()).splitlines()) == 1


def test_the_table_shows_what_varies_and_the_projection_dim_once() -> None:
    table = front_table(snapshot(trial(0, dim=8, acc=0.9)))
    assert table.columns == ("projection_dim", "validation", "test", "n", "trials", "kind", "width")
    assert table.rows == (("8", "0.9000", "0.8900", "1", "0", "linear", ""),)
    lines = table.lines()
    assert len({len(line) for line in lines if line}) <= 2
    assert "± 0.0500" in "".join(
        front_table(
            snapshot(
                trial(0, acc=0.80), trial(1, acc=0.85, seed=1), trial(2, acc=0.90, seed=2), seeds=[0, 1, 2]
            )
        ).lines()
    )


def test_captions_name_protocol_splits_seeds_and_counts() -> None:
    read = snapshot(trial(0), trial(1, "pruned", seed=1), seeds=[0, 1])
    said = " ".join(captions(read))
    for words in (
        "protocol holdout",
        "validation accuracy selects",
        "test accuracy was scored once",
        "complete seeds of 2",
        "2 of 12 trials: 1 complete, 1 pruned",
        "13 of 144 epochs trained (9%)",
        "some points lack seeds, and rest on those that are left: n = 1 of 2 at dim 8",
    ):
        assert words in said
    whole = snapshot(trial(0), trial(1, seed=1), seeds=[0, 1])
    assert "lack seeds" not in " ".join(captions(whole))


def test_a_point_is_ranked_when_all_its_seeds_have_ended() -> None:
    seeds = {"seeds": [0, 1]}
    begun = [trial(0, dim=4, acc=0.9), trial(1, "running", dim=4, acc=0.9, seed=1)]
    whole = [trial(2, dim=8, acc=0.8), trial(3, dim=8, acc=0.8, seed=1)]
    read = snapshot(*begun, *whole, **seeds)
    assert numbers(front(read)) == [(2, 3)]
    assert [point.n_text for point in points(read, under_way=True)] == ["1 of 2", "2"]
    assert "1 points are not ranked yet" in " ".join(captions(read))
    assert numbers(front(snapshot(begun[0], *whole, state="cancelled", **seeds))) == [(0,)]
    assert front_table(snapshot(begun[0], *whole, state="cancelled", **seeds)).rows[0][3] == "1 of 2"


def test_a_point_whose_configuration_failed_for_one_seed_is_on_no_front() -> None:
    read = snapshot(
        trial(0, dim=4, acc=0.9), trial(1, "failed", dim=4, acc=None, seed=1, reason="collapsed"),
        trial(2, dim=8, acc=0.8), trial(3, "failed", dim=8, acc=None, seed=1, reason="lost"),
        trial(4, dim=16, acc=0.7), trial(5, dim=16, acc=0.7, seed=1),
        seeds=[0, 1],
    )  # fmt: skip
    assert numbers(front(read)) == [(2,)]
    assert [point.infeasible for point in points(read)] == [True, False, False]
    assert "1 points are left out: a seed of each failed by its configuration" in " ".join(captions(read))
    best = best_point(read)
    assert best is not None
    assert best.numbers == (4, 5), "with all its seeds, not the luckiest"


def test_the_best_is_the_best_mean_and_the_last_lines_say_of_how_many() -> None:
    read = snapshot(
        trial(0, dim=4, acc=0.95), trial(1, dim=4, acc=0.55, seed=1),
        trial(2, dim=8, acc=0.80), trial(3, dim=8, acc=0.82, seed=1), seeds=[0, 1],
    )  # fmt: skip
    lines = ending(read, "study.toml")
    assert any(
        line.startswith("best: trials 2, 3, accuracy 0.8100 ± 0.0141 (validation, n = 2 seeds)")
        for line in lines
    )
    data = json.loads(json.dumps(ending_json(read, "study.toml")))
    assert [one["number"] for one in data["best"]["trials"]] == [2, 3]
    assert data["best"]["n"] == 2
    assert "--seed 0" in data["train_best_again"]

from __future__ import annotations

import dataclasses

import pytest
from fabricated import snapshot, trial

from headsearch.report.progress import counts_line, events, expected_epochs, seconds_left


def between(before: list, after: list, **changes: object) -> list[str]:
    return events(snapshot(*before, **changes), snapshot(*after, **changes))


def running(number: int = 3, epoch: int = 0, **facts: object):
    shown = {"probe_accuracy": None, "loss": None, "views_per_second": None, "train_seconds": None}
    return trial(number, "running", epoch=epoch, **((shown if not epoch else {}) | facts))


def test_a_trial_begins_with_its_parameters_in_the_spaces_order() -> None:
    params = {"head.projection_dim": 8, "head.width": 32, "head.kind": "mlp"}
    assert between([], [running(params=params)]) == ["trial 3 began: kind=mlp width=32 projection_dim=8"]
    assert between([], [running(params=params, seed=1)], seeds=[0, 1])[0].endswith("seed=1")


def test_nothing_new_is_no_line() -> None:
    every = [
        trial(0),
        running(epoch=2),
        trial(2, "paused"),
        trial(4, "pruned"),
        trial(5, "failed", reason="error"),
    ]
    assert between(every, every) == []


def test_reports_become_the_last_ones_line() -> None:
    (line,) = between([running(epoch=1)], [running(epoch=3, probe_accuracy=0.8123, loss=4.2)])
    assert line == "trial 3 epoch 3/12: accuracy 0.8123, loss 4.200, 2,000 views/s, 30 s"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (running(epoch=1), trial(3, "paused", epoch=1), "trial 3 paused at epoch 1"),
        (trial(3, "paused", epoch=1), running(epoch=1, attempt=2), "trial 3 promoted: goes on after epoch 1"),
        (running(epoch=1), running(epoch=1, attempt=2), "trial 3 promoted: goes on after epoch 1"),
        (running(epoch=5), running(epoch=5, attempt=2), "trial 3 taken up again after epoch 5"),
        (running(epoch=12), trial(3, acc=0.9, dim=4),
         "trial 3 complete: accuracy 0.9000 (validation), test 0.8900, projection dim 4, 30 s"),
        (trial(3, "paused", epoch=4), trial(3, "pruned", epoch=4), "trial 3 pruned after epoch 4/12"),
        (running(epoch=2), trial(3, "failed", epoch=2, reason="collapsed", message="epoch 3: flat"),
         "trial 3 failed (collapsed): epoch 3: flat"),
        (running(epoch=2), trial(3, "orphaned", epoch=2),
         "trial 3 orphaned: its lease ran out; a free worker takes it over"),
        (running(epoch=2), trial(3, "orphaned", epoch=2, worker_id=None),
         "trial 3 orphaned: given back by its worker; a free worker takes it over"),
    ],
)  # fmt: skip
def test_each_change_of_state_has_its_line(old, new, line: str) -> None:
    assert between([old], [new]) == [line]


def test_a_lost_worker_is_told_before_the_trial_goes_on() -> None:
    lines = between([running(epoch=2)], [running(epoch=2, attempt=2, losses=1)])
    assert lines == ["trial 3 lost its worker", "trial 3 taken up again after epoch 2"]


def test_a_trial_that_came_and_went_between_two_snapshots_is_told_whole() -> None:
    lines = between([], [trial(7, acc=0.9)])
    assert [line.split(":")[0] for line in lines] == ["trial 7 began", "trial 7 complete"]


def test_events_come_by_trial_number() -> None:
    lines = between([], [running(0), running(1), running(2)])
    assert [line.split()[1] for line in lines] == ["0", "1", "2"]


def test_expected_epochs_shrink_with_every_rung() -> None:
    # 12 trials: all do 1 epoch, 1.5/2 of them 3 more, (1.5/2)^2 of them the last 8.
    assert expected_epochs(snapshot()) == pytest.approx(12 * (1 + 0.75 * 3 + 0.5625 * 8))
    assert expected_epochs(snapshot(pruning={"rule": "none"})) == 144


def test_time_left_follows_the_speed_since_the_start() -> None:
    first = snapshot(trial(0, epoch=12), seconds=0)
    assert seconds_left(first, first) is None
    now = snapshot(trial(0, epoch=12), running(1, epoch=6), seconds=60, pruning={"rule": "none"})
    assert seconds_left(dataclasses.replace(first, study=now.study), now) == pytest.approx(
        (144 - 18) * 60 / 6
    )
    over = snapshot(*(trial(n) for n in range(12)), seconds=60)
    assert seconds_left(first, over) == 0.0


def test_counts_line() -> None:
    read = snapshot(trial(0), running(1, epoch=2), trial(2, "pruned"))
    assert counts_line(read) == (
        "3 of 12 trials begun: 1 running, 1 complete, 1 pruned; 15 of at most 144 epochs trained"
    )

"""The study that trains a front again."""

from __future__ import annotations

import pytest
from fabricated import snapshot, trial

from headsearch.errors import InputError
from headsearch.report.confirmation import confirmation
from headsearch.report.summary import confirmed_lines


def test_the_front_is_trained_whole_with_fresh_seeds():
    trials = (trial(0, dim=2, acc=0.4), trial(1, dim=8, acc=0.6), trial(2, dim=16, acc=0.5))
    seen = snapshot(*trials, state="complete", seeds=[1, 3], base={"encoder.width": 8})
    made = confirmation(seen, 3)
    assert made.name == "made-up-confirm-3"
    assert made.seeds == (0, 2, 4)
    assert [point["head.projection_dim"] for point in made.points] == [2, 8]
    assert (made.trials, made.rungs, made.budget.epochs) == (6, (), 12)
    assert made.trial_config(dict(made.points[0]), 0).encoder.width == 8
    assert made.hash == confirmation(seen, 3).hash


def test_an_open_study_and_one_without_a_front_are_refused():
    with pytest.raises(InputError, match="not complete yet"):
        confirmation(snapshot(trial(0)), 3)
    with pytest.raises(InputError, match="no trial is complete"):
        confirmation(snapshot(trial(0, state="failed"), state="complete"), 3)


def test_all_points_are_shown_with_what_became_of_them():
    seen = snapshot(trial(0, dim=2, acc=0.5), trial(1, dim=8, acc=0.4), state="complete")
    lines = confirmed_lines(seen)
    assert "still on the front: 1 of 2 points, projection dims 2" in lines
    assert any(line.split()[:1] == ["8"] for line in lines)

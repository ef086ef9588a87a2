"""Nothing is lost, told twice or different when workers and database are killed all the time.

Bounded here. By hand, for a long run (about a quarter of an hour):

    HEADSEARCH_TEST_KILLS=200 HEADSEARCH_TEST_SEED=1 pytest -s tests/runtime/test_chaos.py
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import chaos
import pytest

from headsearch.runtime.session import Session, open_session
from headsearch.runtime.verifying import verify
from headsearch.search import snapshot, studies

KILLS = int(os.environ.get("HEADSEARCH_TEST_KILLS", "16"))
SEED = int(os.environ.get("HEADSEARCH_TEST_SEED", "4"))

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.hostile,
    pytest.mark.timeout(600 + 30 * KILLS),
]


@pytest.mark.parametrize("seeds", [1, 3])
def test_studies_under_fire_end_as_if_left_in_peace(
    headsearch_home: Path, tmp_path: Path, seeds: int
) -> None:
    """A fast machine may have a study complete before all kills are done: then another is set on fire."""
    with open_session() as session:
        kills = 0
        for number in count(1):
            kills += under_fire(
                session, f"fire-{number}", tmp_path, seed=SEED + number - 1, kills=KILLS - kills, seeds=seeds
            )
            if kills >= KILLS:
                break
            assert number < 10, f"{kills} kills in {number} studies: the fire does not reach the workers"


def under_fire(session: Session, name: str, folder: Path, *, seed: int, kills: int, seeds: int) -> int:
    """One study under fire, and the same points trained in peace; returns how many kills there were."""
    trials = seeds * (max(12, int(1.2 * kills)) // seeds)
    spec = chaos.spec_of(trials, name, seeds=list(range(seeds)))
    studies.create(session.database, spec)
    fire = chaos.burn(session, spec, folder, seed=seed, kills=kills)
    verdict = verify(session, name)
    seen = snapshot.read(session.database, name)
    kinds = ", ".join(f"{times} {kind}" for kind, times in fire.kills.most_common())
    print(f"\n{name}: {fire.kills.total()} kills in {fire.seconds:.0f} s: {kinds}")
    print(f"{fire.workers_started} workers, {sum(t.losses for t in seen.trials)} losses, {dict(seen.counts)}")
    assert verdict.clean, verdict.lines()
    assert [t.number for t in seen.trials] == list(range(trials)), "exact, none lost"
    assert set(seen.counts) <= {"complete", "pruned"}, [t.message for t in seen.trials]
    for point in {trial.point for trial in seen.trials}:
        ended = [(trial.state, trial.epoch) for trial in seen.trials if trial.point == point]
        assert len(ended) == seeds, "a point with all its seeds"
        assert len(set(ended)) == 1, "which end together"
    ends = chaos.ends_told(folder / f"{name}.log")
    assert not [number for number, times in ends.items() if times > 1], "trained twice to completion"
    undisturbed = chaos.again(spec, seen, f"{name}-calm")
    studies.create(session.database, undisturbed)
    chaos.calm(session, undisturbed, folder)
    print("the same to the bit:", chaos.compare(session, name, undisturbed.name))
    return fire.kills.total()

"""Nothing is lost, told twice or different when workers and database are killed all the time.

Bounded here. By hand, for a long run (about half an hour):

    HEADSEARCH_TEST_KILLS=200 HEADSEARCH_TEST_SEED=1 pytest -s --timeout 7200 tests/runtime/test_chaos.py
"""

from __future__ import annotations

import os
from pathlib import Path

import chaos
import pytest

from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify
from headsearch.search import snapshot, studies

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]

KILLS = int(os.environ.get("HEADSEARCH_TEST_KILLS", "16"))
SEED = int(os.environ.get("HEADSEARCH_TEST_SEED", "4"))


def test_a_study_under_fire_ends_as_one_left_in_peace(headsearch_home: Path, tmp_path: Path) -> None:
    trials = max(12, int(0.8 * KILLS))
    with open_session() as session:
        spec = chaos.spec_of(trials)
        studies.create(session.database, spec)
        fire = chaos.burn(session, spec, tmp_path, seed=SEED, kills=KILLS)
        verdict = verify(session, spec.name)
        seen = snapshot.read(session.database, spec.name)
        kinds = ", ".join(f"{count} {kind}" for kind, count in fire.kills.most_common())
        print(f"\n{sum(fire.kills.values())} kills in {fire.seconds:.0f} s: {kinds}")
        print(
            f"{fire.workers_started} workers, {sum(t.losses for t in seen.trials)} losses, {dict(seen.counts)}"
        )
        assert verdict.clean, verdict.lines()
        assert [t.number for t in seen.trials] == list(range(trials)), "exact, none lost"
        assert set(seen.counts) <= {"complete", "pruned"}, [t.message for t in seen.trials]
        assert sum(fire.kills.values()) >= min(KILLS, 8)
        ends = chaos.ends_told(tmp_path / "fire.log")
        assert not [number for number, count in ends.items() if count > 1], "trained twice to completion"
        undisturbed = chaos.again(spec, seen)
        studies.create(session.database, undisturbed)
        chaos.calm(session, undisturbed, tmp_path)
        print("the same to the bit:", chaos.compare(session, spec.name, undisturbed.name))

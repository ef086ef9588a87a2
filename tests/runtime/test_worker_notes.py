"""What a worker says of its images: the lines of `study create`, which may have been told not to look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headsearch.runtime import preflight
from headsearch.runtime.running import make_study
from headsearch.runtime.session import Session, open_session
from headsearch.runtime.worker import run_worker
from headsearch.search import snapshot
from headsearch.spec import StudySpec

pytestmark = pytest.mark.postgres


@pytest.fixture
def session(headsearch_home: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    with open_session() as session:
        yield session


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in which one file is ignored, one is damaged, and all others are 16 bits wide."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in "ab":
            place = tmp_path / "data" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 4096, (8, 8), dtype=np.uint16)
                Image.fromarray(pixels).save(place / f"{index}.png")
    (tmp_path / "data" / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "train" / "b" / "0.png").write_bytes(b"damaged")
    return tmp_path / "data"


def spec_of(root: Path, **space: Any) -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "s",
            "mode": "grid",
            "budget": {"epochs": 1},
            "base": {
                "data": {"name": "folder", "root": str(root), "max_unreadable_fraction": 0.1},
                "encoder": {"width": 4},
                "training": {"batch_size": 8, "precision": "fp32"},
                "probe": {"iterations": 5, "report_iterations": 5, "penalties": [1e-2]},
            },
            "space": {"head.projection_dim": [2, 4], **space},
        }
    )


def told_by_worker(session: Session, root: Path, **space: Any) -> tuple[list[str], list[str]]:
    """Lines of a worker on a study made without a check, and those that the check would have returned."""
    spec = spec_of(root, **space)
    _, _, notes = make_study(session, spec, data_check=False)
    assert notes == []
    lines: list[str] = []
    run_worker("s", device="cpu", say=lines.append)
    seen = snapshot.read(session.database, "s")
    assert seen.counts == {"complete": len(seen.trials)}
    return lines, preflight.check(spec, session.home)


def test_a_worker_says_what_create_would_have_said_once(session: Session, root: Path) -> None:
    lines, expected = told_by_worker(session, root)
    assert len(expected) == len(set(expected)) == 4, expected
    assert [line for line in lines if line in expected] == expected
    first = next(place for place, line in enumerate(lines) if " complete: " in line)
    assert max(lines.index(line) for line in expected) < first


def test_what_two_image_sizes_have_in_common_is_said_once(session: Session, root: Path) -> None:
    lines, expected = told_by_worker(session, root, **{"data.image_size": [8, 12]})
    assert len(expected) > len(set(expected))
    assert sorted(line for line in lines if line in expected) == sorted(set(expected))

"""Every study file that comes with headsearch, at reduced size, through the real worker and database."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headsearch.errors import SpecError
from headsearch.runtime.bundled import bundled
from headsearch.runtime.session import open_session
from headsearch.runtime.single import point_of
from headsearch.runtime.worker import run_worker
from headsearch.search import snapshot, studies
from headsearch.study_file import load_study

STUDIES = Path(__file__).parents[1] / "studies"
FILES = sorted(STUDIES.rglob("*.toml"))
TRAIN, TEST = 30, 10
"""Images of each class."""


def drawn_images(folder: Path) -> None:
    """Ten classes of noise, each with a grey level of its own."""
    noise = np.random.default_rng(0)
    for label in range(10):
        for split, count in (("train", TRAIN), ("test", TEST)):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(15 * label)
                Image.fromarray(pixels).save(place / f"{index}.jpg")


def some_of(source: Path, folder: Path) -> None:
    """The first images of each class of a large folder."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        for place in sorted((source / split).iterdir()):
            (folder / split / place.name).mkdir(parents=True)
            for image in sorted(place.iterdir())[:count]:
                (folder / split / place.name / image.name).symlink_to(image)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's where $HEADSEARCH_TEST_CIFAR10 names a folder of them, else images of our own."""
    folder = tmp_path_factory.mktemp("images")
    named = os.environ.get("HEADSEARCH_TEST_CIFAR10", "")
    if named:
        some_of(Path(named), folder)
    else:
        drawn_images(folder)
    return folder


@pytest.fixture(scope="module")
def home(open_folder_factory: Callable[..., AbstractContextManager[Path]]) -> Iterator[Path]:
    with open_folder_factory("headsearch-home-") as folder:
        yield folder


def reduced(images: Path) -> list[str]:
    return [
        "data.name=folder", f"data.root={images}", "data.classes=all", "data.image_size=32", "data.limit=200",
        "encoder.name=small-resnet", "encoder.width=8", "encoder.stem=auto", "encoder.pretrained=false",
        "training.batch_size=32", "optimizer.warmup_epochs=0", "autoencoder.epochs=1",
        "probe.offline_epochs=1", "budget.epochs=1", "budget.rungs=[]",
    ]  # fmt: skip


def test_each_file_has_a_name_of_its_own_and_asks_something() -> None:
    specs = {path: load_study(path) for path in FILES}
    assert len({spec.name for spec in specs.values()}) == len(FILES)
    for path, spec in specs.items():
        assert spec.question.endswith("?"), path
        assert path.read_text().startswith("# "), path


def test_a_point_may_need_its_own_overrides() -> None:
    """The command that a run prints for its best trial, where the file alone would not fit the epochs."""
    path = STUDIES / "ouyang2025" / "simclr-cifar10.toml"
    run = ["budget.epochs=2", "optimizer.warmup_epochs=1"]
    load_study(path, run)
    point = point_of(path, [*run, "system=ouyang2025-simclr-sparse"])
    assert (point.training.epochs, point.optimizer.warmup_epochs, point.head.kind) == (2, 1, "sparse")
    with pytest.raises(SpecError, match=r"warmup_epochs: 10 \(recipe ouyang2025-simclr-cifar\) is not below"):
        point_of(path, ["budget.epochs=2"])
    with pytest.raises(SpecError, match=r"optimizer\.warmup_epochs: 3 .* is not below the 2 epochs"):
        point_of(path, ["budget.epochs=2", "optimizer.warmup_epochs=3"])


def test_all_are_bundled() -> None:
    assert {path.resolve() for path in bundled().values()} == set(FILES)
    assert {"quickstart", "systems", "ouyang2025/simclr-cifar10"} <= bundled().keys()


def hint_of(path: Path) -> list[str]:
    """Overrides that a file's comment suggests for a small try."""
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    return re.findall(r"--set (?!data\.name|data\.root|PATH)([a-z_.]+=[^\s\\#]+)", comment)


HINTED = [path for path in FILES if hint_of(path)]


@pytest.mark.parametrize("path", HINTED, ids=[str(path.relative_to(STUDIES)) for path in HINTED])
def test_hints_make_a_smaller_study_that_still_asks_something(path: Path) -> None:
    small, whole = load_study(path, hint_of(path)), load_study(path)
    assert small.name != whole.name
    assert small.budget.epochs < whole.budget.epochs
    assert len(small.cells()) > len(small.seeds), "one point answers nothing"


@pytest.mark.postgres
@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(STUDIES)) for path in FILES])
def test_two_trials(
    path: Path, images: Path, home: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSEARCH_HOME", str(home))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    spec = load_study(path, reduced(images))
    lines: list[str] = []
    with open_session() as session:
        studies.create(session.database, spec)
    result = run_worker(spec.name, device="cpu", threads=1, count=2, say=lines.append)
    assert (result.ended, result.failed) == (2, 0), lines
    with open_session() as session:
        trials: list[Any] = snapshot.read(session.database, spec.name).complete
    assert len(trials) == 2
    for trial in trials:
        assert 0 <= trial.probe_accuracy <= 1
        assert 0 <= trial.test_accuracy <= 1
        assert trial.facts["protocol"] == spec.protocol
        assert {"knn_accuracy", "bound_lower", "feature_alignment"} <= trial.facts["measures"].keys()

"""Checks that need the data, made before a study is."""

from __future__ import annotations

import itertools
from pathlib import Path

from headsearch import space as spaces
from headsearch.config import DataConfig, TrialConfig
from headsearch.core.images import ImageSet, load_images
from headsearch.errors import SpecError
from headsearch.search.imagesets import KnownImages, image_key
from headsearch.spec import StudySpec

MOST_POINTS = 5000
MOST_NAMES = 10


def check(spec: StudySpec, home: Path) -> list[str]:
    """Load every data set that the study uses and see that its batches fit; returns what is worth a note.

    What is decoded here stays in the cache, where workers find it.

    Raises:
        DataError: A data set is missing, damaged or too small for its splits.
        SpecError: A batch is larger than the training split.
        StorageError: The cache cannot be written.
    """
    return [note for _, notes in examine(spec, home) for note in notes]


def examine(spec: StudySpec, home: Path) -> list[tuple[KnownImages, list[str]]]:
    """Do what `check` does; returns also which images each data set holds."""
    found = []
    for data, batch in data_sets(spec).items():
        notes = check_data(data, batch, home)
        found.append((told_of(data, load_images(data, home=home)), notes))
    return found


def told_of(data: DataConfig, images: ImageSet) -> KnownImages:
    """What a study keeps of the images that `data` loads."""
    return KnownImages(image_key(data), images.fingerprint, images.counts)


def data_sets(spec: StudySpec) -> dict[DataConfig, int]:
    """What the study's trials load, and the largest batch of each."""
    sets: dict[DataConfig, int] = {}
    for config in _configs(spec):
        # Normalisation is done on the device and changes nothing that is loaded.
        data = config.data.model_copy(update={"normalization": "none"})
        sets[data] = max(sets.get(data, 0), config.training.batch_size)
    return sets


def check_data(data: DataConfig, batch_size: int, home: Path) -> list[str]:
    """Load one data set; raises as `check` does."""
    images = load_images(data, home=home)
    if batch_size > (most := len(images.pretraining)):
        raise SpecError(
            f"training.batch_size: {batch_size} is more than the {most} training images of "
            f"{data.name}; it can be at most that"
        )
    return notes_of(data, images)


def notes_of(data: DataConfig, images: ImageSet) -> list[str]:
    """Lines for people on the images that `data` loads: what was found, used, ignored and left out."""
    notes = list(images.notes)
    if not images.skipped:
        return notes
    names = ", ".join(images.skipped[:MOST_NAMES])
    more = f" and {len(images.skipped) - MOST_NAMES} more" if len(images.skipped) > MOST_NAMES else ""
    return [
        *notes,
        f"left out {len(images.skipped)} unreadable images of {data.root or data.name}: {names}{more}",
    ]


def _configs(spec: StudySpec) -> list[TrialConfig]:
    points = iter(dict(point) for point in spec.points) if spec.points else spaces.corners(spec.space)
    return [spec.trial_config(params, spec.seeds[0]) for params in itertools.islice(points, MOST_POINTS)]

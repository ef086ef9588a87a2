"""The data set `folder`: train/<class>/* and test/<class>/* under one root."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headsearch.core.decoding import Decoded, Pictures, Pixels, decode_file, decode_files
from headsearch.errors import DataError, StorageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
SIDES = range(4, 1025)
"""Image sizes that data.image_size allows."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """Image files of a folder, by split, in sorted order. `labels` index `classes`."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    """(path relative to the root, label)"""
    test: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.train) + len(self.test)


def list_folder(root: Path) -> Listing:
    """List what there is under `root`; hidden files and other extensions than images' are ignored.

    Raises DataError if a split or a class is empty, if there are fewer than two classes, or if the splits'
    classes differ.
    """
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a folder; it must hold train/<class>/* and test/<class>/*")
    found = {split: _list_split(root, split) for split in ("train", "test")}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        raise DataError(
            f"data.root: {root / 'train'} has {len(classes)} class folders; at least 2 are needed"
        )
    if differing := sorted(set(classes) ^ set(found["test"])):
        raise DataError(
            f"data.root: train and test under {root} have different classes: only one of them has "
            f"{some(differing)}"
        )
    files = {
        split: tuple((name, label) for label, cls in enumerate(classes) for name in by_class[cls])
        for split, by_class in found.items()
    }
    return Listing(root, classes, files["train"], files["test"])


def file_states(root: Path, names: Sequence[str]) -> list[tuple[str, int, int, bool]]:
    """(name, size, mtime in ns, readable) of each file: changes when its content does. Follows links."""
    states = []
    for name in names:
        path = f"{root}/{name}"
        try:
            state = os.stat(path)  # noqa: PTH116  a Path for each of a million files costs more than the stat
        except OSError:
            states.append((name, -1, -1, False))  # a dangling link: unreadable until it is mended
        else:
            states.append((name, state.st_size, state.st_mtime_ns, os.access(path, os.R_OK)))
    return states


def read_folder(
    listing: Listing, size: int | None, max_unreadable: float, scratch: Path, *, squeeze: bool = False
) -> Decoded:
    """Decode every file of `listing` to `size` (None: the first image's shorter side).

    `scratch` is a folder for intermediate arrays. Unreadable files are logged and left out. Raises
    DataError if their share is above `max_unreadable`, or if a class has no readable image left.
    """
    side = size if size is not None else _first_side(listing)
    splits: dict[str, Pictures] = {}
    skipped: list[str] = []
    _log.info("decoding %d images of %s to %d x %d", len(listing), listing.root, side, side)
    for split, files in (("train", listing.train), ("test", listing.test)):
        paths = [listing.root / name for name, _ in files]
        images, failures = decode_files(paths, side, scratch / f"{split}.raw.npy", squeeze=squeeze)
        for index, reason in sorted(failures.items()):
            _log.warning("left out %s: %s", paths[index], reason)
            skipped.append(files[index][0])
        labels = np.array([label for _, label in files], dtype=np.int64)
        readable = np.array([index not in failures for index in range(len(files))])
        splits[split] = Pictures(_compact(images, np.flatnonzero(readable)), labels[readable])
    check_skipped(skipped, len(listing), max_unreadable)
    for split, pictures in splits.items():
        present = np.bincount(pictures.labels, minlength=len(listing.classes))
        if not present.all():
            lost = listing.classes[int(np.argmin(present))]
            raise DataError(f"data.root: no image in {listing.root / split / lost} can be read")
    return Decoded(listing.classes, splits["train"], splits["test"], len(listing), tuple(skipped))


def check_skipped(skipped: Sequence[str], total: int, allowed: float) -> None:
    """Raise DataError if the unreadable files are more than the share `allowed` of all."""
    if len(skipped) > allowed * total:
        raise DataError(
            f"data.max_unreadable_fraction: {len(skipped)} of {total} images are unreadable, more than "
            f"{allowed:g}: {some(skipped)}"
        )


def some(names: Sequence[str], count: int = 3) -> str:
    """Join the first few names, for a message."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _list_split(root: Path, split: str) -> dict[str, list[str]]:
    """Sorted relative file names by class."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"data.root: {folder} is missing; {root} must hold train/<class>/* and test/<class>/*"
        )
    by_class: dict[str, list[str]] = {}
    try:
        for entry in list(os.scandir(folder)):  # read to its end, so that it is closed whatever follows
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            by_class[entry.name] = sorted(
                f"{split}/{entry.name}/{file.name}"
                for file in os.scandir(entry)
                if not file.name.startswith(".")
                and os.path.splitext(file.name)[1].lower() in EXTENSIONS  # noqa: PTH122  as above
                and (file.is_file() or file.is_symlink())
            )
            if not by_class[entry.name]:
                raise DataError(
                    f"data.root: {folder / entry.name} holds no image ({' '.join(sorted(EXTENSIONS))})"
                )
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: cannot be listed ({error.strerror})") from error
    return by_class


def _compact(images: Pixels, kept: NDArray[np.int64]) -> Pixels:
    """Move the rows `kept` (ascending) to the front, in place: `images` may not fit into memory."""
    if len(kept) < len(images):
        for start in range(0, len(kept), 1024):
            rows = kept[start : start + 1024]
            images[start : start + len(rows)] = images[rows]
    return images[: len(kept)]


def _first_side(listing: Listing) -> int:
    """Shorter side of the first training image that can be decoded."""
    from PIL import Image

    for name, _ in listing.train:
        path = listing.root / name
        try:
            decode_file(path, SIDES[0])
            with Image.open(path) as image:
                side = min(image.size)
        except Exception:  # noqa: BLE001, S112  reported when all files are decoded
            continue
        if side not in SIDES:
            raise DataError(
                f"data.image_size: {path} is {side} pixels wide or high; set a size from "
                f"{SIDES[0]} to {SIDES[-1]}"
            )
        return side
    raise DataError(f"data.root: no image in {listing.root / 'train'} can be read")

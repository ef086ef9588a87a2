"""The data set `folder`: train/<class>/**, test/<class>/** and unlabelled/** under one root."""

from __future__ import annotations

import errno
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headsearch.core.decoding import Decoded, Pictures, compacted, decode_file, decode_splits
from headsearch.core.photos import PhotoArray
from headsearch.core.splits import held_out, stratified_order
from headsearch.errors import DataError, StorageError

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""All that torchvision's ImageFolder takes, other names of the same formats, and GIF."""
SIDES = range(4, 1025)
"""Image sizes that data.image_size allows."""
SPLITS = ("train", "test")
UNLABELLED = "unlabelled"
LAYOUT = "train/<class>/** and test/<class>/**, and may hold unlabelled/**"
MOST_NAMES = 20
"""Missing classes that are named."""
FEW = 0.1
"""Share of the images up to which those of another size than all others are named: they may be mistakes."""

_log = logging.getLogger(__name__)


@dataclass
class Ignored:
    """What was found and is not used: for each reason how many, and the first few names."""

    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        count, names = self.found.get(reason, (0, []))
        self.found[reason] = count + 1, [*names, name] if len(names) < 3 else names

    @property
    def count(self) -> int:
        """How many, for all reasons."""
        return sum(count for count, _ in self.found.values())

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"ignored {count} {reason}: {some(names + [''] * (count - len(names)))}"
            for reason, (count, names) in sorted(self.found.items())
        ]


@dataclass(frozen=True)
class Listing:
    """Image files of a folder, by split, in sorted order. `labels` index `classes`."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    """(path relative to the root, label); empty where there is no train/ and the test images are halved."""
    test: tuple[tuple[str, int], ...]
    unlabelled: tuple[str, ...] = ()
    ignored: Ignored = field(default_factory=Ignored)
    notes: tuple[str, ...] = ()
    test_folder: str = "test"

    def __len__(self) -> int:
        return len(self.train) + len(self.test) + len(self.unlabelled)

    @property
    def names(self) -> list[str]:
        """All files that are decoded."""
        return [name for name, _ in self.train + self.test] + list(self.unlabelled)

    def lines(self, unreadable: Sequence[str] = ()) -> list[str]:
        """What was found, used and ignored; `unreadable` are names that turned out to be."""
        lost = Counter(name.partition("/")[0] for name in unreadable)
        counts = {
            "train": len(self.train),
            self.test_folder: len(self.test),
            UNLABELLED: len(self.unlabelled),
        }
        used = ", ".join(f"{n - lost[split]:,} in {split}" for split, n in counts.items() if n)
        found = len(self) + self.ignored.count
        images = f"{len(self) - len(unreadable):,} images used ({used})"
        rest = f"{len(unreadable):,} unreadable, {self.ignored.count:,} ignored"
        return [
            f"{self.root}: {found:,} entries found; {images}, {rest}",
            *self.ignored.lines(),
            *self.notes,
        ]


def list_folder(root: Path, *, unlabelled: bool = True, only: Sequence[str] = ()) -> Listing:
    """List the images under `root`, at any depth below a class folder, and count all that is ignored.

    Hidden entries and files without an image's extension are ignored. Class names that look equal (Unicode's
    composed and decomposed forms) are one class. Without train/, the labelled images are those of test/.
    With `only`, of ImageNet's classes, those of other names are ignored, and val/ may stand for test/.

    Raises DataError if a split or a class is empty, if a class of `only` is missing, if there are fewer than
    two classes, or if the splits' classes differ; StorageError if a folder cannot be listed.
    """
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a folder; it must hold {LAYOUT}")
    ignored, notes = Ignored(), list[str]()
    loose: list[str] = []
    as_imagenet = bool(only) and not (root / "test").is_dir() and (root / "val").is_dir()
    folders = {"train": "train", "test": "val" if as_imagenet else "test"}
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.name in (*folders.values(), UNLABELLED) and _is_folder(entry):
                continue
            if _is_folder(entry) or not entry.name.startswith("."):
                ignored.add(f"beside {', '.join(folders.values())} and {UNLABELLED}", entry.name)
        if (root / UNLABELLED).is_dir() and unlabelled:
            loose = sorted(_walk(root / UNLABELLED, UNLABELLED, ignored, _identities(root)))
            if not loose:
                raise DataError(f"data.root: {root / UNLABELLED} holds no image ({_extensions()})")
    except OSError as error:
        raise _unlisted(error, root) from error
    if (root / UNLABELLED).is_dir() and not unlabelled:
        notes.append(f"{UNLABELLED} is not used, as data.unlabelled says")
    halved = bool(loose) and not (root / "train").is_dir()
    found = {split: _list_split(root, folders[split], ignored, notes, only) for split in SPLITS[halved:]}
    first = SPLITS[halved]
    classes = tuple(sorted(found[first]))
    if len(classes) < 2:
        raise DataError(f"data.root: {root / first} has {len(classes)} class folders; at least 2 are needed")
    if differing := sorted(set(classes) ^ set(found["test"])):
        raise DataError(
            f"data.root: train and test under {root} have different classes: only one of them has "
            f"{some(differing)}"
        )
    if halved:
        notes.append("there is no train: half of each class in test is held for training, the rest tests")
    files = {
        split: tuple((name, label) for label, cls in enumerate(classes) for name in by_class[cls])
        for split, by_class in found.items()
    }
    return Listing(
        root,
        classes,
        files.get("train", ()),
        files["test"],
        tuple(loose),
        ignored,
        tuple(notes),
        folders["test"],
    )


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
    listing: Listing, size: int | None, max_unreadable: float, scratch: Path, *, stored_side: int
) -> Decoded:
    """Decode every file of `listing`, as `decode_splits` does (`size` None: the first image's shorter side).

    `scratch` is a folder for intermediate arrays. Unreadable files are logged and left out. Raises
    DataError if their share is above `max_unreadable`, or if a class has no readable image left.
    """
    side = size if size is not None else _first_side(listing)
    _log.info("decoding %d images of %s", len(listing), listing.root)
    files = {
        "train": listing.train,
        "test": listing.test,
        UNLABELLED: tuple((name, -1) for name in listing.unlabelled),
    }
    paths = {
        scratch / f"{split}.raw.npy": [listing.root / name for name, _ in of] for split, of in files.items()
    }
    read, notes = decode_splits(paths, side, stored_side=stored_side)
    splits: dict[str, Pictures] = {}
    skipped: list[str] = []
    others: list[str] = []
    for split, (target, places) in zip(files, paths.items(), strict=True):
        images, failures = read[target].images, read[target].failures
        for index, reason in sorted(failures.items()):
            _log.warning("left out %s: %s", places[index], reason)
            skipped.append(files[split][index][0])
        labels = np.array([label for _, label in files[split]], dtype=np.int64)
        readable = np.array([index not in failures for index in range(len(places))], dtype=bool)
        kept = np.flatnonzero(readable)
        others += [files[split][index][0] for index in np.flatnonzero(readable & read[target].other_size)]
        whole = images[kept] if isinstance(images, PhotoArray) else compacted(images, kept)
        splits[split] = Pictures(whole, labels[readable])
    check_skipped(skipped, len(listing), max_unreadable)
    if 0 < len(others) <= FEW * (len(listing) - len(skipped)):
        notes.append(
            f"{len(others):,} of {len(listing) - len(skipped):,} images are not {side} x {side} pixels: "
            f"{some(others)}; because of them all are cropped as photos are, which takes longer"
        )
    for split in SPLITS[not listing.train :]:
        present = np.bincount(splits[split].labels, minlength=len(listing.classes))
        if not present.all():
            lost = listing.classes[int(np.argmin(present))]
            folder = listing.root / (listing.test_folder if split == "test" else split) / lost
            raise DataError(f"data.root: no image in {folder} can be read")
    if not listing.train:
        splits["train"], splits["test"] = _halves(splits["test"], listing.classes)
    return Decoded(
        listing.classes,
        splits["train"],
        splits["test"],
        len(listing),
        tuple(skipped),
        splits[UNLABELLED].images if listing.unlabelled else None,
        tuple(notes),
        view_side=side,
    )


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


def _list_split(
    root: Path, split: str, ignored: Ignored, notes: list[str], only: Sequence[str]
) -> dict[str, list[str]]:
    """Sorted relative file names by class; of the classes `only`, where there are any."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"data.root: {folder} is missing; {root} must hold {LAYOUT}")
    by_class: dict[str, list[str]] = {}
    folders: dict[str, str] = {}
    try:
        above = _identities(root, folder)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = f"{split}/{entry.name}"
            if entry.name.startswith("."):
                ignored.add("hidden", name)
                continue
            if not _is_folder(entry):
                ignored.add("links that lead nowhere" if _dangles(entry) else "not in a class folder", name)
                continue
            cls = unicodedata.normalize("NFC", entry.name)
            if only and cls not in only:
                ignored.add("folders of other classes than data.classes has", name)
                continue
            if cls in folders:
                notes.append(f"{folders[cls]!a} and {name!a} look the same: they are one class")
            folders.setdefault(cls, name)
            by_class.setdefault(cls, []).extend(_walk(Path(entry.path), name, ignored, above))
    except OSError as error:
        raise _unlisted(error, folder) from error
    if missing := [cls for cls in only if cls not in by_class]:
        raise DataError(
            f"data.classes: {folder} lacks {len(missing)} of the {len(only)} classes: "
            f"{some(missing, MOST_NAMES)}"
        )
    for cls, files in by_class.items():
        files.sort()
        if not files:
            raise DataError(f"data.root: {root / folders[cls]} holds no image ({_extensions()})")
    return by_class


def _walk(folder: Path, name: str, ignored: Ignored, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Relative names of the images in and below `folder`. Links are followed, but not to folders `above`."""
    above |= _identities(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        inside = f"{name}/{entry.name}"
        if entry.name.startswith("."):
            ignored.add("hidden", inside)
        elif _is_folder(entry):
            if _identities(Path(entry.path)) <= above:
                ignored.add("links to a folder above them", inside)
            else:
                yield from _walk(Path(entry.path), inside, ignored, above)
        elif (extension := os.path.splitext(entry.name)[1].lower()) not in EXTENSIONS:  # noqa: PTH122
            reason = f"not named like an image ({extension or 'no extension'})"
            ignored.add("links that lead nowhere" if _dangles(entry) else reason, inside)
        elif _is_special(entry):
            ignored.add("that are no regular files", inside)
        else:
            yield inside


def _identities(*folders: Path) -> frozenset[tuple[int, int]]:
    states = [folder.stat() for folder in folders]
    return frozenset((state.st_dev, state.st_ino) for state in states)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link in a circle, or into a folder that is closed to us


def _dangles(entry: os.DirEntry[str]) -> bool:
    try:
        entry.stat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
    return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """A device, a pipe or a socket: opening it may wait for ever."""
    if entry.is_file(follow_symlinks=False):
        return False  # without a system call, as most are
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False  # it is named when it cannot be decoded


def _unlisted(error: OSError, folder: Path) -> StorageError:
    return StorageError(f"{error.filename or folder}: cannot be listed ({error.strerror})")


def _extensions() -> str:
    return " ".join(sorted(EXTENSIONS))


def _halves(pictures: Pictures, classes: tuple[str, ...]) -> tuple[Pictures, Pictures]:
    """Split labelled images in two, half of each class each. Raises DataError if a class has one image."""
    order = stratified_order(pictures.labels, salt=1)
    count = held_out(pictures.labels[order], 0.5)
    test, train = np.sort(order[:count]), np.sort(order[count:])
    few = np.bincount(pictures.labels[test], minlength=len(classes)) == 0
    if few.any():
        raise DataError(
            f"data.root: class {classes[int(np.argmax(few))]!r} in test has too few images to train on half "
            "of them and test on the others"
        )
    parts = [Pictures(pictures.images[rows], pictures.labels[rows]) for rows in (train, test)]
    return parts[0], parts[1]


def _first_side(listing: Listing) -> int:
    """Shorter side of the first training image that can be decoded."""
    from PIL import Image

    for name, _ in listing.train or listing.test:
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
    split = "train" if listing.train else listing.test_folder
    raise DataError(f"data.root: no image in {listing.root / split} can be read")

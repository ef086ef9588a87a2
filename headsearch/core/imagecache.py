"""Decoded data sets on disk: one folder per content, made once, opened memory-mapped.

A folder ``<key>/`` holds images and labels of both original splits as .npy, in stratified order, and
``facts.json``; unlabelled images follow those of the training split in the same file, with label -1. What
is opened is compared with its content hash, once for each size and time of its files. It is filled under
the name ``<key>.part`` by whoever holds the lock ``<key>.lock``, and renamed when it is whole; a killed
writer leaves a ``.part`` that the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from headsearch.core.decoding import Decoded, Pictures, Pixels, Stored, new_array
from headsearch.core.photos import PhotoArray, sizes_of
from headsearch.core.splits import Labels, Rows, stratified_order
from headsearch.core.value_range import LOOKED_AT, doubts
from headsearch.errors import StorageError

VERSION = 4
"""Counts changes of this code that change pixels, order or layout; part of every key."""

_CHUNK_BYTES = 32 << 20
_log = logging.getLogger(__name__)


def cache_key(identity: dict[str, object]) -> str:
    """Name of what `identity` (JSON values) determines."""
    text = json.dumps({"version": VERSION, **identity}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached(folder: Path, key: str, read: Callable[[Path], Decoded]) -> tuple[Decoded, str]:
    """Return the data set `key` and its content hash; `read(scratch folder)` makes it if need be.

    However many processes ask at once, one reads and the others wait. Images are memory-mapped. Raises
    StorageError if `folder` cannot be written.
    """
    path = folder / key
    try:
        if (hit := _open(path, tell=False)) is not None:
            return hit
        with locked(folder / f"{key}.lock"):
            if (hit := _open(path)) is not None:
                return hit
            part = folder / f"{key}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)
            part.mkdir()
            try:
                _write(part, read)
                part.rename(path)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            _sync(folder)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: cannot be written ({error.strerror or error})"
        ) from error
    made = _open(path)
    if made is None:
        raise StorageError(f"{path}: what was written there cannot be read back; is the disk in order?")
    return made


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which stays. The kernel frees it if we are killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Content:
    """Hash of classes, labels and pixels, whatever the chunks they come in."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)

    def split(self, name: str, images: Stored, labels: Labels) -> None:
        """Begin with a split; its rows follow."""
        shape = images.shapes.tolist() if isinstance(images, PhotoArray) else images.shape
        self._digest.update(json.dumps([name, shape]).encode() + labels.astype("<i8").tobytes())

    def rows(self, images: Pixels) -> None:
        """Take in images of the split."""
        self._digest.update(np.ascontiguousarray(images).data)

    def hex(self) -> str:
        """The hash of all that was taken in."""
        return self._digest.hexdigest()


def _chunks(images: Stored) -> Iterator[Pixels]:
    """The images in their order, as many at a time as fit into memory; each photo by itself."""
    if isinstance(images, PhotoArray):
        yield from images.chunks()
        return
    rows = max(1, _CHUNK_BYTES // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), rows):
        yield images[start : start + rows]


def _reordered(images: Stored, order: Rows) -> Iterator[Pixels]:
    """The rows `order` of images, as many at a time as fit into memory."""
    if isinstance(images, PhotoArray):
        yield from images[order].chunks()
        return
    rows = max(1, _CHUNK_BYTES // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(order), rows):
        yield images[order[start : start + rows]]


def _write(part: Path, read: Callable[[Path], Decoded]) -> None:
    scratch = part / "scratch"
    scratch.mkdir()
    decoded = read(scratch)
    content = _Content(decoded.classes)
    notes = list(decoded.notes)
    loose = decoded.unlabelled
    for split, pictures in (("train", decoded.train), ("test", decoded.test)):
        order = stratified_order(pictures.labels)
        labels = pictures.labels[order]
        content.split(split, _rows(pictures.images, order), labels)
        parts = [_reordered(pictures.images, order)]
        extra = 0
        if split == "train" and loose is not None:
            # Shuffled once, so that the first of them are as good as any.
            shuffled = stratified_order(np.zeros(len(loose), dtype=np.int64))
            parts.append(_reordered(loose, shuffled))
            extra = len(loose)
        np.save(part / f"{split}_labels.npy", np.concatenate([labels, np.full(extra, -1, dtype=np.int64)]))
        if isinstance(pictures.images, PhotoArray):
            shapes = pictures.images.shapes[order]
            if extra:
                assert isinstance(loose, PhotoArray)  # noqa: S101
                shapes = np.concatenate([shapes, loose.shapes[shuffled]])
            np.save(part / f"{split}_shapes.npy", shapes)
            out = new_array(part / f"{split}.npy", (max(1, int(sizes_of(shapes).sum())),))
        else:
            out = new_array(part / f"{split}.npy", (len(labels) + extra, *pictures.images.shape[1:]))
        place = 0
        for number, chunks in enumerate(parts):
            if number:
                assert loose is not None  # noqa: S101
                unlabelled = _Content(())
                unlabelled.split("unlabelled", _rows(loose, shuffled), np.empty(0, dtype=np.int64))
            for chunk in chunks:
                out[place : place + len(chunk)] = chunk
                place += len(chunk)
                (unlabelled if number else content).rows(chunk)
        if split == "train":
            notes += doubts(out[: len(labels)] if out.ndim > 1 else _rows_of_bytes(out))
    shutil.rmtree(scratch)
    facts = {
        "content": content.hex() + (unlabelled.hex() if loose is not None else ""),
        "classes": decoded.classes,
        "skipped": decoded.skipped,
        "total": decoded.total,
        "unlabelled": 0 if loose is None else len(loose),
        "view_side": decoded.view_side,
        "notes": notes,
    }
    (part / "facts.json").write_text(json.dumps(facts, indent=1))
    for file in part.iterdir():
        _sync(file)
    _sync(part)


def _rows_of_bytes(data: Pixels) -> Pixels:
    """The first bytes of photos, in as many rows as `doubts` looks at; a row of them stands for an image."""
    length = max(1, min(len(data), _CHUNK_BYTES) // LOOKED_AT)
    return data[: len(data) // length * length].reshape(-1, length)


def _rows(images: Stored, order: Rows) -> Stored:
    """The rows `order`, for their shape only: no pixel of a plain array moves."""
    return images[order] if isinstance(images, PhotoArray) else images


def _images(path: Path, split: str) -> Stored:
    # Copy-on-write: writable in name, as torch wants it, while the file stays as it is.
    data: Pixels = np.load(path / f"{split}.npy", mmap_mode="c")
    if data.ndim > 1:
        return data
    return PhotoArray.packed(data, np.load(path / f"{split}_shapes.npy"))


def _open(path: Path, *, tell: bool = True) -> tuple[Decoded, str] | None:
    """Return the data set at `path`, or None if there is none that is whole; `tell` logs why."""
    try:
        facts = json.loads((path / "facts.json").read_text())
        images = {split: _images(path, split) for split in ("train", "test")}
        labels = {split: np.load(path / f"{split}_labels.npy") for split in ("train", "test")}
        known = len(labels["train"]) - facts["unlabelled"]
        decoded = Decoded(
            tuple(facts["classes"]),
            Pictures(images["train"][:known], labels["train"][:known]),
            Pictures(images["test"], labels["test"]),
            facts["total"],
            tuple(facts["skipped"]),
            images["train"][known:] if facts["unlabelled"] else None,
            tuple(facts["notes"]),
            images["train"],
            facts["view_side"],
        )
        if not _checked(path, decoded, facts["content"]):
            if tell:
                _log.warning("%s does not hold what was written there; it will be made again", path)
            return None
        return decoded, str(facts["content"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        if tell:
            _log.warning("%s is damaged and will be made again: %s", path, error)
        return None


def _checked(path: Path, decoded: Decoded, content: str) -> bool:
    """Whether pixels and labels are those that were written; read once for each size and time of files."""
    record = path / "checked.json"
    states = {"content": content}
    for file in sorted(path.glob("*.npy")):
        state = file.stat()
        states[file.name] = f"{state.st_size} {state.st_mtime_ns}"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(record.read_text()) == states:
            return True
    found = _Content(decoded.classes)
    for split, pictures in (("train", decoded.train), ("test", decoded.test)):
        found.split(split, pictures.images, pictures.labels)
        for chunk in _chunks(pictures.images):
            found.rows(chunk)
    said = found.hex()
    if decoded.unlabelled is not None:
        found = _Content(())
        found.split("unlabelled", decoded.unlabelled, np.empty(0, dtype=np.int64))
        for chunk in _chunks(decoded.unlabelled):
            found.rows(chunk)
        said += found.hex()
    if said != content:
        return False
    temporary = path / f".checked.{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):  # others' cache, which we may only read: checked by each process
        temporary.write_text(json.dumps(states))
        temporary.rename(record)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

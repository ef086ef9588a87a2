"""Decoded data sets on disk: one folder per content, made once, opened memory-mapped.

A folder ``<key>/`` holds images and labels of both original splits as .npy, in stratified order, and
``facts.json``. It is filled under the name ``<key>.part`` by whoever holds the lock ``<key>.lock``, and
renamed when it is whole; a killed writer leaves a ``.part`` that the next one removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from headsearch.core.decoding import Decoded, Pictures, new_array
from headsearch.core.splits import stratified_order
from headsearch.errors import StorageError

VERSION = 1
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
        if (hit := _open(path)) is not None:
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


def _write(part: Path, read: Callable[[Path], Decoded]) -> None:
    scratch = part / "scratch"
    scratch.mkdir()
    decoded = read(scratch)
    digest = hashlib.blake2b(json.dumps(decoded.classes).encode(), digest_size=16)
    for split, pictures in (("train", decoded.train), ("test", decoded.test)):
        order = stratified_order(pictures.labels)
        labels, shape = pictures.labels[order], pictures.images.shape
        digest.update(json.dumps([split, shape]).encode() + labels.astype("<i8").tobytes())
        np.save(part / f"{split}_labels.npy", labels)
        out = new_array(part / f"{split}.npy", shape)
        rows = max(1, _CHUNK_BYTES // int(np.prod(shape[1:])))
        for start in range(0, len(order), rows):
            chunk = pictures.images[order[start : start + rows]]
            out[start : start + rows] = chunk
            digest.update(np.ascontiguousarray(chunk).data)
    shutil.rmtree(scratch)
    facts = {
        "content": digest.hexdigest(),
        "classes": decoded.classes,
        "skipped": decoded.skipped,
        "total": decoded.total,
    }
    (part / "facts.json").write_text(json.dumps(facts, indent=1))
    for file in part.iterdir():
        _sync(file)
    _sync(part)


def _open(path: Path) -> tuple[Decoded, str] | None:
    """Return the data set at `path`, or None if there is none that is whole."""
    try:
        facts = json.loads((path / "facts.json").read_text())
        splits = {
            split: Pictures(
                # Copy-on-write: writable in name, as torch wants it, while the file stays as it is.
                np.load(path / f"{split}.npy", mmap_mode="c"),
                np.load(path / f"{split}_labels.npy"),
            )
            for split in ("train", "test")
        }
        classes, skipped = tuple(facts["classes"]), tuple(facts["skipped"])
        decoded = Decoded(classes, splits["train"], splits["test"], facts["total"], skipped)
        return decoded, str(facts["content"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError) as error:
        _log.warning("%s is damaged and will be made again: %s", path, error)
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints of one training, safe against a kill at any instant and against damaged files."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import torch

from headsearch.core.memory import memory_checked
from headsearch.core.state_snapshot import Snapshot
from headsearch.errors import StorageError, TrialFailure

logger = logging.getLogger(__name__)

MAGIC: Final = b"headsearch checkpoint 1\n"
DIGEST_BYTES: Final = 32
KEPT: Final = 2
NAME: Final = re.compile(r"(\d{6,})\.checkpoint")
PER_GENERATION: Final = 1_000_000


class Checkpoints(Protocol):
    """The last states of one training, wherever they are kept.

    `generation` rises whenever the training goes to another owner. States of a later one are newer, so what
    an owner that was replaced still writes is never loaded in their place.
    """

    generation: int

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep `state`: tensors, numbers, strings, and dicts, lists and tuples of them.

        Raises StorageError if that fails.
        """

    def flush(self) -> None:
        """Return once every saved state is kept. Raises what keeping it raised."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, tensors on the CPU, or None; for who owns the training.

        Raises StorageError; TrialFailure if memory runs out.
        """

    def peek(self) -> dict[str, Any] | None:
        """Return what `load` would, and leave everything as it is."""

    def remove(self) -> None:
        """Forget all states. Nothing happens if there are none."""

    def set_aside(self, identity: str) -> str:
        """Keep the states under another name, which is returned, so that `load` finds none."""

    def take_back(self, identity: str) -> dict[str, Any] | None:
        """Return what was set aside as of `identity`, which `load` finds from now on, or None."""


def encode(state: Mapping[str, Any]) -> list[bytes | memoryview]:
    """`state` as a magic line, a BLAKE2b digest and torch's zip of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    return [MAGIC, hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest(), content]


def decode(content: bytes) -> dict[str, Any] | None:
    """What `encode` was given, tensors on the CPU; None for anything else. Unpickles no code.

    Raises TrialFailure if a whole one needs more memory than there is: it is not damaged.
    """
    start = len(MAGIC) + DIGEST_BYTES
    body = memoryview(content)[start:]
    digest = hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
    if content[:start] != MAGIC + digest:
        return None
    try:
        with memory_checked():
            state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except TrialFailure:
        raise
    except Exception:  # noqa: BLE001 - whole, and not ours: an unpickler raises anything
        return None
    return state if isinstance(state, dict) else None


class CheckpointFolder:
    """The last two states of one training, newest first, as files under one folder of its own.

    A file appears complete or not at all.
    """

    def __init__(self, path: Path, *, generation: int = 0) -> None:
        self.path, self.generation = path, generation

    def save(self, state: Mapping[str, Any]) -> None:
        """Write `state`. StorageError if that fails."""
        parts = encode(state)
        temporary = self.path / f".{self.generation}-{uuid.uuid4().hex}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            first = self.generation * PER_GENERATION
            number = 1 + max((n for n, _ in self._own()), default=0)
            try:
                with temporary.open("wb") as file:
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(self.path / f"{max(number, first):06d}.checkpoint")
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(self.path)
            for _, path in self._own()[KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be written ({error.strerror})") from error

    def flush(self) -> None:
        """Nothing is left to wait for: `save` returns when the file is on the disk."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, tensors on the CPU, or None; log what is skipped.

        Removes half-written files: whoever loads owns the training now. StorageError if the folder cannot be
        read.
        """
        try:
            for partial in self.path.glob(".*.partial"):
                # Those of a later owner are none of our business.
                owner = partial.name[1:].partition("-")[0]
                if not owner.isdecimal() or int(owner) <= self.generation:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be read ({error.strerror})") from error
        return self.peek()

    def peek(self) -> dict[str, Any] | None:
        """Return what `load` would, and leave everything as it is: for who does not own the training.

        A file that the system does not give gives way to the one before, but StorageError is raised rather
        than None returned if one of them may be whole.
        """
        refused = None
        try:
            files = [path for _, path in self._files()]
            for path, older in zip(files, [*files[1:], None], strict=False):
                what = "is damaged"
                try:
                    content = read(path)
                except (FileNotFoundError, IsADirectoryError):
                    content = b""  # its owner went on, or it is none of ours
                except OSError as error:
                    content, refused, what = b"", error, f"cannot be read ({error.strerror})"
                state = decode(content)
                if state is not None:
                    return state
                if older or not refused:
                    instead = f"falling back to {older.name}" if older else "none is left, starting anew"
                    logger.warning("checkpoint %s %s; %s", path, what, instead)
            if refused:
                raise refused
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be read ({error.strerror})") from error
        return None

    def remove(self) -> None:
        """Delete the folder. Nothing happens if there is none."""
        try:
            shutil.rmtree(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be removed ({error.strerror})") from error

    def set_aside(self, identity: str) -> str:
        """Rename the folder; one that was set aside before stays beside it. StorageError if that fails."""
        aside = self._aside(identity)
        try:
            if aside.exists():
                aside = aside.with_name(f"{aside.name}-{uuid.uuid4().hex[:8]}")
            self.path.rename(aside)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"checkpoint in {self.path}: cannot be set aside ({error.strerror})"
            ) from error
        return str(aside)

    def take_back(self, identity: str) -> dict[str, Any] | None:
        """Rename it back. StorageError if that fails."""
        try:
            self._aside(identity).rename(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(
                f"checkpoint in {self.path}: cannot be taken back ({error.strerror})"
            ) from error
        return self.load()

    def _aside(self, identity: str) -> Path:
        return self.path.with_name(f"{self.path.name}-other-{identity[:12]}")

    def _own(self) -> list[tuple[int, Path]]:
        """Files of this owner and those before."""
        later = (self.generation + 1) * PER_GENERATION
        return [(number, path) for number, path in self._files() if number < later]

    def _files(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        found = [(NAME.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def read(path: Path) -> bytes:
    """All of a file; nothing of one that is larger than this machine's memory, as none of ours can be."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > psutil.virtual_memory().total:
            return b""
        return file.read()


def sync_folder(path: Path) -> None:
    """Make renames in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AsyncCheckpoints:
    """Any `Checkpoints`, written by a thread while the training goes on.

    `save` copies the state on its device and returns. A thread brings the copy to the host, encodes and
    writes it. At most one state is pending: the next `save` waits for it first. So states keep their order,
    and there is one copy of the state at most: first on the device, then on the host, beside its encoding.

    An error of the thread is raised by the next call of any method here: StorageError, or TrialFailure if
    memory ran out. The thread ends with its write, so no thread is left after `flush`.
    """

    def __init__(self, store: Checkpoints) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def generation(self) -> int:
        """That of the store. A new one is set after the write under way, which belongs to the one before."""
        return self._store.generation

    @generation.setter
    def generation(self, value: int) -> None:
        self.flush()
        self._store.generation = value

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy `state` and have the copy written. Raises what the write before raised.

        Does not wait for the device. If there is no memory for the copy, `state` itself is written before
        this returns, as the store does it.
        """
        self.flush()
        snapshot = Snapshot.of(state)
        if snapshot is None:
            with memory_checked():
                self._store.save(state)
            return
        # Not a daemon: the interpreter's exit waits for the write, instead of stopping a thread inside torch.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def flush(self) -> None:
        """Wait for the write under way. Raises what it raised, once."""
        if self._thread is not None:
            if self._thread.ident is not None:  # else it could not be started
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # else this frame and the error keep each other, and what the traceback refers to

    def load(self) -> dict[str, Any] | None:
        """Return what the store's `load` does, after the write under way."""
        self.flush()
        return self._store.load()

    def peek(self) -> dict[str, Any] | None:
        """Return what the store's `peek` does, after the write under way."""
        self.flush()
        return self._store.peek()

    def remove(self) -> None:
        """Forget all states, also the one under way: a late write would bring the folder back."""
        try:
            self.flush()
        finally:
            self._store.remove()

    def set_aside(self, identity: str) -> str:
        """Do what the store does, after the write under way."""
        self.flush()
        return self._store.set_aside(identity)

    def take_back(self, identity: str) -> dict[str, Any] | None:
        """Do what the store does, after the write under way."""
        self.flush()
        return self._store.take_back(identity)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            with memory_checked():
                self._store.save(snapshot.on_host())
        except BaseException as error:  # noqa: BLE001 - raised in the training's thread by `flush`
            self._error = error

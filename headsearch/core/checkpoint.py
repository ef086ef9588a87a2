"""Checkpoints of one training, safe against a kill at any instant and against damaged files."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from headsearch.errors import StorageError

logger = logging.getLogger(__name__)

MAGIC: Final = b"headsearch checkpoint 1\n"
DIGEST_BYTES: Final = 32
KEPT: Final = 2
NAME: Final = re.compile(r"(\d{6,})\.checkpoint")


class CheckpointFolder:
    """The last two states of one training, newest first, under one folder of its own.

    A file is a magic line, a BLAKE2b digest and torch's zip of tensors and plain values. It appears complete
    or not at all. Loading checks the digest and unpickles no code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: Mapping[str, Any]) -> None:
        """Write `state`: tensors, numbers, strings and containers of them. StorageError if that fails."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        temporary = self.path / f".{os.getpid()}-{uuid.uuid4().hex}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            number = max((number for number, _ in self._files()), default=0) + 1
            try:
                with temporary.open("wb") as file:
                    file.writelines((MAGIC, digest, content))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(self.path / f"{number:06d}.checkpoint")
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(self.path)
            for _, path in self._files()[KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be written ({error.strerror})") from error

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, tensors on the CPU, or None; log what is skipped.

        Removes half-written files: whoever loads owns the training now. StorageError if the folder cannot be
        read.
        """
        try:
            for partial in self.path.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoint in {self.path}: cannot be read ({error.strerror})") from error
        return self.peek()

    def peek(self) -> dict[str, Any] | None:
        """Return what `load` would, and leave everything as it is: for who does not own the training."""
        try:
            for _, path in self._files():
                state = self._read(path)
                if state is not None:
                    return state
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

    def _files(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        found = [(NAME.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        content = path.read_bytes()
        start = len(MAGIC) + DIGEST_BYTES
        body = memoryview(content)[start:]
        digest = hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
        if content[:start] == MAGIC + digest:
            try:
                state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
                return state
            except (pickle.UnpicklingError, RuntimeError):
                pass  # whole, and not ours
        logger.warning("checkpoint %s is damaged; falling back to the one before", path)
        return None


def sync_folder(path: Path) -> None:
    """Make renames in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

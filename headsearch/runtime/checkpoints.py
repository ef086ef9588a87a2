"""Where a trial's checkpoints are: in the home folder, in another folder, or in a store without a disk."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from headsearch.core.checkpoint import CheckpointFolder, Checkpoints, decode, encode
from headsearch.core.memory import memory_checked
from headsearch.errors import InputError, StorageError
from headsearch.home import checkpoint_folder

if TYPE_CHECKING:
    from headsearch.search.artifacts import Store

logger = logging.getLogger(__name__)
SLOTS = (0, 1)
_stores: dict[str, Store] = {}


def open_checkpoints(
    home: Path, study: str, number: int, store: str | None, *, generation: int
) -> Checkpoints:
    """The checkpoints of one trial.

    Args:
        home: Where they are unless `store` says otherwise.
        study: The study's name for folders (`Study.folder`).
        number: The trial's.
        store: ``s3://bucket/prefix``, ``file:///folder``, or None.
        generation: The attempt that this process is.

    Raises StorageError if this machine cannot use the store at all.
    """
    if store is None:
        return CheckpointFolder(checkpoint_folder(home, study, number), generation=generation)
    if store.startswith("file:"):
        folder = Path(unquote(urlsplit(store).path)) / study / str(number)
        return CheckpointFolder(folder, generation=generation)
    return StoredCheckpoints(_store(store), f"{study}/{number}", generation=generation)


def check_store(store: str) -> None:
    """See that an object can be written, read and removed.

    Raises InputError naming the field, if it cannot.
    """
    try:
        trial = open_checkpoints(Path(), f".check-{uuid.uuid4().hex}", 0, store, generation=0)
        trial.save({"epoch": 0})
        found = trial.load()
        trial.remove()
    except StorageError as error:
        raise InputError(f"worker.checkpoint_store: {error}") from error
    if isinstance(trial, CheckpointFolder):
        with contextlib.suppress(OSError):
            trial.path.parent.rmdir()
    if found is None:
        raise InputError(f"worker.checkpoint_store: {store} does not give back what was put there")


def _store(url: str) -> Store:
    """One client for all trials of this process."""
    if url not in _stores:
        from headsearch.search.artifacts import Store  # loads Optuna

        _stores[url] = Store(url)
    return _stores[url]


class StoredCheckpoints:
    """The last states of one training as objects: two of each generation, which take turns.

    Names follow from generation and turn, so nothing is ever listed, and the newest state is never the one
    that is written over.
    """

    def __init__(self, store: Store, name: str, *, generation: int) -> None:
        self._store, self._name = store, name
        self._generation = generation
        self._saved: int | None = None
        """In this generation; None before anybody looked."""
        self._older: set[int] = set()
        """Generations that have objects."""

    @property
    def generation(self) -> int:
        """Which owner of the training this is."""
        return self._generation

    @generation.setter
    def generation(self, value: int) -> None:
        if value != self._generation:
            self._older.add(self._generation)
            self._generation, self._saved = value, None

    def save(self, state: Mapping[str, Any]) -> None:
        """Put `state`. StorageError if that fails."""
        if self._saved is None:
            self._newest(self._generation, [])
        count = (self._saved or 0) + 1
        content = encode({"turn": count, "state": dict(state)})
        self._store.write(self._key(self._generation, count % 2), content)
        self._saved = count
        if count >= len(SLOTS):  # two states are here, so those of earlier owners have served
            for generation in sorted(self._older):
                self._forget(generation)
                self._older.discard(generation)

    def flush(self) -> None:
        """Nothing is left to wait for: `save` returns when the store has the object."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, or None; log what is skipped. StorageError if that fails."""
        return self.peek()

    def peek(self) -> dict[str, Any] | None:
        """Return what `load` would."""
        damaged: list[str] = []
        for generation in range(self._generation, -1, -1):
            turn, state = self._newest(generation, damaged)
            if state is not None:
                self._tell(damaged, f"falling back to {self._key(generation, turn % 2)}")
                return state
        self._tell(damaged, "none is left, starting anew")
        return None

    def remove(self) -> None:
        """Delete all objects of this training, of this owner and those before. StorageError if that fails."""
        for generation in range(self._generation + 1):
            self._forget(generation)

    def set_aside(self, identity: str) -> str:
        """Copy the newest state to an object of its own, then remove the others."""
        state = self.load()
        aside = self._aside(identity)
        if state is not None:
            self._store.write(aside, encode({"turn": 0, "state": state}))
        self.remove()
        self._saved = 0
        return f"{self._store.url}/{aside}"

    def take_back(self, identity: str) -> dict[str, Any] | None:
        """Return the copy, and put it where `load` looks."""
        with memory_checked():
            content = self._store.read(self._aside(identity))
        match decode(content) if content is not None else None:
            case {"state": dict(state)}:
                self.save(state)
                return state
        return None

    def _aside(self, identity: str) -> str:
        return f"{self._name}-other-{identity[:12]}.checkpoint"

    def _newest(self, generation: int, damaged: list[str]) -> tuple[int, dict[str, Any] | None]:
        """Turn and state of the newest of a generation; 0 and None if none is whole."""
        newest: tuple[int, dict[str, Any] | None] = 0, None
        for slot in SLOTS:
            key = self._key(generation, slot)
            with memory_checked():
                content = self._store.read(key)
            if content is None:
                continue
            if generation != self._generation:
                self._older.add(generation)
            match decode(content):
                case {"turn": int(turn), "state": dict(state)}:
                    newest = max(newest, (turn, state), key=lambda found: found[0])
                case _:
                    damaged.append(key)
        if generation == self._generation:
            self._saved = newest[0]
        return newest

    def _tell(self, damaged: list[str], instead: str) -> None:
        for key in damaged:
            logger.warning("checkpoint %s/%s is damaged; %s", self._store.url, key, instead)

    def _forget(self, generation: int) -> None:
        for slot in SLOTS:
            self._store.remove(self._key(generation, slot))

    def _key(self, generation: int, slot: int) -> str:
        return f"{self._name}/{generation}-{slot}.checkpoint"

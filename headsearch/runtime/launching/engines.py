"""What every engine has in common: what it is asked for, and what it says that it will do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from headsearch.runtime.session import Session
from headsearch.spec import StudySpec


@dataclass(frozen=True)
class Wanted:
    """Workers, as the command line asks for them. None: the engine's own default."""

    workers: int | None = None
    device: str | None = None
    threads: int | None = None
    cpus: int | None = None
    """Per worker."""
    gpus: int | None = None
    """Per worker: 0 or 1."""
    memory_gb: float | None = None
    """Per worker."""
    minutes: int | None = None
    """Time limit of a Slurm task."""
    partition: str | None = None
    account: str | None = None
    slurm: tuple[str, ...] = ()
    """``key=value`` for sbatch."""
    image: str | None = None
    namespace: str | None = None
    overlay: str | None = None
    claim: str | None = None
    """PersistentVolumeClaim for the home folder of all pods."""


@dataclass(frozen=True)
class Plan:
    """What an engine will do, and how."""

    lines: tuple[tuple[str, str], ...]
    """(label, text) for people."""
    start: Callable[[Session], list[str]]
    """Does it; returns lines that say what was done, and how to look at it and stop it."""
    document: str = ""
    """What will be handed to the engine, where that is a text of its own."""
    notes: tuple[str, ...] = field(default=())
    """What may be a surprise later."""


class Engine(Protocol):
    """Starts workers on something."""

    def check(self, wanted: Wanted, *, dry_run: bool) -> None:
        """Look at what is asked for, before any database is.

        Raises:
            InputError: Something cannot be done; the message names the option or variable.
            WorldError: The engine is not here, unless it is a dry run.
        """

    def plan(self, spec: StudySpec, wanted: Wanted, *, dry_run: bool) -> Plan:
        """Say what will be done, without doing any of it. Raises as `check` does."""

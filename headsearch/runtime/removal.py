"""Studies' traces outside the database."""

from __future__ import annotations

import shutil
from pathlib import Path

from headsearch.home import checkpoint_folder
from headsearch.runtime.session import Session
from headsearch.search import studies


def delete_study(session: Session, name: str, *, force: bool = False) -> None:
    """Remove a study with its trials, curves and checkpoints.

    Raises:
        UnknownStudyError: There is none of this name.
        StudyBusyError: Workers train its trials now, and `force` is false.
    """
    studies.delete(session.database, name, force=force)
    forget_checkpoints(session.home, name)


def forget_checkpoints(home: Path, name: str) -> None:
    """Remove the checkpoints that this machine has of a study that is complete or deleted."""
    shutil.rmtree(checkpoint_folder(home, name, 0).parent, ignore_errors=True)

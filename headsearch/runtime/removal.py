"""Studies' traces outside the database."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from headsearch.home import checkpoint_folder
from headsearch.runtime.session import Session
from headsearch.search import snapshot, studies
from headsearch.search.studies import Study


def delete_study(session: Session, name: str, *, force: bool = False) -> None:
    """Remove a study with its trials, curves and checkpoints.

    Raises:
        UnknownStudyError: There is none of this name.
        StudyBusyError: Workers train its trials now, and `force` is false.
        StorageError: Its checkpoints are in a store that does not answer; the study is gone.
    """
    study = studies.get(session.database, name)
    attempts = snapshot.attempts(session.database, study)
    studies.delete(session.database, name, force=force)
    forget_all(session, study)
    _forget_stored(session, study, attempts)


def forget_all(session: Session, study: Study) -> None:
    """Remove the checkpoints that this machine, or a shared folder, has of a study that is deleted."""
    for folder in _folders(session, study):
        shutil.rmtree(folder, ignore_errors=True)


def forget_checkpoints(session: Session, study: Study) -> None:
    """Remove the checkpoints of the trials that have ended, once nothing is left to do.

    Only of those: somebody may have a failed trial trained again at this very moment, under a new number.
    Raises DatabaseError, StorageError.
    """
    ended = snapshot.attempts(session.database, study, ended=True)
    for folder in _folders(session, study):
        for number in ended:
            shutil.rmtree(folder / str(number), ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
    _forget_stored(session, study, ended)


def _folders(session: Session, study: Study) -> list[Path]:
    folders = [checkpoint_folder(session.home, study.folder, 0).parent]
    store = study.spec.worker.checkpoint_store or ""
    if store.startswith("file:"):
        folders.append(Path(unquote(urlsplit(store).path)) / study.folder)
    return folders


def _forget_stored(session: Session, study: Study, attempts: dict[int, int]) -> None:
    store = study.spec.worker.checkpoint_store or ""
    if store.startswith("s3:"):
        from headsearch.runtime.checkpoints import open_checkpoints  # loads torch

        for number, attempt in attempts.items():
            open_checkpoints(session.home, study.folder, number, store, generation=attempt).remove()

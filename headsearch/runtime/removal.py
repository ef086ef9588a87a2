"""Studies' traces outside the database."""

from __future__ import annotations

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
    forget_checkpoints(session, study)
    _forget_stored(session, study, attempts)


def forget_checkpoints(session: Session, study: Study) -> None:
    """Remove the checkpoints that this machine, or a shared folder, has of a study that has ended."""
    folders = [checkpoint_folder(session.home, study.folder, 0).parent]
    store = study.spec.worker.checkpoint_store or ""
    if store.startswith("file:"):
        folders.append(Path(unquote(urlsplit(store).path)) / study.folder)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def forget_pruned(session: Session, study: Study) -> None:
    """Remove what a store has of the trials that were pruned when the study ended.

    The others' checkpoints went when each of them ended. Raises StorageError.
    """
    _forget_stored(session, study, snapshot.attempts(session.database, study, state="pruned"))


def _forget_stored(session: Session, study: Study, attempts: dict[int, int]) -> None:
    store = study.spec.worker.checkpoint_store or ""
    if store.startswith("s3:"):
        from headsearch.runtime.checkpoints import open_checkpoints  # loads torch

        for number, attempt in attempts.items():
            open_checkpoints(session.home, study.folder, number, store, generation=attempt).remove()

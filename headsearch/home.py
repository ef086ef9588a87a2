"""The folder that holds everything headsearch keeps on this machine.

postgres/                     the embedded PostgreSQL server
cache/images/                 decoded images
cache/autoencoders/           pretrained autoencoders
checkpoints/<study>/<number>/ of trials that are not finished
data/                         torchvision's data sets
logs/                         of workers
gpus/<host>/                  leases of GPUs, where this machine has no /run/headsearch

A database server elsewhere (HEADSEARCH_DATABASE_URL) takes the place of the first.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import platformdirs

from headsearch.errors import StorageError

_SYSTEM_HOME = Path("/var/lib/headsearch")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def home_folder() -> Path:
    """Find the home folder, and make it if it is not there.

    It is ``$HEADSEARCH_HOME``, else ``/var/lib/headsearch`` for root, else the platform's folder for user
    data. It is made for its user alone, but open to all to enter when root makes it, because root's
    PostgreSQL runs as another user. Raises StorageError when it cannot be made or written.
    """
    named = os.environ.get("HEADSEARCH_HOME", "")
    try:
        if named:
            home = Path(named).expanduser()
        elif _is_root():
            home = _SYSTEM_HOME
        else:
            home = Path(platformdirs.user_data_dir("headsearch", appauthor=False))
        home = make_folder(home.resolve())
    except RuntimeError as error:  # a user without an entry, and without HOME
        raise StorageError("this user has no home folder: set HEADSEARCH_HOME to a folder") from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {home}: set HEADSEARCH_HOME to a folder of your own")
    return home


def make_folder(folder: Path) -> Path:
    """Make `folder` and those of its parents that are missing, whatever the umask is.

    Raises StorageError when the system refuses.
    """
    mode = 0o755 if _is_root() else 0o700
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        if not folder.is_dir():
            raise StorageError(f"{folder} is a file: set HEADSEARCH_HOME to a folder")
    except OSError as error:
        raise StorageError(
            f"cannot make {folder} ({error.strerror}): set HEADSEARCH_HOME to a folder of your own"
        ) from error
    return folder


def postgres_folder(home: Path) -> Path:
    """Make the folder for data, passwords, locks and log of the embedded PostgreSQL server."""
    return make_folder(home / "postgres")


def image_cache(home: Path) -> Path:
    """Make the folder for decoded images, keyed by their content."""
    return make_folder(home / "cache" / "images")


def autoencoder_cache(home: Path) -> Path:
    """Make the folder for pretrained autoencoders, keyed by what determines them."""
    return make_folder(home / "cache" / "autoencoders")


def checkpoint_folder(home: Path, study: str, number: int) -> Path:
    """Name the folder of one trial's checkpoints. Whoever saves the first one makes it."""
    return home / "checkpoints" / _plain(study) / str(number)


def data_folder(home: Path) -> Path:
    """Make the folder for torchvision's data sets."""
    return make_folder(home / "data")


def logs_folder(home: Path) -> Path:
    """Make the folder for logs of workers."""
    return make_folder(home / "logs")


def gpu_locks_folder(home: Path) -> Path:
    """Make the folder for this host's leases of GPUs; the home folder may be shared by several hosts."""
    return make_folder(home / "gpus" / _plain(socket.gethostname()))


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _plain(name: str) -> str:
    """`name` as one path component: anything unusual as its hex code, so that names never meet."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    return "%" + "".join(c if c.isascii() and c.isalnum() else f"%{ord(c):x}." for c in name)
